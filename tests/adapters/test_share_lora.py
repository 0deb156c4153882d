import jax
import numpy as np
import pytest

from mos_jax.adapters.methods import count_parameters, create_adapter, make_config
from mos_jax.adapters.share_lora import ShareLoRAConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import SITES, model_sites, randomised, trained_arrays


def build(config, sites=SITES, seed=0):
    return create_adapter(config, sites, jax.random.key(seed))


@pytest.mark.parametrize("shared", ["a", "b"])
def test_one_side_is_the_same_in_all_blocks_and_the_other_their_own(shared):
    adapter = randomised(build(ShareLoRAConfig(rank=2, shared=shared)))
    own = "b" if shared == "a" else "a"
    arrays = trained_arrays(adapter)
    for name, site in SITES.items():
        factors = adapter.site_factors(name)
        widths = {"a": site.d_in, "b": site.d_out}
        assert arrays[f"{shared}/{name}"].shape == (2, widths[shared])
        assert arrays[f"{own}/{name}"].shape == (3, 2, widths[own])
        for k in range(3):
            np.testing.assert_array_equal(getattr(factors, shared)[k], arrays[f"{shared}/{name}"])
            np.testing.assert_array_equal(getattr(factors, own)[k], arrays[f"{own}/{name}"][k])


@pytest.mark.parametrize(
    ("shared", "rank", "ratio"), [("a", 3, 0.79), ("a", 4, 1.05), ("b", 3, 0.76), ("b", 4, 1.02)]
)
def test_no_rank_hits_the_budget_of_lora_of_rank_2_on_smollm2(shared, rank, ratio):
    sites = model_sites("smollm2-135m")
    counts = count_parameters(ShareLoRAConfig(rank=rank, shared=shared), sites)
    for name, site in sites.items():
        widths = (site.d_in, 30 * site.d_out) if shared == "a" else (30 * site.d_in, site.d_out)
        assert counts[name] == rank * sum(widths)
    assert round(sum(counts.values()) / 610_560, 2) == ratio


def test_the_counts_on_llama2_7b():
    sites = model_sites("llama2-7b")
    total = {s: sum(count_parameters(ShareLoRAConfig(8, s), sites).values()) for s in ("a", "b")}
    wide_in, wide_out = 6 * 4096 + 11008, 5 * 4096 + 2 * 11008
    assert total == {"a": 8 * (wide_in + 32 * wide_out), "b": 8 * (32 * wide_in + wide_out)}


@pytest.mark.parametrize("shared", ["a", "b"])
def test_a_is_uniform_within_the_bound_and_b_is_zero(shared):
    adapter = build(ShareLoRAConfig(16, shared), {"q_proj": SiteShape(4, 256, 4)})
    a, bound = np.asarray(adapter.site_factors("q_proj").a), 256**-0.5
    deciles = np.quantile(a, np.linspace(0, 1, 11))
    np.testing.assert_allclose(deciles, np.linspace(-bound, bound, 11), atol=0.05 * bound)
    assert np.abs(a).max() <= bound
    assert not np.any(adapter.site_factors("q_proj").b)
    assert np.array_equal(a[0], a[1]) == (shared == "a")


def test_the_scale_is_alpha_over_the_rank_and_a_is_what_is_shared_by_default():
    assert ShareLoRAConfig() == ShareLoRAConfig(8, "a", 16.0)
    adapter = build(ShareLoRAConfig(5, alpha=20))
    np.testing.assert_array_equal(adapter.site_factors("q_proj").scale, [4.0] * 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"shared": "A"}, "shared must be 'a' or 'b', got 'A'"),
        ({"shared": None}, "shared must be 'a' or 'b', got None"),
        ({"alpha": -1}, "alpha must be a finite number above 0, got -1"),
        ({"share": "a"}, "unknown field 'share'; did you mean 'shared'"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(fields, message):
    with pytest.raises(InputError, match=f"share_lora: .*{message}"):
        make_config("share_lora", fields)
