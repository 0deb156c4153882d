"""A base small enough for smoke runs and tests: random weights, no file.

It is called "tiny-random". Its tokenizer is `Tokenizer.byte_level`, whose 259 ids its vocabulary
of 320 covers with room to spare.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mos_jax.errors import InputError
from mos_jax.models.config import DecoderConfig
from mos_jax.models.layout import allocate_weights


def tiny_config() -> DecoderConfig:
    """Returns the config of the tiny base: 2 layers of width 64, 4 query and 2 KV heads."""
    return DecoderConfig.create(
        name="tiny-random",
        num_layers=2,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        d_ff=128,
        vocab_size=320,
        rope_base=10000.0,
        rms_eps=1e-5,
        tied_embeddings=True,
        max_positions=512,
    )


def tiny_weights(
    config: DecoderConfig, seed: int = 0, dtype: Any = "float32"
) -> dict[str, np.ndarray]:
    """Returns random weights of any (small) config, the same for the same seed.

    Projections have variance 1 / d_in, and those that write to the residual stream 2 L times less,
    so that activations keep their scale through the blocks; the embedding has variance 1 / d, so
    that tied logits have a scale of about 1. Norm weights lie around 1, not at it, and biases
    around 0, so that leaving one out shows. Weights in bfloat16 are those in float32, rounded.

    Args:
        config: Sizes; `tiny_config()` or another.
        seed: 0 or more.
        dtype: "float32" or "bfloat16"; norm weights are float32 either way.

    Returns:
        Weights by name, shaped as `config.weight_shapes()`.

    Raises:
        InputError: `seed` is negative, or `dtype` is neither of the two.
    """
    if seed < 0:
        raise InputError(f"seed = {seed} must be 0 or more")
    rng = np.random.default_rng(seed)
    weights = allocate_weights(config, dtype)
    for name, weight in weights.items():
        values = rng.standard_normal(weight.shape, np.float32)
        if name.endswith("norm"):
            values = 1 + np.float32(0.1) * values
        elif name.endswith("bias"):
            values *= np.float32(0.2)
        elif name == "embed":
            values *= np.float32(config.d_model**-0.5)
        else:
            values *= np.float32(weight.shape[-2] ** -0.5)
            if name in ("blocks/o_proj", "blocks/down_proj"):
                values *= np.float32((2 * config.num_layers) ** -0.5)
        weight[...] = values
    return weights
