"""Pools of shards: how many shards a pool has, whose they are, and the vectors made of them.

A pool holds its public shards first, then the private ones of its block 0, 1, ... Where several
site types share a pool, its blocks are those of the first type, then those of the next; a pool is
in every other respect one of a type that has so many blocks.

Axis legend: L blocks, r active rank, e equivalent rank, p private rank, l shards per vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from mos_jax.adapters.bits import from_bits
from mos_jax.adapters.patterns import differ
from mos_jax.adapters.sites import Sites
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError

Scope = Literal["site_type", "width"]
SCOPES: tuple[Scope, ...] = ("site_type", "width")
Side = Literal["a", "b"]
SIDES: tuple[Side, ...] = ("a", "b")


@dataclasses.dataclass(frozen=True)
class PoolLayout:
    """How many shards a pool has and which of them a block may use.

    Attributes:
      num_layers: L, of all site types that share the pool.
      equivalent_rank: e.
      rank: r; the largest, where blocks differ.
      private_rank: p.
      shards_per_vector: l.
      ranks: of each block where they differ, else None. All have p private vectors, so that they
        differ in the public ones.
    """

    num_layers: int
    equivalent_rank: int
    rank: int
    private_rank: int
    shards_per_vector: int
    ranks: tuple[int, ...] | None = None

    def rank_of(self, block: int) -> int:
        """The rank of one block."""
        return self.rank if self.ranks is None else self.ranks[block]

    @property
    def num_public(self) -> int:
        """Public shards, (e - p) L l."""
        public_rank = self.equivalent_rank - self.private_rank
        return public_rank * self.num_layers * self.shards_per_vector

    @property
    def num_private_per_layer(self) -> int:
        """Private shards of one block, p l."""
        return self.private_rank * self.shards_per_vector

    @property
    def num_shards(self) -> int:
        """All shards, e L l."""
        return self.num_public + self.num_layers * self.num_private_per_layer

    @property
    def drawn(self) -> tuple[int, ...]:
        """Public shards that one matrix of each block uses, (r - p) l."""
        return tuple(
            (self.rank_of(block) - self.private_rank) * self.shards_per_vector
            for block in range(self.num_layers)
        )


@dataclasses.dataclass(frozen=True)
class Pool:
    """One pool and the site types that own it.

    Attributes:
      name: of its array: the type's, or `"width_<w>"` where several types share it.
      width: w, of the vectors that are made of its shards.
      layout: its layout.
      blocks: by site type, which blocks of the layout are the type's own, in order.
    """

    name: str
    width: int
    layout: PoolLayout
    blocks: Mapping[str, range]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of its array, [e L l, w / l]."""
        shards = self.layout.shards_per_vector
        return self.layout.num_shards, self.width // shards


def plan_pools(
    sites: Sites,
    side: Side,
    scope: Scope,
    *,
    equivalent_rank: int,
    ranks: Mapping[str, tuple[int, ...]],
    private_rank: int,
    shards_per_vector: int,
) -> list[Pool]:
    """The pools of A or of B that `sites` need.

    Together they hold the trained parameters of LoRA of rank e, whoever shares them.

    Args:
      sites: the adapted sites.
      side: "a" for pools of width h = d_in, "b" for pools of width o = d_out.
      scope: "site_type" gives every type a pool of its own; "width" gives all types of one width
        one pool. A type that is alone with its width has the same pool either way.
      equivalent_rank: e.
      ranks: r of every block, by site type.
      private_rank: p.
      shards_per_vector: l.

    Raises:
      InputError: if l does not divide a width, a pool has fewer public shards than r - p vectors
        need, or a site type has the name of a shared pool.
    """
    e, p, shards = equivalent_rank, private_rank, shards_per_vector
    pools = []
    for pool, names in _sharers(sites, side, scope).items():
        width = _width(sites, names[0], side)
        if width % shards:
            raise InputError(
                f"mos: shards_per_vector={shards} does not divide "
                f"{'d_in' if side == 'a' else 'd_out'}={width} of {names[0]!r}"
            )
        blocks, num_layers = {}, 0
        for name in names:
            blocks[name] = range(num_layers, num_layers + sites[name].num_layers)
            num_layers = blocks[name].stop
        public = (e - p) * num_layers
        own = sum((ranks[name] for name in names), ())
        r = max(own)
        if r - p > public:
            by = f", shared by {', '.join(names)}," if len(names) > 1 else ""
            raise InputError(
                f"mos: rank={r} needs rank - private_rank = {r - p} public vectors in every block, "
                f"but {pool!r}{by} has (equivalent_rank - private_rank) * num_layers = {e - p} * "
                f"{num_layers} = {public} of them; lower rank or raise equivalent_rank"
            )
        pools.append(
            Pool(
                pool,
                width,
                PoolLayout(num_layers, e, r, p, shards, own if differ(own) else None),
                blocks,
            )
        )
    return pools


def _sharers(sites: Sites, side: Side, scope: Scope) -> dict[str, list[str]]:
    """The names of the site types that share a pool, by the pool's name."""
    if scope == "site_type":
        return {name: [name] for name in sites}
    by_width: dict[int, list[str]] = {}
    # Sorted, so that a pool does not depend on the order of `sites`.
    for name in sorted(sites):
        by_width.setdefault(_width(sites, name, side), []).append(name)
    found = {}
    for width, names in by_width.items():
        shared = f"width_{width}"
        if len(names) > 1 and shared in sites:
            raise InputError(
                f"mos: site type {shared!r} has the name of the pool that {', '.join(names)} "
                "share; rename it or use pool_scope='site_type'"
            )
        found[shared if len(names) > 1 else names[0]] = names
    return found


def _width(sites: Sites, name: str, side: Side) -> int:
    return sites[name].d_in if side == "a" else sites[name].d_out


@strict
def assemble(pool: jax.Array, table: jax.Array) -> jax.Array:
    """Puts rank vectors together from shards (the paper's equation for A^k and B^k).

    Args:
      pool: fp32 [S, w], S shards of width w; of a server also bf16 as its bits, see `bits.py`.
      table: int32 [..., r, l], which shard stands at which position; any leading axes, so that
        all blocks at once and one block are the same function.

    Returns:
      fp32 [..., r, l * w].
    """
    # The indices were checked when the table was drawn or loaded.
    shards = from_bits(pool.at[table].get(mode="promise_in_bounds"))
    whole = shards.reshape(*table.shape[:-1], table.shape[-1] * pool.shape[-1])
    return whole.astype(jnp.float32)
