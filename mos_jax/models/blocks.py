"""What one block computes besides its linear layers.

Axis legend: B rows, S tokens of a row, N = B * S, d model width, H query heads, K key and value
heads, c head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mos_jax.models.config import DecoderConfig
from mos_jax.models.projection import Projector
from mos_jax.models.rope import rotate


def queries_keys_values(
    config: DecoderConfig, project: Projector, x: jax.Array, rope: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From x [N, d], queries [B, S, H, c] and keys and values [B, S, K, c], rotated by `rope`."""
    normed = rms_norm(x, project.weights["attn_norm"], config.rms_eps)
    q, k, v = project(normed, "q_proj", "k_proj", "v_proj")
    batch, length = rope[0].shape[:2]
    q, k, v = (y.reshape(batch, length, -1, config.head_dim) for y in (q, k, v))
    return rotate(q, rope), rotate(k, rope), v


def add_attention(project: Projector, x: jax.Array, attended: jax.Array) -> jax.Array:
    """X [N, d] plus the output projection of `attended` [B, S, H, c]."""
    attended = checkpoint_name(attended.reshape(x.shape[0], -1), "attended")
    (output,) = project(attended, "o_proj")
    return checkpoint_name(x + output, "middle")


def add_mlp(config: DecoderConfig, project: Projector, x: jax.Array) -> jax.Array:
    """X [N, d] plus the gated MLP of its norm."""
    normed = rms_norm(x, project.weights["mlp_norm"], config.rms_eps)
    gate, up = project(normed, "gate_proj", "up_proj")
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    (output,) = project(jax.nn.silu(gate) * up, "down_proj")
    return x + output


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (arXiv 1910.07467) over the last axis of [N, d], computed in fp32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight[None, :]).astype(x.dtype)
