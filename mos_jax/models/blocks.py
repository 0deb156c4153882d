"""What one block computes besides its linear layers.

Axis legend: B rows, S tokens of a row, N = B * S, d model width, H query heads, K key and value
heads, c head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mos_jax.models.config import DecoderConfig
from mos_jax.models.projection import Projector
from mos_jax.models.rope import Rope, rotate


def queries_keys_values(
    config: DecoderConfig, project: Projector, x: jax.Array, rope: Rope
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From x [N, d], queries [B, S, H, c] and keys and values [B, S, K, c], rotated by `rope`."""
    normed = rms_norm(x, project.weights["attn_norm"], config.rms_eps)
    q, k, v = project(normed, "q_proj", "k_proj", "v_proj")
    if config.qkv_bias:
        q, k, v = (
            y + project.weights[name][None, :]
            for y, name in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias"))
        )
    batch, length = rope[0].shape[:2]
    q, k, v = (y.reshape(batch, length, -1, config.head_dim) for y in (q, k, v))
    if config.qk_norm:
        # Kept before the norm, whose backward pass needs its input: else the products run twice.
        q, k = checkpoint_name(q, "q"), checkpoint_name(k, "k")
        q = _norm_heads(q, project.weights["q_norm"], config.rms_eps)
        k = _norm_heads(k, project.weights["k_norm"], config.rms_eps)
        return rotate(q, rope), rotate(k, rope), checkpoint_name(v, "v")
    q, k = rotate(q, rope), rotate(k, rope)
    return checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")


def add_attention(
    config: DecoderConfig, project: Projector, x: jax.Array, attended: jax.Array
) -> jax.Array:
    """X [N, d] plus the output projection of `attended` [B, S, H, c]."""
    attended = checkpoint_name(attended.reshape(x.shape[0], -1), "attended")
    (output,) = project(attended, "o_proj")
    if config.post_norms:
        # Kept before the norm for the same reason; the sum is cheap to form again.
        output = checkpoint_name(output, "middle")
        return x + rms_norm(output, project.weights["attn_post_norm"], config.rms_eps)
    return checkpoint_name(x + output, "middle")


def add_mlp(config: DecoderConfig, project: Projector, x: jax.Array) -> jax.Array:
    """X [N, d] plus the gated MLP of its norm."""
    normed = rms_norm(x, project.weights["mlp_norm"], config.rms_eps)
    gate, up = project(normed, "gate_proj", "up_proj")
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    (output,) = project(_ACTIVATIONS[config.activation](gate) * up, "down_proj")
    if config.post_norms:
        output = checkpoint_name(output, "down")
        output = rms_norm(output, project.weights["mlp_post_norm"], config.rms_eps)
    return x + output


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def _norm_heads(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMS norm of every head of [B, S, heads, c]."""
    return rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).reshape(x.shape)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (arXiv 1910.07467) over the last axis of [N, d], computed in fp32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight[None, :]).astype(x.dtype)
