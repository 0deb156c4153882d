"""A tenant that is known, and slabs with the slots of those that are on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from mos_jax.adapters.sites import Sites, SiteShape
from mos_jax.errors import InputError
from mos_jax.serving.assembled import AssembledCache
from mos_jax.serving.kinds import Kind
from mos_jax.serving.options import BankOptions
from mos_jax.serving.slabs import FactorSlab, PoolSlab, Slab
from mos_jax.serving.slots import Slots

# The key of the slab of all that have none of their own.
FACTORS = "factors"


@dataclasses.dataclass(frozen=True)
class Tenant:
    """A known tenant: its name, its folder, its kind, and the key of its slab."""

    name: str
    folder: Path
    kind: Kind
    slab: str


@dataclasses.dataclass
class Lane:
    """A slab and who has its slots."""

    slab: Slab
    slots: Slots

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
