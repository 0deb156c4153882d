import jax
import numpy as np
import pytest

from mos_jax.adapters.methods import count_parameters, create_adapter, make_config
from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import (
    SITES,
    SOME_LAYERS,
    frozen_arrays,
    model_sites,
    randomised,
    trained_arrays,
)


def build(config, sites=SITES, seed=0):
    return create_adapter(config, sites, jax.random.key(seed))


def test_the_factors_are_those_of_a_plain_loop():
    adapter = randomised(build(VeRAConfig(rank=5)))
    trained, frozen = trained_arrays(adapter), frozen_arrays(adapter)
    for name in SITES:
        factors = adapter.site_factors(name)
        a, b = frozen[f"projection_a/{name}"], frozen[f"projection_b/{name}"]
        for k in range(3):
            d, scales = trained[f"d/{name}"][k], trained[f"b/{name}"][k]
            for j in range(5):
                np.testing.assert_array_equal(factors.a[k, j], d[j] * a[j])
                for i in range(b.shape[1]):
                    assert factors.b[k, j, i] == scales[i] * b[j, i]


def test_the_count_on_llama2_7b_is_that_of_the_paper():
    sites = model_sites("llama2-7b")
    counts = count_parameters(VeRAConfig(rank=256), sites)
    assert counts == {name: 32 * (256 + site.d_out) for name, site in sites.items()}
    assert sum(counts.values()) == 1_417_216


def test_on_smollm2_the_budget_of_lora_asks_for_very_high_ranks():
    sites = model_sites("smollm2-135m")
    for rank, budget in ((713, 305_280), (2166, 610_560)):
        at, above = (sum(count_parameters(VeRAConfig(r), sites).values()) for r in (rank, rank + 1))
        assert at <= budget < above


def test_the_start_is_the_published_one():
    adapter = build(VeRAConfig(rank=64), {"q_proj": SiteShape(3, 256, 128)})
    trained, frozen = trained_arrays(adapter), frozen_arrays(adapter)
    np.testing.assert_array_equal(trained["d/q_proj"], np.full((3, 64), 0.1, np.float32))
    np.testing.assert_array_equal(trained["b/q_proj"], np.zeros((3, 128), np.float32))
    for name, fan_in in (("projection_a/q_proj", 256), ("projection_b/q_proj", 64)):
        bound = (6 / fan_in) ** 0.5
        deciles = np.quantile(frozen[name], np.linspace(0, 1, 11))
        np.testing.assert_allclose(deciles, np.linspace(-bound, bound, 11), atol=0.05 * bound)
        assert np.abs(frozen[name]).max() <= bound * (1 + 1e-6)


def test_the_projections_come_from_their_seed_and_each_type_has_its_own():
    same_widths = dict.fromkeys(("q_proj", "k_proj"), SITES["q_proj"])
    first, again, other = (
        frozen_arrays(build(VeRAConfig(rank=4, projection_seed=projection), same_widths, seed))
        for projection, seed in ((0, 0), (0, 1), (1, 0))
    )
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        assert not np.any(array == other[name])
    assert not np.any(first["projection_a/q_proj"] == first["projection_a/k_proj"])
    # Which blocks and which other types are adapted changes nothing.
    some = frozen_arrays(build(VeRAConfig(rank=4), {"q_proj": SOME_LAYERS["q_proj"]}))
    np.testing.assert_array_equal(some["projection_b/q_proj"], first["projection_b/q_proj"])


def test_the_scale_is_1_and_projections_are_stored_but_not_served():
    adapter = build(VeRAConfig(rank=5))
    np.testing.assert_array_equal(adapter.site_factors("q_proj").scale, [1.0] * 3)
    trained = 3 * (5 + 12) + 3 * (5 + 4)
    frozen = 5 * (8 + 12) + 5 * (8 + 4)
    summary = adapter.summary()
    assert summary["trained_parameters"] == trained
    assert summary["served_bytes"] == 4 * trained
    assert summary["stored_bytes"] == 4 * (trained + frozen)


UNLIKE = {"q_proj": SiteShape(3, 8, 12), "down_proj": SiteShape(3, 16, 4)}


class TestShared:
    """One pair for the whole model, sliced to each site's widths."""

    def test_the_factors_are_those_of_a_plain_loop(self):
        adapter = randomised(build(VeRAConfig(rank=5, projections="shared"), UNLIKE))
        trained, frozen = trained_arrays(adapter), frozen_arrays(adapter)
        a, b = frozen["projection_a/shared"], frozen["projection_b/shared"]
        assert (a.shape, b.shape) == ((5, 16), (5, 12))
        for name, site in UNLIKE.items():
            factors = adapter.site_factors(name)
            for k in range(3):
                d, scales = trained[f"d/{name}"][k], trained[f"b/{name}"][k]
                for j in range(5):
                    np.testing.assert_array_equal(factors.a[k, j], d[j] * a[j, : site.d_in])
                    np.testing.assert_array_equal(factors.b[k, j], scales * b[j, : site.d_out])

    def test_what_trains_is_the_same_and_less_is_stored(self):
        own, shared = (
            build(VeRAConfig(rank=5, projections=projections), UNLIKE)
            for projections in ("site_type", "shared")
        )
        assert shared.count_trained_by_site() == own.count_trained_by_site()
        assert sum(shared.count_trained_by_site().values()) == 3 * (5 + 12) + 3 * (5 + 4)
        assert shared.summary()["served_bytes"] == own.summary()["served_bytes"]
        stored = 4 * (5 * (16 + 12) - 5 * (8 + 12) - 5 * (16 + 4))
        assert shared.summary()["stored_bytes"] == own.summary()["stored_bytes"] + stored

    def test_the_start_goes_with_the_largest_widths(self):
        sites = {"q_proj": SiteShape(1, 64, 128), "down_proj": SiteShape(1, 256, 64)}
        frozen = frozen_arrays(build(VeRAConfig(rank=64, projections="shared"), sites))
        for name, fan_in in (("projection_a/shared", 256), ("projection_b/shared", 64)):
            bound = (6 / fan_in) ** 0.5
            deciles = np.quantile(frozen[name], np.linspace(0, 1, 11))
            np.testing.assert_allclose(deciles, np.linspace(-bound, bound, 11), atol=0.05 * bound)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"d_initial": 0}, "d_initial must not be 0"),
        ({"d_initial": float("inf")}, "d_initial must be a finite number, got inf"),
        ({"projection_seed": -1}, "projection_seed must be an integer >= 0, got -1"),
        ({"projection_seed": 2**32}, r"projection_seed must be below 2\^32, got 4294967296"),
        ({"projections": "own"}, "unknown projections 'own'; .*Known: shared, site_type"),
        ({"alpha": 16}, "unknown field 'alpha'"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(fields, message):
    with pytest.raises(InputError, match=f"vera: .*{message}"):
        make_config("vera", fields)


def test_the_largest_seed_is_one_that_works():
    build(VeRAConfig(rank=1, projection_seed=2**32 - 1))
