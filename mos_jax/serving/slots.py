"""Which tenant has which slot: pins, and the one used longest ago gives way.

Nothing here looks at all tenants: every operation is a few dictionary operations, however many are
known.
"""

from __future__ import annotations

import collections

from mos_jax.errors import InputError


class SlotsTaken(InputError):
    """All slots belong to tenants in use; one will be free when a tenant is released."""


class Slots:
    """Slots 1 to `count`, some of them held for tenants in use, others keeping one for the next.

    A tenant in use holds a slot or a promise of one; not more tenants are in use than there are
    slots, so that a promise is always kept and nobody in use ever gives way.

    Attributes:
      count: number of slots.
      evictions: how often a tenant gave way to another.
    """

    def __init__(self, count: int, what: str):
        self.count, self._what = count, what
        self.evictions = 0
        self._free = list(range(count, 0, -1))
        self._place: dict[str, int] = {}
        self._pins: dict[str, int] = {}
        # Held by nobody, the one used longest ago first.
        self._idle: collections.OrderedDict[str, None] = collections.OrderedDict()

    def place_of(self, name: str) -> int | None:
        """The slot of a tenant, None where it has none."""
        return self._place.get(name)

    def pins(self, name: str) -> int:
        """How many uses a tenant has."""
        return self._pins.get(name, 0)

    @property
    def in_use(self) -> int:
        """Number of tenants in use."""
        return len(self._pins)

    @property
    def resident(self) -> int:
        """Number of tenants that have a slot."""
        return len(self._place)

    def pin(self, name: str) -> None:
        """One more use of a tenant, with a slot or a promise of one.

        Raises:
          SlotsTaken: if as many other tenants are in use as there are slots.
        """
        if name not in self._pins and len(self._pins) == self.count:
            raise SlotsTaken(
                f"no slot for {name!r}: all {self.count} slots of {self._what} belong to tenants "
                "in use, which never give way; wait until one is released, or make more slots"
            )
        self._pins[name] = self._pins.get(name, 0) + 1
        self._idle.pop(name, None)

    def unpin(self, name: str) -> None:
        """One use less; after the last a tenant keeps its slot until another needs it."""
        self._pins[name] -= 1
        if not self._pins[name]:
            del self._pins[name]
            if name in self._place:
                self._idle[name] = None

    def give(self, name: str) -> int:
        """A slot for a tenant in use that has none: a free one, or that of the one idle longest."""
        if self._free:
            slot = self._free.pop()
        else:
            # In use are at most as many as there are slots, and `name` is one of them.
            idle, _ = self._idle.popitem(last=False)
            slot = self._place.pop(idle)
            self.evictions += 1
        self._place[name] = slot
        return slot

    def forget(self, name: str) -> None:
        """Frees the slot of a tenant that is not in use, if it has one."""
        if name in self._place:
            self._free.append(self._place.pop(name))
            self._idle.pop(name, None)
