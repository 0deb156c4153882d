"""Attention over keys and values, of a text or of a cache.

Axis legend: B rows, S queries of a row, T keys, H query heads, K key and value heads, c head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float | None = None
) -> jax.Array:
    """Grouped-query attention (arXiv 2305.13245), softmax in fp32.

    Args:
      q: [B, S, H, c].
      k: [B, T, K, c].
      v: [B, T, K, c].
      mask: bool [B, S, T]; True where a query may see a key. Every query must see one.
      scale: factor of the scores; None is c ** -0.5.

    Returns:
      [B, S, H, c].
    """
    batch, length, heads, width = q.shape
    slots, shared = k.shape[1], k.shape[2]
    groups = heads // shared
    # One product for each key head, its queries stacked: on CPU twice as fast as einsum's layout.
    q = q.reshape(batch, length, shared, groups, width).transpose(0, 2, 3, 1, 4)
    scale = width**-0.5 if scale is None else scale
    q = (q * jnp.asarray(scale, q.dtype)).reshape(batch * shared, groups * length, width)
    k = k.transpose(0, 2, 1, 3).reshape(batch * shared, slots, width)
    v = v.transpose(0, 2, 1, 3).reshape(batch * shared, slots, width)
    scores = jnp.einsum("bqc,btc->bqt", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, shared, groups, length, slots)
    scores = jnp.where(mask[:, None, None], scores, jnp.float32(-1e30))
    # Divided after the product with v, which is smaller than the scores. The shift cancels out.
    shift = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - shift)
    total = jnp.sum(weights, axis=-1).reshape(batch * shared, groups * length, 1)
    weights = weights.astype(v.dtype).reshape(batch * shared, groups * length, slots)
    attended = jnp.einsum("bqt,btc->bqc", weights, v, preferred_element_type=jnp.float32) / total
    attended = attended.reshape(batch, shared, groups, length, width).transpose(0, 3, 1, 2, 4)
    return attended.reshape(batch, length, heads, width).astype(v.dtype)
