"""Requests that wait, by tenant, and whose turn it is.

Tenants that have requests waiting stand in a ring, and each turn admits one request of the tenant
in front, who then goes to the back. A tenant that comes is put at the back: before its first
request at most one of each tenant that was waiting already is admitted, however many they have.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A ring of tenants, each with its own queue. Single operations cost the same at any size."""

    def __init__(self) -> None:
        self._ring: collections.OrderedDict[str, collections.deque[T]] = collections.OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        """How many wait, of all tenants."""
        return self._size

    def __contains__(self, tenant: object) -> bool:
        """Whether anything of a tenant waits."""
        return tenant in self._ring

    @property
    def tenants(self) -> int:
        """How many tenants have something waiting."""
        return len(self._ring)

    def waiting(self, tenant: str) -> int:
        """How many wait, of one tenant."""
        return len(self._ring.get(tenant, ()))

    def push(self, tenant: str, item: T) -> None:
        """Puts an item behind the others of its tenant; a new tenant goes to the back."""
        self._ring.setdefault(tenant, collections.deque()).append(item)
        self._size += 1

    def heads(self) -> Iterator[tuple[str, T]]:
        """Each tenant, the one in front first, with its first item; change nothing meanwhile."""
        for tenant, items in self._ring.items():
            yield tenant, items[0]

    def take(self, tenant: str) -> T:
        """Takes a tenant's first item out; the tenant goes to the back, if it has more."""
        items = self._ring[tenant]
        item = items.popleft()
        self._size -= 1
        if items:
            self._ring.move_to_end(tenant)
        else:
            del self._ring[tenant]
        return item

    def remove(self, tenant: str, item: T) -> bool:
        """Takes an item out wherever it stands; its tenant keeps its turn. False if it is none."""
        items = self._ring.get(tenant)
        if items is None or item not in items:
            return False
        items.remove(item)
        self._size -= 1
        if not items:
            del self._ring[tenant]
        return True
