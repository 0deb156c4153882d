import jax
import numpy as np
import pytest

from mos_jax.adapters.methods import count_parameters, create_adapter, make_config
from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.tied_lora import TiedLoRAConfig
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import SITES, model_sites, randomised, trained_arrays

QKV_SITES = {
    "q_proj": SiteShape(3, 8, 12),
    "k_proj": SiteShape(3, 8, 4),
    "v_proj": SiteShape(3, 8, 4),
}


def build(config, sites=SITES, seed=0):
    return create_adapter(config, sites, jax.random.key(seed))


@pytest.mark.parametrize("tied", [False, True], ids=["per-type", "qkv"])
def test_the_factors_are_those_of_a_plain_loop(tied):
    sites = QKV_SITES if tied else SITES
    adapter = randomised(build(TiedLoRAConfig(rank=2, tie_qkv=tied), sites))
    arrays = trained_arrays(adapter)
    for name, site in sites.items():
        factors = adapter.site_factors(name)
        owner = "qkv" if tied else name
        a, u = arrays[f"a/{owner}"], arrays[f"u/{owner}"]
        b, v = arrays[f"b/{name}"], arrays[f"v/{name}"]
        for k in range(3):
            for j in range(2):
                np.testing.assert_array_equal(factors.a[k, j], u[k, j] * a[j])
                for i in range(site.d_out):
                    assert factors.b[k, j, i] == v[k, i] * b[j, i]


def test_a_gradient_of_the_tied_a_sums_over_types_and_blocks():
    adapter = build(TiedLoRAConfig(rank=2, tie_qkv=True), QKV_SITES)
    assert [name for name in trained_arrays(adapter) if name[0] in "au"] == ["a/qkv", "u/qkv"]
    factors = adapter.factors()
    for name in ("k_proj", "v_proj"):
        np.testing.assert_array_equal(factors[name].a, factors["q_proj"].a)
    gradient = jax.grad(lambda one: sum(f.a.sum() for f in one.factors().values()))(adapter)
    # u is 1 everywhere: each of 3 types and 3 blocks adds 1.
    np.testing.assert_array_equal(gradient.a["qkv"][...], np.full((2, 8), 9))


@pytest.mark.parametrize(("rank", "count"), [(256, 4_595_712), (280, 4_989_696)])
def test_the_counts_of_the_papers_form_on_llama2_7b(rank, count):
    """4.60M and 4.99M."""
    sites = {n: s for n, s in model_sites("llama2-7b").items() if n in QKV_SITES}
    counts = count_parameters(TiedLoRAConfig(rank, tie_qkv=True), sites)
    own = (rank + 32) * 4096
    assert counts == {
        "q_proj": own, "k_proj": own, "v_proj": own, "shared": rank * (4096 + 32),
    }  # fmt: skip
    assert sum(counts.values()) == 4 * 4096 * rank + (rank + 3 * 4096) * 32 == count


def test_grouped_queries_make_b_and_v_smaller():
    sites = {n: s for n, s in model_sites("smollm2-135m").items() if n in QKV_SITES}
    outputs = 576 + 192 + 192
    total = sum(count_parameters(TiedLoRAConfig(4, tie_qkv=True), sites).values())
    assert total == 4 * (576 + outputs) + 30 * (4 + outputs)


def test_the_count_of_the_form_per_type():
    sites = model_sites("llama2-7b")
    counts = count_parameters(TiedLoRAConfig(rank=8), sites)
    assert counts == {
        name: 8 * (site.d_in + site.d_out) + 32 * (8 + site.d_out) for name, site in sites.items()
    }


def test_a_is_uniform_b_is_zero_and_the_scalings_are_1():
    adapter = build(TiedLoRAConfig(rank=16), {"q_proj": SiteShape(3, 256, 4)})
    arrays = trained_arrays(adapter)
    bound = 256**-0.5
    deciles = np.quantile(arrays["a/q_proj"], np.linspace(0, 1, 11))
    np.testing.assert_allclose(deciles, np.linspace(-bound, bound, 11), atol=0.05 * bound)
    assert np.abs(arrays["a/q_proj"]).max() <= bound
    np.testing.assert_array_equal(arrays["b/q_proj"], np.zeros((16, 4)))
    np.testing.assert_array_equal(arrays["u/q_proj"], np.ones((3, 16)))
    np.testing.assert_array_equal(arrays["v/q_proj"], np.ones((3, 4)))


def test_the_scale_is_alpha_over_the_rank():
    assert TiedLoRAConfig().alpha == 16
    adapter = build(TiedLoRAConfig(5, alpha=20))
    np.testing.assert_array_equal(adapter.site_factors("q_proj").scale, [4.0] * 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"tie_qkv": 1}, "tie_qkv must be True or False, got 1"),
        ({"alpha": float("nan")}, "alpha must be a finite number above 0, got nan"),
        ({"tied_qkv": True}, "unknown field 'tied_qkv'; did you mean 'tie_qkv'"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(fields, message):
    with pytest.raises(InputError, match=f"tied_lora: .*{message}"):
        make_config("tied_lora", fields)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            {"q_proj": SiteShape(3, 8, 12), "o_proj": SiteShape(3, 12, 8)},
            "tie_qkv=True adapts q_proj, k_proj, v_proj only, got o_proj too",
        ),
        (
            {"q_proj": SiteShape(3, 8, 12), "k_proj": SiteShape(3, 4, 12)},
            "'q_proj' has d_in=8 and blocks 3 and 'k_proj' has d_in=4 and blocks 3",
        ),
        (
            {"q_proj": SiteShape(2, 8, 4), "v_proj": SiteShape(2, 8, 4, (0, 2))},
            r"'q_proj' has d_in=8 and blocks 2 and 'v_proj' has d_in=8 and blocks \[0, 2\]",
        ),
    ],
)
def test_sites_that_cannot_share_a_and_u_are_refused(sites, message):
    with pytest.raises(InputError, match=f"tied_lora: .*{message}"):
        build(TiedLoRAConfig(rank=2, tie_qkv=True), sites)
    assert build(TiedLoRAConfig(rank=2), sites).count_trained() > 0
