"""Keys and values of the tokens seen so far, and attention over them.

The cache is read in blocks of slots, with the softmax taken along (as in FlashAttention, arXiv
2205.14135), and only as far as the longest row needs. What a block adds to a row that cannot see it
is exactly nothing, so a row's result does not depend on how long the others are.

Axis legend: B rows, S new tokens of a row, L blocks (layers), T slots, t slots of one block of the
cache, H query heads, K key and value heads, G = H / K, c head width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mos_jax.adapters.bits import as_bits, from_bits

# Slots read at a time. Fewer would be more steps of a loop, more would be more slots in vain.
BLOCK = 128
_MASKED = -1e30

# Largest score, sum of weights, and weighted sum of values so far: fp32 [B, K, G S, 1], the same,
# and fp32 [B, K, G S, c].
Index = tuple[jax.Array, ...]
_Softmax = tuple[jax.Array, jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far: both [L, B, K, T, c]; slot = position.

    Those of a base in bfloat16 lie as their bits, see `bits.py`.
    """

    k: jax.Array
    v: jax.Array

    @property
    def slots(self) -> int:
        """T, how many positions a row has."""
        return self.k.shape[3]

    def enter(
        self, k: jax.Array, v: jax.Array, start: jax.Array, row: jax.Array | None = None
    ) -> Cache:
        """Enters keys and values of new tokens.

        Args:
          k: [L, B, S, K, c].
          v: [L, B, S, K, c].
          start: int32 [B], the slot of each row's first; from T on nothing is entered.
          row: int32 []: the one row, B = 1, that they are of, which has room for them.
        """
        if row is not None:
            zero = jnp.int32(0)
            at = (zero, row, zero, start[0], zero)
            return Cache(
                put_part(self.k, k.swapaxes(2, 3), at), put_part(self.v, v.swapaxes(2, 3), at)
            )
        batch, length = k.shape[1:3]
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        slots = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]

        def put(whole: jax.Array, new: jax.Array) -> jax.Array:
            new = new.transpose(1, 2, 0, 3, 4)  # the indexed axes come first
            at = whole.at[:, rows, :, slots]
            return at.set(as_bits(new), mode="drop", unique_indices=True)

        return Cache(put(self.k, k), put(self.v, v))


def take_part(whole: jax.Array, at: Index, shape: tuple[int, ...]) -> jax.Array:
    """A part of a cache's array that begins at `at`."""
    return from_bits(jax.lax.dynamic_slice(whole, at, shape))


def put_part(whole: jax.Array, part: jax.Array, at: Index) -> jax.Array:
    """A cache's array with a part overwritten that begins at `at`."""
    return jax.lax.dynamic_update_slice(whole, as_bits(part), at)


def attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    layer: jax.Array,
    row: jax.Array,
    start: jax.Array,
    reach: jax.Array,
    scale: float | None = None,
) -> jax.Array:
    """Attention of new tokens over a cache, which does not hold them yet, and over themselves.

    Args:
      q: [B, S, H, c].
      k: [B, S, K, c], of the new tokens.
      v: [B, S, K, c], of the new tokens.
      cache_k: [L, rows, K, T, c].
      cache_v: [L, rows, K, T, c].
      layer: int32 [].
      row: int32 [], which of the cache's rows is the first of the B.
      start: int32 [B], position of each row's first token; it sees the slots before it.
      reach: int32 [], a token sees those less than so many positions before it.
      scale: factor of the scores; None is c ** -0.5.

    Returns:
      [B, S, H, c]. Of slots that a row does not see, nothing matters, not even NaN.
    """
    batch, length, heads, width = q.shape
    shared = k.shape[2]
    groups = heads // shared
    scale = width**-0.5 if scale is None else scale
    q = q.reshape(batch, length, shared, groups, width).transpose(0, 2, 3, 1, 4)
    q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, shared, groups * length, width)

    def weigh(k: jax.Array, v: jax.Array, mask: jax.Array, before: _Softmax | None) -> _Softmax:
        """Takes in keys and values [B, K, t, c] that queries see by `mask`, bool [B, S, t]."""
        every = jnp.tile(mask, (1, groups, 1))[:, None]
        scores = jnp.einsum("bkqc,bktc->bkqt", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(every, scores, jnp.float32(_MASKED))
        top = jnp.max(scores, axis=-1, keepdims=True)
        top = top if before is None else jnp.maximum(top, before[0])
        # Not left to exp: what is masked weighs exactly 0, whatever the largest score is.
        weights = jnp.where(every, jnp.exp(scores - top), jnp.float32(0))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        found = jnp.einsum(
            "bkqt,bktc->bkqc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        if before is None:
            return top, total, found
        shrunk = jnp.exp(before[0] - top)
        return top, before[1] * shrunk + total, before[2] * shrunk + found

    index = jnp.arange(length, dtype=jnp.int32)
    apart = index[:, None] - index[None, :]
    near = jnp.broadcast_to((apart >= 0) & (apart < reach), (batch, length, length))
    own = weigh(k.swapaxes(1, 2), v.swapaxes(1, 2), near, None)

    slots = cache_k.shape[3]
    size = min(BLOCK, slots)
    positions = start[:, None] + index[None, :]

    def block(number: jax.Array, before: _Softmax) -> _Softmax:
        # The last block may lie over the one before it, of which nothing is taken twice.
        first = jnp.minimum(number * size, slots - size)
        slot = first + jnp.arange(size, dtype=jnp.int32)
        held = (slot[None, :] < start[:, None]) & (slot[None, :] >= number * size)
        near = positions[:, :, None] - slot[None, None, :] < reach
        zero = jnp.int32(0)
        at, shape = (layer, row, zero, first, zero), (1, batch, shared, size, width)
        k, v = take_part(cache_k, at, shape)[0], take_part(cache_v, at, shape)[0]
        # What another request left in these slots may not even be finite, and 0 x NaN is NaN.
        v = jnp.where(held[:, None, :, None], v, jnp.zeros((), v.dtype))
        return weigh(k, v, held[:, None, :] & near, before)

    # From the first slot that any row can see to the last.
    oldest = jnp.min(jnp.where(start > 0, start, slots)) - reach + 1
    low = jnp.clip(oldest, 0, slots) // size
    high = (jnp.max(start) + size - 1) // size
    _, total, found = jax.lax.fori_loop(low, high, block, own)
    attended = (found / total).reshape(batch, shared, groups, length, width)
    attended = attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
    return attended.astype(v.dtype)
