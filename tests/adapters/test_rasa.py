import jax
import numpy as np
import pytest

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import count_parameters, create_adapter, make_config
from mos_jax.adapters.rasa import RaSAConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import (
    SITES,
    SOME_LAYERS,
    model_sites,
    quick_jit,
    randomised,
    trained_arrays,
)

CONFIG = RaSAConfig(rank=3, shared_rank=2)


def build(config=CONFIG, sites=SITES, seed=0):
    return create_adapter(config, sites, jax.random.key(seed))


def test_what_is_trained_is_own_vectors_pools_and_diagonals():
    sites = {"q_proj": SITES["q_proj"]}
    assert {name: array.shape for name, array in trained_arrays(build(sites=sites)).items()} == {
        "own_a/q_proj": (3, 1, 8),
        "own_b/q_proj": (3, 1, 12),
        "shared_a/q_proj": (6, 8),
        "shared_b/q_proj": (6, 12),
        "diagonal/q_proj": (3, 7),
    }
    everything_shared = build(RaSAConfig(rank=2, shared_rank=2), sites)
    assert set(trained_arrays(everything_shared)) == {
        "shared_a/q_proj",
        "shared_b/q_proj",
        "diagonal/q_proj",
    }


@pytest.mark.parametrize(("rank", "shared_rank"), [(3, 1), (3, 2), (2, 2)])
def test_the_count_is_that_of_lora_and_the_diagonals(rank, shared_rank):
    lora = count_parameters(LoRAConfig(rank=rank), SITES)
    assert count_parameters(RaSAConfig(rank, shared_rank), SITES) == {
        name: lora[name] + 3 * (rank - shared_rank + shared_rank * 3) for name in SITES
    }


@pytest.mark.parametrize(
    ("rank", "more", "share"),
    [(1, 30 * 30 * 7, 0.0206), (2, 30 * 31 * 7, 0.0107), (8, 30 * 37 * 7, 0.0032)],
)
def test_how_far_above_lora_it_lies_on_smollm2(rank, more, share):
    count = sum(count_parameters(RaSAConfig(rank), model_sites("smollm2-135m")).values())
    assert count == rank * 305_280 + more
    assert count / (rank * 305_280) - 1 == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("config", [CONFIG, RaSAConfig(2, 2), RaSAConfig(4, 1)])
def test_the_factors_are_those_of_a_plain_loop(config):
    adapter = randomised(build(config))
    arrays = trained_arrays(adapter)
    for name, factors in quick_jit(adapter.factors)().items():
        np.testing.assert_array_equal(factors.scale, np.ones(3))
        for k in range(3):
            rows_a, rows_b = [], []
            for j in range(config.rank - config.shared_rank):
                rows_a.append(arrays[f"own_a/{name}"][k, j])
                rows_b.append(arrays[f"own_b/{name}"][k, j])
            for j in range(3 * config.shared_rank):
                rows_a.append(arrays[f"shared_a/{name}"][j])
                rows_b.append(arrays[f"shared_b/{name}"][j])
            diagonal = arrays[f"diagonal/{name}"][k]
            assert factors.rank == len(diagonal) == len(rows_a)
            want = sum(d * np.outer(a, b) for d, a, b in zip(diagonal, rows_a, rows_b, strict=True))
            np.testing.assert_allclose(factors.delta()[k], want, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(factors.b[k], rows_b)


def test_a_traced_block_gives_its_row_and_a_block_left_out_has_scale_0():
    adapter = randomised(build(sites=SOME_LAYERS))
    every = adapter.site_factors("q_proj")
    compiled = quick_jit(lambda layer: adapter.site_factors("q_proj", layer))
    one = compiled(3)
    np.testing.assert_array_equal(one.a, every.a[2])
    np.testing.assert_array_equal(one.b, every.b[2])
    assert one.scale == 1
    assert compiled(1).scale == 0


@pytest.mark.parametrize(
    ("config", "own", "shared"),
    [
        (RaSAConfig(rank=8), 0.5 * 16 / 7, 0.5 * 16 / 5),
        (RaSAConfig(rank=4, shared_rank=2, alpha=64.0), 0.5 * 64 / 2, 0.5 * 64 / 10),
        (RaSAConfig(rank=1), None, 0.5 * 16 / 5),
    ],
)
def test_the_diagonal_starts_as_half_of_alpha_over_each_part(config, own, shared):
    adapter = build(config, {"q_proj": SiteShape(5, 4, 4)})
    diagonal = trained_arrays(adapter)["diagonal/q_proj"]
    assert diagonal.shape == (5, config.own_rank + 5 * config.shared_rank)
    np.testing.assert_allclose(diagonal[:, config.own_rank :], shared, rtol=1e-6)
    if own is not None:
        np.testing.assert_allclose(diagonal[:, : config.own_rank], own, rtol=1e-6)


def test_the_as_start_uniform_and_the_bs_at_zero_so_that_step_0_is_the_base():
    adapter = build(RaSAConfig(rank=8, shared_rank=4), {"q_proj": SiteShape(4, 256, 4)})
    arrays, bound = trained_arrays(adapter), 256**-0.5
    for name in ("own_a/q_proj", "shared_a/q_proj"):
        deciles = np.quantile(arrays[name], np.linspace(0, 1, 11))
        np.testing.assert_allclose(deciles, np.linspace(-bound, bound, 11), atol=0.06 * bound)
        assert np.abs(arrays[name]).max() <= bound
    drawn = np.concatenate([arrays[f"{part}_a/q_proj"].ravel() for part in ("own", "shared")])
    assert np.unique(drawn).size > 0.99 * drawn.size
    assert not np.any(adapter.site_factors("q_proj").delta())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"shared_rank": 0}, "shared_rank must be an integer >= 1, got 0"),
        ({"shared_rank": 9}, "shared_rank=9 must be at most rank=8"),
        ({"alpha": -1.0}, "alpha must be a finite number above 0, got -1.0"),
        ({"k": 1}, "unknown field 'k'"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(fields, message):
    with pytest.raises(InputError, match=f"rasa: {message}"):
        make_config("rasa", fields)
