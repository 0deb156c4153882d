"""Products without assembly: the sums of the assembled factors, in value and in gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.dense import count_flops
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.unassembled import unassembled
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import SITES, quick_jit
from tests.models.fixtures_decoder import filled_adapter, tiny_decoder, tokens_of

CONFIGS = {
    "mos": MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1),
    "one-table": MoSConfig(2, 4, 4, pair_dissociation=False),
    "width": MoSConfig(2, 3, 2, 1, pool_scope="width", rank_scaling=True),
    "pure-sharing": MoSConfig.pure_sharing(1, random_scaling="fixed"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_the_assembled_factors(name):
    adapter = filled_adapter(SITES, CONFIGS[name])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 8)), jnp.float32)

    weights = jnp.asarray(np.random.default_rng(1).normal(size=(7, 1)), jnp.float32)

    def total(adapter, x, source):
        outputs = [source(adapter)[site].apply(x) for site in SITES]
        return sum(jnp.sum(jnp.square(y) * weights) for y in outputs), outputs

    found = []
    for source in (lambda a: a.factors(1), lambda a: unassembled(a, 1)):
        run = functools.partial(total, source=source)
        run = quick_jit(jax.value_and_grad(run, (0, 1), has_aux=True, allow_int=True))
        found.append(run(adapter, x))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        if a.dtype == jnp.float32:  # tables have no gradient
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


def test_a_base_takes_them_for_factors():
    base = tiny_decoder()
    adapter = filled_adapter(base.sites)
    tokens = tokens_of(base, rows=2, length=5)
    run = quick_jit(lambda base, adapter: base(tokens, functools.partial(unassembled, adapter)))
    wanted = quick_jit(lambda base, adapter: base(tokens, adapter.factors()))(base, adapter)
    got = run(base, adapter)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(got - base(tokens)).max() > 1e-3 * np.abs(got).max()


def test_the_operations_are_those_of_the_whole_pool_and_do_not_grow_with_rank():
    def flops(config):
        adapter = filled_adapter(SITES, config)
        x = jnp.zeros((512, 8))
        forms = adapter.factors(0)["q_proj"], unassembled(adapter, 0)["q_proj"]
        return [count_flops(jax.make_jaxpr(lambda x, f=f: f.apply(x))(x)) for f in forms]

    (low, whole), (high, same) = (flops(MoSConfig(4, rank, 2)) for rank in (2, 4))
    assert high == 2 * low
    # 2 N h S and 2 N o S, and for either side the choice among them, 2 N l S r.
    shards = 4 * 3 * 2
    pool, chosen = 2 * 512 * shards * (8 + 12), 2 * 2 * 512 * 2 * shards
    assert (whole, same) == (pool + 2 * chosen, pool + 4 * chosen)


def test_ranks_that_differ_by_block_are_refused():
    config = MoSConfig(3, 3, 1, rank_pattern={"0.*": 2})
    with pytest.raises(InputError, match="ranks from 2 to 3"):
        unassembled(filled_adapter(SITES, config), 0)
