"""What differs between layers with and without a sliding window: the mask and the rotary angles.

A windowed layer sees the tokens whose position is less than `window` before its own. Positions
count, not places in a row, so packed texts, a shared prefix and padding in front need no care.

Axis legend: B rows, S queries of a row, T keys, c head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mos_jax.models.config import DecoderConfig
from mos_jax.models.rope import Rope, rotary_tables

View = tuple[jax.Array, Rope]
# More positions than any text has, and far from what int32 holds.
_EVERYTHING = 1 << 30


def layer_flags(config: DecoderConfig) -> jax.Array | None:
    """Which layers are windowed, bool [L] to scan over; None when all layers are alike."""
    windowed = config.is_windowed()
    return jnp.asarray(windowed) if any(windowed) and not all(windowed) else None


def layer_views(
    config: DecoderConfig,
    positions: jax.Array,
    mask: jax.Array,
    key_positions: jax.Array | None = None,
) -> Callable[[jax.Array | None], View]:
    """Prepares what attention of any layer may see, and at which angles.

    Args:
      config: the decoder.
      positions: int32 [B, S], of the queries.
      mask: bool [B, S, T], what a layer without a window may see.
      key_positions: int32 [B, T]; None is 0, 1, 2, ...

    Returns:
      A function from a layer's entry of `layer_flags`, bool [] or None, to its mask, bool
      [B, S, T], and rotary tables. Where all layers are alike it computes nothing.
    """
    ropes = layer_ropes(config, positions)
    if config.window is None:
        return lambda windowed: (mask, ropes(windowed))
    if key_positions is None:
        key_positions = jnp.arange(mask.shape[-1], dtype=jnp.int32)[None, :]
    near = positions[:, :, None] - key_positions[:, None, :] < config.window
    local = mask & near
    if all(config.is_windowed()):
        return lambda windowed: (local, ropes(windowed))

    def choose(windowed: jax.Array | None) -> View:
        assert windowed is not None
        return jax.lax.select(windowed, local, mask), ropes(windowed)

    return choose


def layer_ropes(config: DecoderConfig, positions: jax.Array) -> Callable[[jax.Array | None], Rope]:
    """The part of `layer_views` that is the rotary tables, at positions int32 [B, S]."""
    if config.window is None:
        everywhere = rotary_tables(config, positions)
        return lambda windowed: everywhere
    local = rotary_tables(config, positions, local=True)
    if all(config.is_windowed()) or config.local_rope_base is None:
        return lambda windowed: local
    everywhere = rotary_tables(config, positions)

    def choose(windowed: jax.Array | None) -> Rope:
        assert windowed is not None
        cos, sin = (jax.lax.select(windowed, a, b) for a, b in zip(local, everywhere, strict=True))
        return cos, sin

    return choose


def layer_reach(config: DecoderConfig, windowed: jax.Array | None) -> jax.Array:
    """How far a layer sees, int32 []: tokens less than so many positions before one's own."""
    if config.window is None:
        return jnp.int32(_EVERYTHING)
    if windowed is None:
        return jnp.int32(config.window)
    return jnp.where(windowed, jnp.int32(config.window), jnp.int32(_EVERYTHING))
