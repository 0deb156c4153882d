import dataclasses

import jax
import numpy as np
import pytest

from mos_jax.adapters.adapter import Frozen
from mos_jax.adapters.methods import count_parameters, create_adapter, make_config
from mos_jax.adapters.routing import checksum
from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.storage import load_adapter, read_card, save_adapter
from mos_jax.adapters.uni_lora import UniLoRAConfig
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import (
    SITES,
    model_sites,
    quick_jit,
    randomised,
    trained_arrays,
)

# Over 3 blocks and rank 2, all factors of SITES have 3 * 2 * (8 + 12 + 8 + 4) entries.
CONFIG = UniLoRAConfig(theta_length=36, rank=2)
ENTRIES = 192


def build(config=CONFIG, sites=SITES, seed=0):
    return create_adapter(config, sites, jax.random.key(seed))


def test_all_that_is_trained_is_one_vector_that_belongs_to_no_site_type():
    adapter = build()
    assert {name: array.shape for name, array in trained_arrays(adapter).items()} == {
        "theta": (36,)
    }
    assert count_parameters(CONFIG, SITES) == {"q_proj": 0, "down_proj": 0, "shared": 36}
    assert adapter.count_served() == 36


def test_the_count_on_a_large_model_is_the_length_whatever_the_rank():
    config = UniLoRAConfig(theta_length=610_560, rank=8)
    sites = model_sites("smollm2-135m")
    assert sum(count_parameters(config, sites).values()) == 610_560
    assert config.count_entries(sites) == 8 * 305_280


@pytest.mark.parametrize("length", [1, 36, 48, 191, 192])
def test_the_index_is_balanced_over_the_whole_model(length):
    adapter = build(dataclasses.replace(CONFIG, theta_length=length))
    used = np.bincount(np.concatenate([t.ravel() for t in adapter.tables().values()]))
    assert used.size == length
    assert used.sum() == ENTRIES
    assert used.max() - used.min() == (1 if ENTRIES % length else 0)
    adapter.check()


def test_the_index_is_in_random_order_and_not_the_same_in_any_two_factors():
    adapter = build(UniLoRAConfig(theta_length=32, rank=2), {"q_proj": SiteShape(8, 64, 64)})
    index = adapter.index_a["q_proj"][...].ravel()
    # Of independent draws, 1 in 32 stands where counting off would put it, and so on.
    assert np.mean(index == np.arange(index.size) % 32) < 0.1
    assert np.mean(np.diff(index) == 1) < 0.1
    assert np.mean(index == adapter.index_b["q_proj"][...].ravel()) < 0.1
    blocks = adapter.index_a["q_proj"][...]
    assert np.mean(blocks[0] == blocks[1]) < 0.15


def test_the_factors_are_those_of_a_plain_loop():
    adapter = randomised(build())
    theta, tables = trained_arrays(adapter)["theta"], adapter.tables()
    used = np.zeros(36)
    for table in tables.values():
        for entry in table.ravel():
            used[entry] += 1
    for name in SITES:
        factors = adapter.site_factors(name)
        np.testing.assert_array_equal(factors.scale, np.ones(3))
        for part in "ab":
            table = tables[f"index_{part}/{name}"]
            want = np.empty(table.shape)
            for place in np.ndindex(table.shape):
                want[place] = theta[table[place]] / np.sqrt(used[table[place]])
            np.testing.assert_allclose(getattr(factors, part), want, rtol=1e-6, atol=0.0)


def test_the_map_from_theta_to_all_factors_keeps_lengths():
    """So the columns of the paper's projection are orthonormal."""
    adapter = randomised(build())
    parts = [part for f in adapter.factors().values() for part in (f.a, f.b)]
    norm = np.sqrt(sum(np.sum(np.square(part)) for part in parts))
    np.testing.assert_allclose(norm, np.linalg.norm(trained_arrays(adapter)["theta"]), rtol=1e-5)


def test_theta_starts_uniform():
    sites = {"q_proj": SiteShape(4, 512, 512)}
    adapter = build(UniLoRAConfig(theta_length=8192, rank=4), sites)
    theta = trained_arrays(adapter)["theta"]
    deciles = np.quantile(theta, np.linspace(0, 1, 11))
    np.testing.assert_allclose(deciles, np.linspace(-0.02, 0.02, 11), atol=1e-3)
    assert np.abs(theta).max() <= 0.02
    assert 0 < np.abs(adapter.site_factors("q_proj").delta()).max() < 4 * 0.02**2


def test_the_routing_seed_decides_the_index_and_the_order_of_the_sites_does_not():
    one = checksum(build(seed=0).tables())
    assert one == checksum(build(seed=1).tables())
    assert one == checksum(build(sites=dict(reversed(SITES.items()))).tables())
    assert one != checksum(build(dataclasses.replace(CONFIG, routing_seed=1)).tables())


def test_the_index_is_the_one_that_was_always_drawn():
    """A change here scatters what was trained by seed; those that are stored keep theirs."""
    assert checksum(build().tables()) == (
        "ae2678989cdbab8e1c135ddee9e33f00c376a0a9e7a6c1f82ca5c61a8bd70039"
    )


def test_a_traced_block_gives_its_row():
    adapter = randomised(build())
    every = adapter.site_factors("q_proj")
    one = quick_jit(lambda layer: adapter.site_factors("q_proj", layer))(2)
    np.testing.assert_array_equal(one.a, every.a[2])
    np.testing.assert_array_equal(one.b, every.b[2])


def test_the_index_is_stored_and_has_a_checksum(tmp_path):
    adapter = build()
    path = save_adapter(tmp_path / "adapter", adapter)
    assert read_card(path).routing_checksum == checksum(adapter.tables())
    loaded = load_adapter(path)
    for name, table in adapter.tables().items():
        assert table.dtype == np.int32
        np.testing.assert_array_equal(loaded.tables()[name], table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.at[0, 0, 0].set(36), r"index_a/q_proj: an index .* outside 0\.\.35"),
        (lambda index: index.at[0, 0, 0].set(-1), r"index_a/q_proj: an index .* outside 0\.\.35"),
        (lambda index: index.at[0, 0].set(7), "not balanced: it uses entry"),
        (lambda index: index[:2], r"index here is int32 \(3, 2, 8\), got int32 \(2, 2, 8\)"),
        (lambda index: index.astype("float32"), "index here is int32 .* got float32"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(change, message, tmp_path):
    adapter = build()
    adapter.index_a["q_proj"] = Frozen(change(adapter.index_a["q_proj"][...]))
    with pytest.raises(InputError, match=message):
        adapter.check()
    with pytest.raises(InputError, match=message):
        save_adapter(tmp_path / "adapter", adapter)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"theta_length": 0}, "theta_length must be an integer >= 1, got 0"),
        ({"rank": True}, "rank must be an integer >= 1, got True"),
        ({"routing_seed": -1}, "routing_seed must be an integer >= 0, got -1"),
        ({"used_more": "last"}, "unknown used_more 'last'; .*Known: drawn, first"),
        ({"theta": 4}, "unknown field 'theta'; did you mean 'theta_length'"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(fields, message):
    with pytest.raises(InputError, match=f"uni_lora: {message}"):
        make_config("uni_lora", fields)


DRAWN = dataclasses.replace(CONFIG, used_more="drawn")


class TestDrawn:
    """Entries that are used once more, drawn as in the authors' code."""

    @pytest.mark.parametrize("length", [1, 36, 48, 191, 192])
    def test_the_index_is_that_of_first_with_the_entries_renamed(self, length):
        first, drawn = (
            build(dataclasses.replace(config, theta_length=length)) for config in (CONFIG, DRAWN)
        )
        names = {}
        for path, table in drawn.tables().items():
            for old, new in zip(first.tables()[path].ravel(), table.ravel(), strict=True):
                assert names.setdefault(old, new) == new
        assert sorted(names.values()) == list(range(length))
        if length > 1:
            assert [names[k] for k in range(length)] != list(range(length))
        drawn.check()

    def test_the_factors_are_those_of_a_plain_loop(self):
        adapter = randomised(build(DRAWN))
        theta, tables = trained_arrays(adapter)["theta"], adapter.tables()
        used = np.bincount(np.concatenate([table.ravel() for table in tables.values()]))
        assert np.any(np.diff(used) > 0)
        for name in SITES:
            factors = adapter.site_factors(name)
            for part in "ab":
                table = tables[f"index_{part}/{name}"]
                want = (theta / np.sqrt(used))[table]
                np.testing.assert_allclose(getattr(factors, part), want, rtol=1e-6, atol=0.0)

    def test_the_counts_are_the_same_and_scales_are_stored_but_neither_trained_nor_served(self):
        first, drawn = build().summary(), build(DRAWN).summary()
        assert drawn["trained_parameters"] == first["trained_parameters"] == 36
        assert drawn["served_bytes"] == first["served_bytes"]
        assert drawn["stored_bytes"] == first["stored_bytes"] + 4 * 36

    def test_the_index_is_the_one_that_was_always_drawn(self):
        assert checksum(build(DRAWN).tables()) == (
            "6cd7d25498f6cf80aced7a01457e4432566432ca5c7133fb4121361e01fe3d68"
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda scales: 2 * scales, r"scale is 1 / sqrt\(\d\), got"),
            (lambda scales: scales.at[3].set(np.nan), "entry 3 of theta is used"),
        ],
    )
    def test_scales_that_do_not_fit_are_refused(self, change, message):
        adapter = build(DRAWN)
        adapter.scales = Frozen(change(adapter.scales[...]))
        with pytest.raises(InputError, match=message):
            adapter.check()

    def test_an_index_that_is_not_balanced_is_refused(self):
        adapter = build(DRAWN)
        adapter.index_a["q_proj"] = Frozen(adapter.index_a["q_proj"][...].at[0, 0].set(7))
        with pytest.raises(InputError, match="not balanced: it uses entry 7"):
            adapter.check()


def test_more_parameters_than_places_for_them_are_refused():
    with pytest.raises(InputError, match=r"theta_length=193 must be at most the 192 entries .*=2"):
        build(dataclasses.replace(CONFIG, theta_length=193))
