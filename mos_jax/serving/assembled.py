"""A cache of assembled factors: bytes of the device for the work of assembling at every step."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from mos_jax.adapters.bank import BASE_NAME
from mos_jax.adapters.sites import Sites, SiteShape
from mos_jax.errors import InputError
from mos_jax.serving.slabs import Factors, FactorSlab, Rows, Slab


class AssembledCache:
    """Factors of the tenants that rows used latest, whichever slab they are of.

    Rows of all slabs are then one gather from one array. Its bytes are those of `slots` tenants as
    factors of the largest rank of any slab, and of the zeros.

    Attributes:
      assembled: how often a tenant entered it.
    """

    def __init__(self, sites: Sites, slabs: Sequence[Slab], slots: int, dtype: str):
        """Allocates it, empty, for tenants of some slabs."""
        ranks: dict[str, int] = {}
        for slab in slabs:
            for name, rank in slab.rank.items():
                ranks[name] = max(rank, ranks.get(name, 0))
        chosen: dict[str, SiteShape] = {name: sites[name] for name in sites if name in ranks}
        self._store = FactorSlab(chosen, slots, {name: ranks[name] for name in chosen}, dtype)
        self._free = list(range(slots, 0, -1))
        self._place: collections.OrderedDict[str, int] = collections.OrderedDict()
        self.assembled = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._store.nbytes

    @property
    def source(self) -> Factors:
        """All that it holds."""
        return self._store.source

    def for_rows(self, names: Sequence[str], places: Mapping[str, tuple[Slab, int]]) -> Rows:
        """Factors for a batch, of whose tenants those that are not here yet are assembled.

        Args:
          names: of each row; "__base__" for none.
          places: slab and slot of all other names.

        Raises:
          InputError: for more tenants than it holds.
        """
        if len(places) > self._store.slots:
            raise InputError(
                f"a batch of {len(places)} tenants does not fit a cache of {self._store.slots}; "
                "raise BankOptions.cached to the largest number of rows"
            )
        for name in places:
            if name in self._place:
                self._place.move_to_end(name)
        for name, (slab, slot) in places.items():
            if name not in self._place:
                # The oldest is none of this batch: those were moved to the end, and all fit.
                at = self._free.pop() if self._free else self._place.popitem(last=False)[1]
                self._place[name] = at
                self._store.take(at, slab, slot)
                self.assembled += 1
        slots = [0 if name == BASE_NAME else self._place[name] for name in names]
        return self._store.rows(np.asarray(slots, np.int32))

    def warm_up(self, slab: Slab) -> None:
        """Compiles what assembles tenants of a slab."""
        self._store.take(0, slab, 0)  # zeros over zeros

    def forget(self, name: str) -> None:
        """Frees the place of a tenant that changed or is gone."""
        if name in self._place:
            self._free.append(self._place.pop(name))
