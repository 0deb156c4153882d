"""Beginnings of prompts that were computed before, by tenant, kept on the device.

A prompt is computed in pieces; those of the largest size are kept. What a piece's keys and values
are depends on the tenant and on all tokens before, so a piece is found by exactly these: from the
tenant's root through the pieces before it. Nothing is found by a hash alone, and nothing across
tenants.

Axis legend: L layers, N pieces kept, K key and value heads, P tokens of a piece, c head width.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mos_jax.errors import InputError
from mos_jax.models.decoder import Decoder
from mos_jax.models.kv_cache import Cache, put_part, take_part


@dataclasses.dataclass(eq=False)
class Node:
    """A piece that is kept, or the root of a tenant, with the pieces that follow it.

    Attributes:
      parent: the piece before; None for a root.
      tokens: as bytes.
      slot: where its keys and values lie.
      held: whether it can still be found.
      next: by their tokens.
      registration: of a root, that of its tenant.
    """

    parent: Node | None
    tokens: bytes
    slot: int
    held: bool = True
    next: dict[bytes, Node] = dataclasses.field(default_factory=dict)
    registration: int = 0


class Prefixes:
    """Pieces in slots on the device; the one used longest ago gives way.

    A piece is always used later than those that follow it, so what gives way has none behind it.

    Attributes:
      size: P.
      slots: N.
      counts: "hits" and "misses" of prompts that have a whole piece, "tokens" found, pieces "kept",
        and "evictions".
    """

    def __init__(self, model: Decoder, size: int, limit: int):
        """Allocates as many slots as fit into `limit` bytes, empty.

        Raises:
          InputError: if not one does.
        """
        one = jax.eval_shape(lambda: model.empty_cache(1, size))
        piece = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))
        self.size, self.slots = size, limit // piece
        if not self.slots:
            raise InputError(
                f"prefix_bytes = {limit} holds no piece of {size} tokens, which takes {piece} "
                "bytes; raise it, or set it to 0 for no prefix cache"
            )
        self._store = model.empty_cache(self.slots, size)
        self._free = list(range(self.slots - 1, -1, -1))
        self._roots: dict[str, Node] = {}
        self._used: collections.OrderedDict[Node, str] = collections.OrderedDict()
        self.counts = dict.fromkeys(("hits", "misses", "tokens", "kept", "evictions"), 0)

    @property
    def nbytes(self) -> int:
        """Bytes on the device; they never change."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._store))

    def find(self, tenant: str, tokens: np.ndarray, registration: int = 0) -> list[Node]:
        """The longest chain of whole pieces at the start of int32 tokens; its root comes first.

        Pieces of another registration of the tenant, whose weights may differ, are dropped.
        """
        root = self._roots.get(tenant)
        if root is not None and root.registration != registration:
            self.forget(tenant)
            root = None
        if root is None:
            root = self._roots[tenant] = Node(None, b"", -1, registration=registration)
        chain = [root]
        for start in range(0, len(tokens) - self.size + 1, self.size):
            node = chain[-1].next.get(tokens[start : start + self.size].tobytes())
            if node is None:
                break
            chain.append(node)
        self._touch(chain[-1])
        if len(tokens) >= self.size:
            self.counts["hits" if len(chain) > 1 else "misses"] += 1
        self.counts["tokens"] += self.size * (len(chain) - 1)
        return chain

    def restore(self, cache: Cache, row: int, chain: list[Node]) -> Cache:
        """The cache with a chain's keys and values from the start of a row on."""
        for place, node in enumerate(chain[1:]):
            at = jax.device_put(np.asarray([row, place * self.size, node.slot], np.int32))
            cache = _restore(cache, self._store, at)
        return cache

    def keep(
        self, tenant: str, after: Node, tokens: np.ndarray, cache: Cache, row: int, start: int
    ) -> Node | None:
        """Keeps a piece that was computed.

        Args:
          tenant: whose.
          after: the piece before it, or the tenant's root.
          tokens: int32 [P].
          cache: that holds it.
          row: the cache's row.
          start: the piece's first slot.

        Returns:
          The piece; None if `after` is not held any more, or no slot is left but those of the
          pieces before.
        """
        if not after.held:
            return None
        key = tokens.tobytes()
        self._touch(after)
        if key in after.next:
            self._touch(after.next[key])
            return after.next[key]
        if self._free:
            slot = self._free.pop()
        else:
            oldest = next(iter(self._used))
            if oldest is after:
                return None
            self._drop(oldest)
            self.counts["evictions"] += 1
            slot = self._free.pop()
        node = after.next[key] = Node(after, key, slot)
        self._used[node] = tenant
        self._touch(node)
        self._store = self._copied(cache, row, start, slot)
        self.counts["kept"] += 1
        return node

    def forget(self, tenant: str) -> None:
        """Drops all pieces of a tenant."""
        root = self._roots.pop(tenant, None)
        if root is not None:
            root.held = False
            for node in [node for node, owner in self._used.items() if owner == tenant]:
                self._drop(node)

    def warm_up(self, cache: Cache) -> Cache:
        """Compiles what moves pieces; the cache that it returns holds zeros in row 0."""
        self._store = self._copied(cache, 0, 0, 0)
        return self.restore(cache, 0, [Node(None, b"", -1), Node(None, b"", 0)])

    def summary(self) -> dict[str, Any]:
        """Sizes and counts as JSON values."""
        used = self.slots - len(self._free)
        return {"bytes": self.nbytes, "slots": self.slots, "used": used, **self.counts}

    def _touch(self, node: Node) -> None:
        """Makes it the one used last, but for those before it, up to the root."""
        while node.parent is not None:
            self._used.move_to_end(node)
            node = node.parent

    def _drop(self, node: Node) -> None:
        del self._used[node]
        node.held = False
        self._free.append(node.slot)
        if node.parent is not None:
            del node.parent.next[node.tokens]

    def _copied(self, cache: Cache, row: int, start: int, slot: int) -> Cache:
        at = jax.device_put(np.asarray([row, start, slot], np.int32))
        return _keep(self._store, cache, at)


# Where a piece lies in the cache and among those kept: row, first slot, and slot: int32 [3].
@functools.partial(jax.jit, donate_argnums=0)
def _keep(store: Cache, cache: Cache, at: jax.Array) -> Cache:
    zero = jnp.int32(0)

    def copy(whole: jax.Array, rows: jax.Array) -> jax.Array:
        shape = (whole.shape[0], 1, *whole.shape[2:])
        piece = take_part(rows, (zero, at[0], zero, at[1], zero), shape)
        return put_part(whole, piece, (zero, at[2], zero, zero, zero))

    return jax.tree.map(copy, store, cache)


@functools.partial(jax.jit, donate_argnums=0)
def _restore(cache: Cache, store: Cache, at: jax.Array) -> Cache:
    zero = jnp.int32(0)

    def copy(rows: jax.Array, whole: jax.Array) -> jax.Array:
        shape = (whole.shape[0], 1, *whole.shape[2:])
        piece = take_part(whole, (zero, at[2], zero, zero, zero), shape)
        return put_part(rows, piece, (zero, at[0], zero, at[1], zero))

    return jax.tree.map(copy, cache, store)
