"""Tenants that are known, their kinds, and slabs with the slots of those on the device."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from mos_jax.adapters.sites import Sites, SiteShape
from mos_jax.errors import InputError
from mos_jax.serving.assembled import AssembledCache
from mos_jax.serving.kinds import Kind, read_factors, read_tenant_arrays
from mos_jax.serving.options import BankOptions
from mos_jax.serving.slabs import FactorSlab, PoolSlab, Slab
from mos_jax.serving.slots import Slots

# The key of the slab of all that have none of their own.
FACTORS = "factors"


@dataclasses.dataclass(frozen=True)
class Tenant:
    """A known tenant.

    Attributes:
      name: its name.
      folder: of its adapter.
      kind: its kind.
      slab: the key of its slab.
      digest: of what the folder held when it was registered.
      number: how many were registered before it, of any name.
    """

    name: str
    folder: Path
    kind: Kind
    slab: str
    digest: str
    number: int


class KnownKinds:
    """The kinds of the tenants that are registered, and how many each has."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[Kind, str]] = {}
        self._tenants: collections.Counter[str] = collections.Counter()

    def __len__(self) -> int:
        """Number of kinds."""
        return len(self._kinds)

    def __iter__(self) -> Iterator[tuple[Kind, str]]:
        """The kinds, each with the key of its slab."""
        return iter(self._kinds.values())

    def get(self, key: str) -> Kind | None:
        """The kind of this key, if there is one."""
        found = self._kinds.get(key)
        return found[0] if found is not None else None

    def place(
        self, name: str, kind: Kind, lanes: Mapping[str, Lane] | None, options: BankOptions
    ) -> tuple[Kind, str]:
        """The kind of a tenant as it is to be kept, and its slab; see `choose_slab`."""
        if kind.key in self._kinds:
            return self._kinds[kind.key]
        slab = choose_slab(name, kind, self, lanes, options)
        # Only a slab of pools needs routing tables, which lie on the device.
        return (dataclasses.replace(kind, template=None) if slab == FACTORS else kind), slab

    def enter(self, tenant: Tenant) -> None:
        """One more tenant of its kind."""
        self._kinds.setdefault(tenant.kind.key, (tenant.kind, tenant.slab))
        self._tenants[tenant.kind.key] += 1

    def leave(self, tenant: Tenant, is_open: bool) -> None:
        """One fewer; once a bank is open, the last takes its kind along, unless it has a slab."""
        key = tenant.kind.key
        self._tenants[key] -= 1
        # A slab of a kind's own is there for good, and so is all that finds it.
        if not self._tenants[key] and is_open and tenant.slab == FACTORS:
            del self._tenants[key], self._kinds[key]


@dataclasses.dataclass
class Lane:
    """A slab and who has its slots."""

    slab: Slab
    slots: Slots

    def read(self, tenant: Tenant, sites: Sites, base_fingerprint: str | None) -> Any:
        """A tenant's slot on the host. Raises InputError if its folder is damaged or changed."""
        slab, folder = self.slab, tenant.folder
        if isinstance(slab, PoolSlab):
            arrays = read_tenant_arrays(tenant.kind, tenant.digest, folder, sites, base_fingerprint)
            return slab.entry(arrays)
        factors = read_factors(tenant.digest, folder, sites, base_fingerprint)
        return slab.entry(tenant.name, factors)

    def warm_up(self, cache: AssembledCache | None) -> None:
        """Compiles what places a tenant, and what assembles it for a cache."""
        # Zeros over zeros; as the loader does, from the device.
        self.slab.write(0, jax.device_put(self.slab.blank()))
        if cache is not None:
            cache.warm_up(self.slab)

    def summary(self) -> dict[str, Any]:
        """Sizes and counts as JSON values."""
        return {
            "form": "factors" if isinstance(self.slab, FactorSlab) else "pools",
            "slots": self.slots.count,
            "resident": self.slots.resident,
            "in_use": self.slots.in_use,
            "evictions": self.slots.evictions,
            "bytes": self.slab.nbytes,
            "slot_bytes": self.slab.slot_bytes,
        }


def choose_slab(
    name: str,
    kind: Kind,
    known: Iterable[tuple[Kind, str]],
    lanes: Mapping[str, Lane] | None,
    options: BankOptions,
) -> str:
    """The slab of a new kind's tenants: one of its own for MoS, as long as there may be more.

    Args:
      name: of the kind's first tenant.
      kind: the new kind.
      known: the kinds there are, each with its slab.
      lanes: what was allocated; None as long as nothing was.
      options: sizes.

    Raises:
      InputError: if there is none, and the factors do not fit.
    """
    own = sum(slab != FACTORS for _, slab in known)
    if kind.template is not None and lanes is None and own < options.max_slabs:
        return kind.key
    if lanes is None:
        return FACTORS
    room = lanes[FACTORS].slab.rank if FACTORS in lanes else {}
    for site, rank in kind.ranks.items():
        if rank > room.get(site, 0):
            raise InputError(
                f"{name!r} has factors of rank {rank} at {site!r}, and the open bank room for "
                f"{room.get(site, 0)}; register it before the bank is opened, or open it with "
                f"factor_rank={max(kind.ranks.values())}"
            )
    return FACTORS


def allocate(
    kinds: Iterable[tuple[Kind, str]], sites: Sites, options: BankOptions
) -> tuple[dict[str, Lane], AssembledCache | None]:
    """All that a bank will ever hold on the device.

    Args:
      kinds: of the tenants, each with the key of its slab.
      sites: of the base.
      options: sizes.

    Returns:
      Slabs by their keys, and the cache of assembled factors where there is one.
    """
    lanes: dict[str, Lane] = {}
    adapted: dict[str, SiteShape] = {}
    ranks: dict[str, int] = {}
    if options.factor_rank:
        adapted, ranks = dict(sites), dict.fromkeys(sites, options.factor_rank)
    for kind, key in kinds:
        if key == FACTORS:
            for name, rank in kind.ranks.items():
                adapted[name] = sites[name]
                ranks[name] = max(rank, ranks.get(name, 0))
        elif kind.template is not None:
            slab = PoolSlab(kind.template, options.slots, options.dtype)
            lanes[key] = Lane(slab, Slots(options.slots, "this kind of MoS"))
    if adapted:
        store = FactorSlab(adapted, options.slots, ranks, options.dtype)
        lanes[FACTORS] = Lane(store, Slots(options.slots, "tenants held as factors"))
    slabs = [lane.slab for lane in lanes.values()]
    # Factors alone are ready to be gathered where they lie.
    if options.assembly == "cached" and any(isinstance(slab, PoolSlab) for slab in slabs):
        return lanes, AssembledCache(sites, slabs, options.cached, options.dtype)
    return lanes, None


def planned_bytes(kinds: Iterable[tuple[Kind, str]], sites: Sites, options: BankOptions) -> int:
    """Bytes that `allocate` would take, from shapes alone; nothing is allocated."""

    def arrays() -> list[Any]:
        lanes, cache = allocate(kinds, sites, options)
        slabs: list[Slab] = [lane.slab for lane in lanes.values()]
        held: list[Any] = [
            (slab.source.params, slab.source.frozen) if isinstance(slab, PoolSlab) else slab.source
            for slab in slabs
        ]
        return [*held, cache.source] if cache is not None else held

    shapes = jax.tree.leaves(jax.eval_shape(arrays))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)
