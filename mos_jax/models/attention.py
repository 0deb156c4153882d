"""Attention over keys and values, of a text or of a cache.

Axis legend: B rows, S queries of a row, T keys, H query heads, K key and value heads, c head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mos_jax.errors import InputError, suggest

# "grouped" is `attend`; "xla" and "cudnn" are implementations of `jax.nn.dot_product_attention`.
IMPLEMENTATIONS = ("auto", "grouped", "xla", "cudnn")

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


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

    Raises:
      InputError: for a mask of numbers: what would be added to scores is not taken.
    """
    if mask.dtype != jnp.bool_:
        raise InputError(f"a mask must be bool, got {mask.dtype}; no numbers are added to scores")
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


def choose_attention(
    name: str, mesh: Mesh | None, dtype: Any, width: int, length: int | None = None
) -> str:
    """The implementation that runs when `name` is asked for.

    "auto" is cuDNN's where it can be, and "grouped" elsewhere. What masks say (segments, a shared
    prefix, windows) is the same for all of them: each takes any mask of `attend`.

    Args:
      name: one of `IMPLEMENTATIONS`.
      mesh: whose devices do the work; None: JAX's first one does.
      dtype: of queries, keys and values.
      width: c.
      length: S = T, if known.

    Returns:
      "grouped", "xla" or "cudnn".

    Raises:
      InputError: for an unknown name, or where cuDNN is asked for and cannot be had.
    """
    if name not in IMPLEMENTATIONS:
        raise InputError(f"unknown attention {name!r}; {suggest(name, IMPLEMENTATIONS)}")
    if name not in ("auto", "cudnn"):
        return name
    reason = _why_not_cudnn(platform_of(mesh), jnp.dtype(dtype), width, length)
    if reason is None:
        return "cudnn"
    if name == "auto":
        return "grouped"
    raise InputError(f"attention 'cudnn' {reason}; 'auto' takes what the devices have")


def implementation(name: str, scale: float | None) -> Attend:
    """What `choose_attention` chose, as a function of q, k, v and mask; see `attend`."""
    if name == "grouped":
        return lambda q, k, v, mask: attend(q, k, v, mask, scale)

    def library(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        # The whole rule goes in as a mask: cuDNN's own windows and causality count places in a
        # row, not positions in a text.
        chosen: Any = name
        # JAX's own code promotes, on purpose.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q, k, v, mask=mask[:, None], scale=scale, implementation=chosen
            )

    return library


def platform_of(mesh: Mesh | None) -> str:
    """Where a program runs: "cpu", "tpu", "cuda", or another name of JAX's."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform != "gpu":
        return device.platform
    return "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"


def _why_not_cudnn(platform: str, dtype: Any, width: int, length: int | None) -> str | None:
    """Why cuDNN's attention cannot be had, in words; None if it can."""
    if platform != "cuda":
        return f"needs an NVIDIA GPU, and the devices are {platform!r}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16, and the base's dtype is {dtype.name}"
    # 128 is what all of its GPUs allow.
    if width > 128 or width % 8:
        return f"needs heads that are at most 128 wide, by 8, and those of the base have {width}"
    if length is not None and length % 2:
        return f"needs rows of an even number of tokens to train with a mask, and got {length}"
    return None
