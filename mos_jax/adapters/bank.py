"""Several named adapters on one base, in arrays of fixed shape.

A bank has K slots for adapters and one of zeros, which is the base. Adapters of any methods lie in
it side by side as `LowRank` factors, padded with rows of zeros to the bank's rank and with zeros
where they adapt nothing. Which slot a row of a batch uses is an int32 array, so that adding,
swapping and activating adapters and mixing them in a batch all run the program compiled once.

Axis legend: L adapted blocks, B rows of a batch, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.bits import from_bits
from mos_jax.adapters.factor_slots import BankFactors, FactorSlots, positions
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import Sites, SiteShape, check_sites
from mos_jax.errors import InputError, suggest

BASE_NAME = "__base__"


class AdapterBank:
    """Named adapters in fixed slots, of which one can be active and a batch can mix any.

    The arrays are allocated once: `nbytes` of device memory, whatever comes and goes. A change
    overwrites one slot where it lies, so that factors handed out before it, by `for_rows` or
    `active_factors`, are gone with it (JAX then says that an array has been deleted): ask again.
    """

    def __init__(
        self, sites: Sites, *, slots: int, rank: int | Mapping[str, int], dtype: str = "float32"
    ):
        """Allocates an empty bank, with nothing active.

        Raises:
          InputError: for malformed sites, an unknown dtype, or numbers that are not positive.
        """
        self._store = FactorSlots(sites, slots=slots, rank=rank, dtype=dtype)
        self._slot = {BASE_NAME: 0}
        # Of each adapter, what it was before it was padded: shapes by site type.
        self._extent: dict[str, dict[str, LowRank]] = {}
        self._active = BASE_NAME

    @classmethod
    def holding(
        cls,
        sites: Sites,
        adapters: Mapping[str, Adapter | Mapping[str, LowRank]],
        *,
        dtype: str = "float32",
    ) -> Self:
        """The smallest bank for some adapters, with them in it.

        Args:
          sites: all sites of the base; the bank has those of them that some adapter changes.
          adapters: by name, adapters or their factors.
          dtype: of the bank.

        Raises:
          InputError: for no adapters, or as `add` does.
        """
        if not adapters:
            raise InputError("no adapters for a bank: give at least one, by name")
        sites = check_sites(sites)
        factors = {name: _factors_of(name, adapter) for name, adapter in adapters.items()}
        rank: dict[str, int] = {}
        for own in factors.values():
            for name, f in own.items():
                rank[name] = max(f.rank, rank.get(name, 0))
        for name in rank:
            if name not in sites:
                raise InputError(f"factors for unknown site {name!r}; {suggest(name, sites)}")
        chosen = {name: site for name, site in sites.items() if name in rank}
        bank = cls(chosen, slots=len(adapters), rank=rank, dtype=dtype)
        for name, own in factors.items():
            bank.add(name, own)
        return bank

    @property
    def sites(self) -> dict[str, SiteShape]:
        """What adapters in it may change."""
        return self._store.sites

    @property
    def slots(self) -> int:
        """How many adapters it holds at most."""
        return self._store.slots

    @property
    def rank(self) -> dict[str, int]:
        """By site type, the largest rank that fits."""
        return self._store.rank

    @property
    def dtype(self) -> str:
        """Of the factors at rest, "float32" or "bfloat16"; scales are fp32."""
        return self._store.dtype

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in it, in the order they came."""
        return tuple(self._extent)

    @property
    def active(self) -> str | None:
        """Name of the active adapter, None when there is none."""
        return None if self._active == BASE_NAME else self._active

    @property
    def nbytes(self) -> int:
        """Bytes on the device, all slots and the base's zeros."""
        return self._store.nbytes

    def summary(self) -> dict[str, Any]:
        """Size and use as JSON values; `slot_bytes` are those of one adapter."""
        return {
            "slots": self.slots,
            "used": len(self.names),
            "rank": dict(self.rank),
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "slot_bytes": self.nbytes // (self.slots + 1),
            "active": self.active,
        }

    def add(self, name: str, adapter: Adapter | Mapping[str, LowRank]) -> None:
        """Enters an adapter, or its factors, under a new name.

        Args:
          name: not empty, not "__base__", without "/".
          adapter: of any method. Its sites, blocks and ranks must fit the bank; where it has none
            or a lower rank, zeros stand.

        Raises:
          InputError: for a name that is malformed or taken, factors that do not fit or are not
            finite, or a bank that is full. Nothing has changed then.
        """
        check_name(name)
        if name in self._slot:
            raise InputError(f"{name!r} is in the bank already; replace() swaps it")
        free = set(range(1, self.slots + 1)) - set(self._slot.values())
        if not free:
            raise InputError(
                f"the bank has {self.slots} slots, all in use ({', '.join(self.names)}); delete "
                f"one, or take resized(slots={self.slots + 1})"
            )
        self._put(name, min(free), adapter)

    def replace(self, name: str, adapter: Adapter | Mapping[str, LowRank]) -> None:
        """Swaps the adapter `name` for another, of any method, which is active if that one was.

        Raises:
          InputError: for an unknown name, or as `add` does. Nothing has changed then.
        """
        self._put(name, self._slot_of(name), adapter)

    def delete(self, name: str) -> None:
        """Takes the adapter `name` out; its slot is zeros again.

        Raises:
          InputError: for an unknown name, or the active one: disable it or activate another first.
        """
        slot = self._slot_of(name)
        if name == self._active:
            raise InputError(f"{name!r} is active; disable() or activate another before deleting")
        self._store.write(slot, self._store.padded(name, {}))
        del self._slot[name], self._extent[name]

    def activate(self, name: str) -> None:
        """Makes `name` the adapter that `active_factors` gives. Raises InputError if unknown."""
        self._slot_of(name)
        self._active = name

    def disable(self) -> None:
        """Makes `active_factors` those of the base."""
        self._active = BASE_NAME

    @property
    def active_factors(self) -> BankFactors:
        """Factors of the active adapter for all rows; zeros, hence the base, when disabled."""
        return self._store.rows(np.asarray(self._slot[self._active]))

    def for_rows(self, names: Sequence[str]) -> BankFactors:
        """Factors for a batch in which row i uses the adapter `names[i]`.

        Args:
          names: one for each row, any of them as often as needed; "__base__" for the base alone.

        Raises:
          InputError: for no rows or an unknown name.
        """
        if isinstance(names, str) or not len(names):
            raise InputError(f"for_rows needs a list of names, one for each row, got {names!r}")
        slots = [0 if name == BASE_NAME else self._slot_of(name) for name in names]
        return self._store.rows(np.asarray(slots))

    def get(self, name: str) -> dict[str, LowRank]:
        """The factors of `name` as they were added, rounded to the bank's dtype.

        Returns:
          By site type, a fp32 [L, r, h], b fp32 [L, r, o], scale fp32 [L], with the adapter's own
          ranks and blocks: to merge, export or combine.

        Raises:
          InputError: for an unknown name.
        """
        slot, factors = self._slot_of(name), {}
        for site, own in self._extent[name].items():
            f = self._store.factors[site]
            a, b, scale = (from_bits(np.asarray(x[:, slot])) for x in (f.a, f.b, f.scale))
            rows = positions(self.sites[site], own.layers)
            factors[site] = dataclasses.replace(
                own,
                a=jnp.asarray(a[rows, : own.rank].astype(np.float32)),
                b=jnp.asarray(b[rows, : own.rank].astype(np.float32)),
                scale=jnp.asarray(scale[rows]),
            )
        return factors

    def resized(
        self, *, slots: int | None = None, rank: int | Mapping[str, int] | None = None
    ) -> AdapterBank:
        """A new bank of another size with the same adapters, of which the same is active.

        Programs that ran with this bank are compiled again for the new one, and until this one is
        dropped both are in memory.

        Raises:
          InputError: if the adapters do not fit.
        """
        bank = AdapterBank(
            self.sites,
            slots=self.slots if slots is None else slots,
            rank=self.rank if rank is None else rank,
            dtype=self.dtype,
        )
        for name in self.names:
            bank.add(name, self.get(name))
        bank._active = self._active
        return bank

    def _slot_of(self, name: str) -> int:
        if name not in self._extent:
            raise InputError(f"no adapter {name!r} in the bank; {suggest(str(name), self.names)}")
        return self._slot[name]

    def _put(self, name: str, slot: int, adapter: Adapter | Mapping[str, LowRank]) -> None:
        factors = _factors_of(name, adapter)
        self._store.write(slot, self._store.padded(name, factors))
        self._slot[name] = slot
        self._extent[name] = jax.eval_shape(lambda: dict(factors))


def _factors_of(name: str, adapter: Adapter | Mapping[str, LowRank]) -> Mapping[str, LowRank]:
    factors = adapter.factors() if isinstance(adapter, Adapter) else adapter
    if (
        not isinstance(factors, Mapping)
        or not factors
        or not all(isinstance(f, LowRank) for f in factors.values())
    ):
        raise InputError(
            f"{name!r} must be an adapter or factors by site type, adapter.factors(), got "
            f"{factors!r}"
        )
    return factors


def check_name(name: str) -> None:
    """Raises InputError unless `name` can be that of an adapter in a bank."""
    if not isinstance(name, str) or not name.strip() or "/" in name or name == BASE_NAME:
        raise InputError(
            "the name of an adapter must be a string that is not empty, has no '/' and is not "
            f"{BASE_NAME!r}, the base itself; got {name!r}"
        )
