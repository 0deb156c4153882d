import math

import jax
import numpy as np
import pytest

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import count_parameters, create_adapter, make_config
from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import SITES, SOME_LAYERS, randomised, trained_arrays


def build(config, sites=SITES, seed=0):
    return create_adapter(config, sites, jax.random.key(seed))


def test_every_site_trains_its_own_a_and_b():
    adapter = build(LoRAConfig(rank=2))
    assert {name: array.shape for name, array in trained_arrays(adapter).items()} == {
        "a/q_proj": (3, 2, 8),
        "b/q_proj": (3, 2, 12),
        "a/down_proj": (3, 2, 8),
        "b/down_proj": (3, 2, 4),
    }


def test_the_count_is_r_L_times_both_widths():
    assert count_parameters(LoRAConfig(rank=5), SITES) == {
        "q_proj": 5 * 3 * 20,
        "down_proj": 5 * 3 * 12,
    }


def test_a_is_uniform_within_the_bound_and_b_is_zero():
    adapter = build(LoRAConfig(rank=16), {"q_proj": SiteShape(4, 256, 4)})
    factors = adapter.site_factors("q_proj")
    bound = 256**-0.5
    deciles = np.quantile(factors.a, np.linspace(0, 1, 11))
    np.testing.assert_allclose(deciles, np.linspace(-bound, bound, 11), atol=0.05 * bound)
    assert np.abs(factors.a).max() <= bound
    assert not np.any(factors.b)
    assert not np.any(factors.delta())


def test_blocks_and_types_start_apart():
    adapter = build(LoRAConfig(rank=2), {"q_proj": SITES["q_proj"], "k_proj": SITES["q_proj"]})
    a = [np.asarray(adapter.site_factors(name).a) for name in ("q_proj", "k_proj")]
    assert np.unique(a).size == 2 * 3 * 2 * 8


@pytest.mark.parametrize(("rank", "alpha"), [(4, 16.0), (4, 64), (3, 1.5)])
def test_the_scale_is_alpha_over_the_rank_or_over_its_root(rank, alpha):
    for rslora, scale in ((False, alpha / rank), (True, alpha / math.sqrt(rank))):
        config = LoRAConfig(rank, alpha, rslora)
        assert config.site_scales(SITES)["q_proj"] == pytest.approx((scale,) * 3)
        adapter = build(config, {"q_proj": SiteShape(2, 4, 4)})
        np.testing.assert_allclose(adapter.factors()["q_proj"].scale, [scale] * 2, rtol=1e-6)
        np.testing.assert_allclose(adapter.factors(1)["q_proj"].scale, scale, rtol=1e-6)


def test_alpha_defaults_to_16_and_rslora_to_off():
    assert (LoRAConfig().alpha, LoRAConfig().rslora) == (16.0, False)


def test_the_factors_are_the_arrays_themselves_block_by_block():
    adapter = randomised(build(LoRAConfig(rank=2)))
    for name in SITES:
        every = adapter.site_factors(name)
        for part in "ab":
            want = trained_arrays(adapter)[f"{part}/{name}"]
            np.testing.assert_array_equal(getattr(every, part), want)
            for k in range(3):
                np.testing.assert_array_equal(getattr(adapter.factors(k)[name], part), want[k])


def test_selected_layers_stand_at_their_place_and_the_rest_have_scale_0():
    adapter = randomised(build(LoRAConfig(rank=2), SOME_LAYERS))
    factors = adapter.site_factors("q_proj")
    assert factors.layers == (0, 2, 3)
    for place, k in enumerate((0, 2, 3)):
        one = adapter.site_factors("q_proj", k)
        np.testing.assert_array_equal(one.a, factors.a[place])
        np.testing.assert_array_equal(one.b, factors.b[place])
        assert one.scale == 8
    for k in (1, 4):
        assert adapter.site_factors("q_proj", k).scale == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"rank": -1}, "rank must be an integer >= 1, got -1"),
        ({"rank": 2.0}, "rank must be an integer >= 1, got 2.0"),
        ({"rank": True}, "rank must be an integer >= 1, got True"),
        ({"rank": None}, "rank must be an integer >= 1, got None"),
        ({"alpha": 0.0}, "alpha must be a finite number above 0, got 0.0"),
        ({"alpha": float("nan")}, "alpha must be a finite number above 0, got nan"),
        ({"alpha": None}, "alpha must be a finite number above 0, got None"),
        ({"rslora": "yes"}, "rslora must be True or False, got 'yes'"),
        ({"ranks": 2}, "unknown field 'ranks'; did you mean 'rank'"),
        ({"equivalent_rank": 2}, "unknown field 'equivalent_rank'"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(fields, message):
    with pytest.raises(InputError, match=f"lora: .*{message}"):
        make_config("lora", fields)
