"""What lies on the device: tenants' arrays stacked in slots, and the factors of a batch's rows.

A *slab* holds tenants of one kind. Those of MoS with one configuration and one routing table lie in
a `PoolSlab`: their pools and nothing else. All others lie in a `FactorSlab`, as factors. The rows
of a batch may be of several slabs: each is in slot 0, which is zeros, of all slabs but its own, so
that the sum over slabs is exactly its own factors.

Axis legend: L adapted blocks, K slots, slot 0 included, B rows of a batch, S shards of a pool,
w = shard width, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mos_jax.adapters.adapter import Frozen
from mos_jax.adapters.bits import as_bits, dtype_at_rest, from_bits
from mos_jax.adapters.factor_slots import (
    DTYPES,
    FactorSlots,
    check_dtype,
    positions,
    set_slot,
)
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.mos import MoS
from mos_jax.adapters.pools import SIDES
from mos_jax.adapters.sites import Sites, SiteShape
from mos_jax.adapters.storage import adapter_arrays
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError

Factors = dict[str, LowRank]
Rows = Callable[[jax.Array], Factors]
# The arrays of a MoS adapter that are pools; its other trained arrays are small.
POOLS = ("pool_a", "pool_b")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoolRows:
    """Rows of a batch that are assembled inside the scan, straight from the slab.

    Attributes:
      params: trained arrays of all slots, each [K, ...] by the path of the adapter's array;
        bfloat16 as its bits, see `bits.py`.
      frozen: what all tenants share, by path: the routing tables.
      slots: int32 [B], the slot of each row.
      graphdef: of the adapter. Static.
      shards: by the path of a routing table, S of its pool. Static.
    """

    params: dict[tuple[str, ...], jax.Array]
    frozen: dict[tuple[str, ...], jax.Array]
    slots: jax.Array
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    shards: tuple[tuple[tuple[str, ...], int], ...] = dataclasses.field(metadata={"static": True})

    @strict
    def __call__(self, layer: jax.Array | int) -> Factors:
        """Block `layer`'s factors: a fp32 [B, r, h], b fp32 [B, r, o], scale fp32 [B]."""

        def one(slot: jax.Array) -> Factors:
            in_use = (slot > 0).astype(jnp.float32)
            factors = self._adapter(slot).factors(layer)
            return {name: f.scaled(in_use) for name, f in factors.items()}

        return jax.vmap(one)(self.slots)

    @strict
    def whole(self, slot: jax.Array) -> Factors:
        """All blocks' factors of one slot."""
        return self._adapter(slot).factors()

    def _adapter(self, slot: jax.Array) -> MoS:
        """The adapter of one slot, whose pools are those of all slots, one after the other.

        Its tables point into its own part of them. So a row reads the shards that it uses, in one
        gather, and no pool is copied.
        """
        shards = dict(self.shards)
        variables: dict[Any, Any] = {}
        for path, array in self.params.items():
            is_pool = path[0] in POOLS
            own = (
                array.reshape(-1, array.shape[-1])
                if is_pool
                else array.at[slot].get(mode="promise_in_bounds")
            )
            variables[path] = nnx.Param(own)
        for path, array in self.frozen.items():
            offset = slot * jnp.int32(shards[path]) if path in shards else None
            variables[path] = Frozen(array if offset is None else array + offset)
        return nnx.merge(self.graphdef, nnx.from_flat_state(variables))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SummedRows:
    """The sum of several sources, of which at each row all but one are zeros."""

    sources: tuple[Rows, ...]

    @strict
    def __call__(self, layer: jax.Array) -> Factors:
        """Block `layer`'s factors, as wide as the source of the largest rank."""
        total: Factors = {}
        for source in self.sources:
            for name, f in source(layer).items():
                total[name] = _plus(total[name], f) if name in total else f
        return total


def _plus(one: LowRank, other: LowRank) -> LowRank:
    rank = max(one.rank, other.rank)

    def padded(array: jax.Array) -> jax.Array:
        short = rank - array.shape[1]
        return jnp.pad(array.astype(jnp.float32), ((0, 0), (0, short), (0, 0)))

    a, b = (padded(x) + padded(y) for x, y in ((one.a, other.a), (one.b, other.b)))
    return LowRank(a, b, one.scale + other.scale)


class PoolSlab:
    """Pools of MoS tenants that share a configuration, sites and routing tables.

    Attributes:
      sites: what they adapt.
      slots: how many it holds.
      dtype: of the pools at rest; trained scalars are fp32.
    """

    def __init__(self, template: MoS, slots: int, dtype: str = "float32"):
        """Allocates it, empty.

        Args:
          template: an adapter with the tenants' tables; its trained arrays may be abstract.
          slots: how many tenants.
          dtype: "float32" or "bfloat16".

        Raises:
          InputError: for an unknown dtype, or more shards than an index can count.
        """
        check_dtype(dtype)
        self.sites, self.slots, self.dtype = template.sites, slots, dtype
        graphdef, state = nnx.split(template)
        arrays = {tuple(map(str, path)): v for path, v in nnx.to_flat_state(state)}
        pools = [(side, pool) for side in SIDES for pool in template.pools(side)]
        largest = max(pool.shape[0] for _, pool in pools)
        if (slots + 1) * largest > np.iinfo(np.int32).max:
            raise InputError(f"{slots} slots of {largest} shards are more than int32 can count")
        params, frozen = {}, {}
        for path, variable in arrays.items():
            if isinstance(variable, nnx.Param):
                own = dtype_at_rest(DTYPES[dtype]) if path[0] in POOLS else np.float32
                params[path] = jnp.zeros((slots + 1, *variable.get_value().shape), own)
            else:
                frozen[path] = variable[...]
        self._rows = PoolRows(
            params,
            frozen,
            jnp.zeros(1, jnp.int32),
            graphdef,
            tuple(
                ((f"table_{side}", name), pool.shape[0])
                for side, pool in pools
                for name in pool.blocks
            ),
        )
        self.rank = {name: max(ranks) for name, ranks in template.site_ranks.items()}

    @property
    def nbytes(self) -> int:
        """Bytes on the device: all slots, the zeros, and what tenants share."""
        return self.shared_bytes + (self.slots + 1) * self.slot_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes on the device of one tenant."""
        return sum(leaf.nbytes for leaf in self._rows.params.values()) // (self.slots + 1)

    @property
    def shared_bytes(self) -> int:
        """Bytes on the device that all tenants share: routing tables."""
        return sum(leaf.nbytes for leaf in self._rows.frozen.values())

    def entry(self, arrays: Mapping[str, np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
        """One slot's arrays on the host, from those of an adapter on disk.

        Raises:
          InputError: for missing, extra or misshapen arrays, values that are not finite in the
            slab's dtype, or other routing tables than the slab's.
        """
        entry, left = {}, set(arrays)
        named = {**self._rows.params, **self._rows.frozen}
        for path, array in named.items():
            name = "/".join(path)
            if name not in arrays:
                raise InputError(f"array {name!r} is missing")
            left.discard(name)
            trained = path in self._rows.params
            shape = array.shape[1:] if trained else array.shape
            have = arrays[name]
            dtype = np.dtype(np.float32) if trained else array.dtype
            if have.shape != shape or have.dtype != dtype:
                raise InputError(
                    f"array {name!r} must be {dtype} {shape}, got {have.dtype} {have.shape}"
                )
            if not trained:
                if not np.array_equal(have, np.asarray(array)):
                    raise InputError(f"array {name!r} differs from that of the other tenants")
                continue
            values = have.astype(DTYPES[self.dtype] if path[0] in POOLS else np.float32)
            entry[path] = as_bits(values)
            if not np.isfinite(values).all():
                raise InputError(f"array {name!r} holds values that are not finite in {self.dtype}")
        if left:
            raise InputError(f"the arrays are not those of this adapter: extra {sorted(left)}")
        return entry

    def entry_of(self, adapter: MoS) -> dict[tuple[str, ...], np.ndarray]:
        """`entry` of an adapter in memory."""
        return self.entry(adapter_arrays(adapter))

    def blank(self) -> dict[tuple[str, ...], np.ndarray]:
        """An `entry` of zeros."""
        return {p: np.zeros(a.shape[1:], a.dtype) for p, a in self._rows.params.items()}

    def write(self, slot: int, entry: dict[tuple[str, ...], Any]) -> None:
        """Overwrites one slot where it lies; factors handed out before are gone with it."""
        params = _write(self._rows.params, jax.device_put(np.int32(slot)), entry)
        self._rows = dataclasses.replace(self._rows, params=params)

    def rows(self, slots: np.ndarray) -> PoolRows:
        """The factors of rows that use these slots, int32 [B]."""
        return dataclasses.replace(self._rows, slots=jax.device_put(slots.astype(np.int32)))

    @property
    def source(self) -> PoolRows:
        """What `FactorSlab.take` takes a tenant from."""
        return self._rows


@functools.partial(jax.jit, donate_argnums=0)
def _write(
    whole: dict[tuple[str, ...], jax.Array],
    slot: jax.Array,
    entry: dict[tuple[str, ...], Any],
) -> dict[tuple[str, ...], jax.Array]:
    return {path: array.at[slot].set(entry[path]) for path, array in whole.items()}


class FactorSlab:
    """Tenants of any methods as factors, padded with zeros to one rank at each site type."""

    def __init__(self, sites: Sites, slots: int, rank: Mapping[str, int], dtype: str):
        self._store = FactorSlots(sites, slots=slots, rank=rank, dtype=dtype)
        self.sites, self.slots, self.rank = self._store.sites, slots, self._store.rank

    @property
    def nbytes(self) -> int:
        """Bytes on the device, all slots and the zeros."""
        return self._store.nbytes

    @property
    def slot_bytes(self) -> int:
        """Bytes on the device of one tenant."""
        return self._store.nbytes // (self.slots + 1)

    def entry(self, name: str, factors: Mapping[str, LowRank]) -> Factors:
        """One slot's arrays on the host. Raises InputError for factors that do not fit."""
        return self._store.padded(name, factors)

    def blank(self) -> Factors:
        """An `entry` of zeros."""
        return self._store.padded("", {})

    def write(self, slot: int, entry: Factors) -> None:
        """Overwrites one slot where it lies; factors handed out before are gone with it."""
        self._store.write(slot, entry)

    def rows(self, slots: np.ndarray) -> Rows:
        """The factors of rows that use these slots, int32 [B]."""
        return self._store.rows(slots)

    @property
    def source(self) -> Factors:
        """What `take` takes a tenant from."""
        return self._store.factors

    def take(self, at: int, slab: Slab, slot: int) -> None:
        """Overwrites slot `at` with the factors of a tenant of another slab, in one program."""
        self._store.factors = _take(
            self._store.factors,
            slab.source,
            jax.device_put(np.int32(slot)),
            jax.device_put(np.int32(at)),
            tuple(self.sites.items()),
            tuple(self.rank.items()),
            self.dtype,
        )

    @property
    def dtype(self) -> str:
        """Of the factors at rest."""
        return self._store.dtype


@functools.partial(jax.jit, static_argnums=(4, 5, 6), donate_argnums=0)
def _take(
    store: Factors,
    source: PoolRows | Factors,
    slot: jax.Array,
    at: jax.Array,
    sites: tuple[tuple[str, SiteShape], ...],
    ranks: tuple[tuple[str, int], ...],
    dtype: str,
) -> Factors:
    """The store, in its own memory, with the tenant in `slot` of `source` in slot `at`."""
    if isinstance(source, PoolRows):
        factors = source.whole(slot)
    else:
        factors = {
            name: jax.tree.map(lambda x: from_bits(x[:, slot]), f) for name, f in source.items()
        }
    entry = _placed(factors, sites, ranks, dtype)
    return set_slot(store, at, entry)


def _placed(
    factors: Factors,
    sites: tuple[tuple[str, SiteShape], ...],
    ranks: tuple[tuple[str, int], ...],
    dtype: str,
) -> Factors:
    """Factors as the entry of a slot: padded to its ranks, blocks and sites."""
    rank, entry = dict(ranks), {}
    for name, site in sites:
        a = jnp.zeros((site.num_layers, rank[name], site.d_in), DTYPES[dtype])
        b = jnp.zeros((site.num_layers, rank[name], site.d_out), DTYPES[dtype])
        scale = jnp.zeros(site.num_layers, jnp.float32)
        if name in factors:
            f = factors[name]
            at = np.asarray(positions(site, f.layers))
            a = a.at[at, : f.rank].set(f.a.astype(a.dtype))
            b = b.at[at, : f.rank].set(f.b.astype(b.dtype))
            scale = scale.at[at].set(f.scale)
        entry[name] = LowRank(as_bits(a), as_bits(b), scale, site.layers)
    return entry


Slab = PoolSlab | FactorSlab
