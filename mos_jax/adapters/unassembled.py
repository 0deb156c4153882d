"""MoS without assembly: tokens meet the shards themselves, and routing picks among the products.

A rank vector of A is a concatenation of l shards, so its product with a token is the sum of l
products of a shard with a piece of the token. Here every piece meets every shard of the pool, and
the routing table, as zeros and ones, sums up the products that belong together. B is the same
backwards. Neither A nor B is ever built, and the pools' gradients are plain products.

What that costs is the whole pool where assembly takes a block's own shards: each of the l pieces
meets S shards of width h / l, which is 2 N h S operations where A takes 2 N h r. Both are equal
only with pure sharing, where l = 1 and a block uses all S = r of them; there too it was slower than
assembly (docs/costs.md has the numbers), so that no training step uses it.

Axis legend: N tokens, L blocks, r rank, e equivalent rank, l shards per vector, S = e L l shards of
a pool, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mos_jax.adapters.adapter import choose_blocks
from mos_jax.adapters.mos import MoS
from mos_jax.adapters.patterns import differ
from mos_jax.adapters.pools import assemble
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unassembled:
    """The change of one weight in one block, as pools and tables; stands in for a `LowRank`.

    Attributes:
      pool_a: fp32 [S, h / l].
      table_a: int32 [r, l].
      pool_b: fp32 [S, o / l].
      table_b: int32 [r, l].
      scale: of each rank vector, fp32 [r].
    """

    pool_a: jax.Array
    table_a: jax.Array
    pool_b: jax.Array
    table_b: jax.Array
    scale: jax.Array

    @property
    def rank(self) -> int:
        """Number of rank vectors, r."""
        return self.table_a.shape[0]

    @property
    def a(self) -> jax.Array:
        """A put together, fp32 [r, h]; for its shape, and for what has no other way."""
        return assemble(self.pool_a, self.table_a)

    @property
    def b(self) -> jax.Array:
        """B put together, fp32 [r, o]."""
        return assemble(self.pool_b, self.table_b)

    @strict
    def apply(self, x: jax.Array) -> jax.Array:
        """As `LowRank.apply`, x [N, h] -> [N, o] in x's dtype, without A and B."""
        count, shards, width = len(x), *self.pool_a.shape
        pieces = x.reshape(count, -1, width)
        products = jax.lax.dot_general(
            pieces,
            self.pool_a.astype(x.dtype),
            (((2,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        # [l, S, r]: 1 where rank vector r has shard S at position l. Sums of it pick and spread.
        chosen = jax.nn.one_hot(self.table_a.T, shards, axis=1, dtype=jnp.float32)
        middle = jnp.einsum("njs,jsr->nr", products, chosen) * self.scale[None, :]
        shards = self.pool_b.shape[0]
        chosen = jax.nn.one_hot(self.table_b.T, shards, axis=1, dtype=x.dtype)
        spread = jnp.einsum("nr,jsr->njs", middle.astype(x.dtype), chosen)
        out = jax.lax.dot_general(spread, self.pool_b.astype(x.dtype), (((2,), (0,)), ((), ())))
        return out.reshape(count, -1)


def unassembled(adapter: MoS, layer: jax.Array | int) -> dict[str, Unassembled]:
    """What `adapter.factors(layer)` stands for, by site type, without assembling it.

    Raises:
      InputError: if ranks differ by block, whose missing rows a table cannot say; or if the model
        cannot have that block.
    """
    found = {}
    for name, site in adapter.sites.items():
        ranks = adapter.site_ranks[name]
        if differ(ranks):
            raise InputError(
                f"mos: {name!r} has ranks from {min(ranks)} to {max(ranks)} by block; without "
                "assembly all must be equal"
            )
        index, scale, _ = choose_blocks(site, layer, adapter.site_scales[name])
        of_vectors = jnp.broadcast_to(scale[None], (ranks[0],))
        if name in adapter.scaling:
            of_vectors = of_vectors * adapter.scaling[name][index]
        found[name] = Unassembled(
            adapter.shards("a", name),
            adapter.table_a[name][index],
            adapter.shards("b", name),
            adapter.table_b[name][index],
            of_vectors,
        )
    return found
