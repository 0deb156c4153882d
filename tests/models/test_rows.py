"""A batch whose rows have adapters of their own: any callable of the block's index may give them.

Every row is compared with a plain NumPy forward pass of its adapter alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mos_jax import InputError, LoRAConfig, MoSConfig, VeRAConfig, select_sites
from mos_jax.adapters.low_rank import LowRank
from mos_jax.models.generation import Sampling, generate
from mos_jax.models.projection import apply_together
from tests.adapters.fixtures_adapters import quick_jit
from tests.models.fixtures_decoder import filled_adapter, plain_logits, tiny_decoder, tokens_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The smallest source: factors of all rows and blocks, by site: a [L, B, r, h]."""

    factors: dict[str, LowRank]

    def __call__(self, layer):
        return jax.tree.map(lambda leaf: leaf[layer], self.factors)

    @classmethod
    def of(cls, adapters):
        """One row for each of some adapters of one rank and the same sites."""
        stack = lambda *leaves: jnp.stack(leaves, axis=1)  # noqa: E731
        return cls(jax.tree.map(stack, *[adapter.factors() for adapter in adapters]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pools:
    """Adapters of one configuration, one a row, each block assembled inside the scan."""

    states: nnx.State  # of the rows, stacked
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})

    def __call__(self, layer):
        return jax.vmap(lambda one: nnx.merge(self.graphdef, one).factors(layer))(self.states)

    @classmethod
    def of(cls, adapters):
        graphdef, _ = nnx.split(adapters[0])
        states = [nnx.split(adapter)[1] for adapter in adapters]
        return cls(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), graphdef)


@pytest.fixture(scope="module")
def decoder():
    return tiny_decoder()


@pytest.fixture(scope="module")
def adapters(decoder):
    """Three methods of one rank."""
    configs = MoSConfig(2, 3, 2, 1), LoRAConfig(3), VeRAConfig(3)
    return [filled_adapter(decoder.sites, c, seed) for seed, c in enumerate(configs)]


@quick_jit
def logits_of(decoder, tokens, factors=None):
    return decoder(tokens, factors)


def test_each_row_is_the_forward_of_its_own_adapter(decoder, adapters):
    tokens = tokens_of(decoder, rows=3)
    got = logits_of(decoder, tokens, Rows.of(adapters))
    for row, adapter in enumerate(adapters):
        want = plain_logits(decoder, tokens[row], adapter.factors())
        np.testing.assert_allclose(got[row], want, atol=1e-4)
    assert np.abs(got - logits_of(decoder, tokens)).max() > 0.1


def test_rows_may_be_assembled_inside_the_scan_from_each_ones_own_pools(decoder):
    config = MoSConfig(2, 3, 2, 1)
    sites = select_sites(decoder.sites, ["v_proj", "down_proj"])
    tenants = [filled_adapter(sites, config, seed) for seed in range(3)]
    tokens = tokens_of(decoder, rows=3)
    got = logits_of(decoder, tokens, Pools.of(tenants))
    for row, adapter in enumerate(tenants):
        want = plain_logits(decoder, tokens[row], adapter.factors())
        np.testing.assert_allclose(got[row], want, atol=1e-4)


def test_the_cache_gives_what_the_full_forward_gives(decoder, adapters):
    tokens, source = tokens_of(decoder, rows=3, length=6), Rows.of(adapters)
    full = logits_of(decoder, tokens, source)
    extend = quick_jit(lambda t, p, c, f: decoder.extend(t, p, c, f))
    start = jnp.zeros(3, jnp.int32)
    hidden, cache = extend(tokens[:, :4], start, decoder.empty_cache(3, 8), source)
    np.testing.assert_allclose(decoder.logits(hidden), full[:, :4], atol=2e-5)
    for position in (4, 5):
        here = jnp.full(3, position, jnp.int32)
        hidden, cache = extend(tokens[:, position : position + 1], here, cache, source)
        np.testing.assert_allclose(decoder.logits(hidden)[:, 0], full[:, position], atol=2e-5)


def test_rows_of_a_mixed_generation_are_those_of_each_adapter_alone(decoder, adapters):
    prompts = [[5, 6, 7], [9], list(range(20, 33))]
    mixed = generate(decoder, prompts, [-1], Sampling.create(6), Rows.of(adapters))
    alone = [
        generate(decoder, [prompt], [-1], Sampling.create(6), adapter.factors())[0]
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    assert mixed == alone
    assert mixed != generate(decoder, prompts, [-1], Sampling.create(6))


def test_a_bf16_base_meets_fp32_rows(adapters):
    exact, rounded = tiny_decoder(), tiny_decoder(dtype="bfloat16")
    tokens, source = tokens_of(exact, rows=3), Rows.of(adapters)
    hidden = jax.eval_shape(lambda d, f: d.hidden(tokens, f), rounded, source)
    assert hidden.dtype == jnp.bfloat16
    got, want = logits_of(rounded, tokens, source), logits_of(exact, tokens, source)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_gradients_reach_each_rows_factors_from_its_own_row_only(decoder, adapters):
    tokens, source = tokens_of(decoder, rows=3, length=4), Rows.of(adapters)
    loss = lambda source: jnp.sum(decoder(tokens, source)[1] ** 2)  # noqa: E731
    for leaf in jax.tree.leaves(quick_jit(jax.grad(loss))(source)):
        size = np.abs(leaf).reshape(*leaf.shape[:2], -1).max((0, 2))
        assert size[1] > 0
        assert size[0] == size[2] == 0


def test_dropout_masks_the_branches_of_rows_too(decoder, adapters):
    tokens, source = tokens_of(decoder, rows=3, length=4), Rows.of(adapters)
    run = quick_jit(lambda rate: decoder(tokens, source, dropout=(jax.random.key(0), rate)))
    full = logits_of(decoder, tokens, source)
    np.testing.assert_allclose(run(0.0), full, atol=1e-5)
    assert np.abs(run(0.5) - full).max() > 1e-3


def test_layers_that_share_an_input_may_have_factors_of_both_kinds(adapters):
    source = Rows.of(adapters)(0)
    by_row, shared = source["q_proj"], adapters[0].factors(0)["k_proj"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 64)), jnp.float32)
    for factors in ([by_row, shared], [by_row, source["k_proj"]], [shared, shared]):
        for got, f in zip(apply_together(x, factors), factors, strict=True):
            np.testing.assert_allclose(got, f.apply(x), rtol=1e-5, atol=1e-6)


def test_as_many_flops_as_with_one_adapter(decoder, adapters):
    """The one product for the A's of layers that share an input stays one, by row."""
    tokens, one = tokens_of(decoder, rows=3), adapters[0].factors()

    def lowered(factors):
        return jax.jit(lambda d, t, f: d(t, f)).lower(decoder, tokens, factors)

    mixed, single = lowered(Rows.of(adapters)), lowered(one)
    assert mixed.as_text().count("dot_general") == single.as_text().count("dot_general")
    flops = [lowered.compile().cost_analysis()["flops"] for lowered in (mixed, single)]
    assert flops[0] < 1.02 * flops[1]


def test_rows_that_do_not_fit_the_batch_are_refused(decoder, adapters):
    source = Rows.of(adapters)
    # Six rows would divide into three of twice the length.
    with pytest.raises(InputError, match="an axis of the batch's 6 rows"):
        decoder(tokens_of(decoder, rows=6), source)
    with pytest.raises(InputError, match="an axis of the batch's 1 rows"):
        generate(decoder, [[5]], [-1], Sampling.create(2), source)
    misnamed = Rows({"qproj": source.factors["q_proj"]})
    with pytest.raises(InputError, match="unknown site 'qproj'; did you mean 'q_proj'"):
        decoder(tokens_of(decoder, rows=3), misnamed)
    with pytest.raises(InputError, match=r"b \[r, 128\]"):
        decoder(tokens_of(decoder, rows=3), Rows({"up_proj": source.factors["q_proj"]}))


def test_some_sites_only(decoder):
    sites = select_sites(decoder.sites, ["v_proj", "down_proj"])
    some = [filled_adapter(sites, LoRAConfig(2), seed) for seed in (1, 2)]
    tokens = tokens_of(decoder)
    got = logits_of(decoder, tokens, Rows.of(some))
    for row in range(2):
        want = plain_logits(decoder, tokens[row], some[row].factors())
        np.testing.assert_allclose(got[row], want, atol=1e-4)


def test_generate_takes_a_callable_that_is_a_pytree(decoder, adapters):
    prompts, short = [[5, 6], [7]], Sampling.create(3)
    inside = jax.tree_util.Partial(type(adapters[0]).factors, adapters[0])
    want = generate(decoder, prompts, [-1], short, adapters[0].factors())
    assert generate(decoder, prompts, [-1], short, inside) == want
    for not_one in (adapters[0].factors, lambda layer: {}):
        with pytest.raises(InputError, match="must be a pytree here"):
            generate(decoder, prompts, [-1], short, not_one)
