"""Rotary position embedding (arXiv 2104.09864) in the half-rotation form."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mos_jax.models.config import DecoderConfig, LinearScaling

Rope = tuple[jax.Array, jax.Array]


def inverse_frequencies(config: DecoderConfig, local: bool = False) -> np.ndarray:
    """Radians per position of every pair of a head, fp32 [c / 2].

    With `rope_scaling`, all frequencies are divided, or, as Llama 3.1 does, long wavelengths are
    stretched by `factor` and those in between blended. `local` asks for those of windowed layers.
    """
    base, scaling = config.rope_base, config.rope_scaling
    if local and config.local_rope_base is not None:
        base, scaling = config.local_rope_base, None
    frequencies = base ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    if isinstance(scaling, LinearScaling):
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        wavelengths = 2 * math.pi / frequencies
        low = scaling.original_max_positions / scaling.low_freq_factor
        high = scaling.original_max_positions / scaling.high_freq_factor
        blend = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
        frequencies = np.where(
            wavelengths > low,
            frequencies / scaling.factor,
            np.where(wavelengths < high, frequencies, blended),
        )
    return frequencies.astype(np.float32)


def rotary_tables(config: DecoderConfig, positions: jax.Array, local: bool = False) -> Rope:
    """Cosines and sines of every angle: positions int32 [B, S] -> two fp32 [B, S, 1, c / 2]."""
    frequencies = jnp.asarray(inverse_frequencies(config, local))
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(x: jax.Array, tables: Rope) -> jax.Array:
    """Rotates [B, S, heads, c]: the first half of a head pairs with the second; fp32 inside."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
