"""A tiny config of every family, each with all that the family adds to Llama."""

import dataclasses

import jax.numpy as jnp

from mos_jax.models.config import DecoderConfig, LinearScaling, RopeScaling
from mos_jax.models.decoder import Decoder
from mos_jax.models.tiny import tiny_config, tiny_weights

WINDOW = 4
_BASE: dict = {"num_layers": 3, "d_ff": 128}
FAMILY_FIELDS: dict[str, dict] = {
    "llama": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)},
    "mistral": {"window": WINDOW, "tied_embeddings": False},
    "qwen2": {"qkv_bias": True, "window": WINDOW, "windowed_layers": (1, 2)},
    "qwen3": {"qk_norm": True, "head_dim": 32, "rope_base": 1e6, "rms_eps": 1e-6},
    "gemma3": {
        "qk_norm": True,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embed_scale": 8.0,
        "query_scale": 24**-0.5,
        "head_dim": 32,
        "rope_base": 1e6,
        "window": WINDOW,
        "windowed_layers": (0, 2),
        "local_rope_base": 1e4,
        "rope_scaling": LinearScaling(8.0),
        "rms_eps": 1e-6,
    },
}


def family_config(family: str, /, **changes) -> DecoderConfig:
    """Three layers, width 64, windows of `WINDOW` tokens where the family has them."""
    fields = vars(tiny_config()) | _BASE | {"name": family, "family": family}
    return DecoderConfig.create(**fields | FAMILY_FIELDS[family] | changes)


def family_decoder(family: str, /, remat="products", dtype="float32", **changes) -> Decoder:
    config = family_config(family, **changes)
    weights = {name: jnp.asarray(w) for name, w in tiny_weights(config, 0, dtype).items()}
    return Decoder(config, weights, remat)


def with_fields(decoder: Decoder, **changes) -> Decoder:
    """The same weights under another config."""
    weights = {"embed": decoder.embed[...], "final_norm": decoder.final_norm[...]}
    weights |= {f"blocks/{name}": array[...] for name, array in decoder.blocks.items()}
    if decoder.head is not None:
        weights["head"] = decoder.head[...]
    return Decoder(dataclasses.replace(decoder.config, **changes), weights, decoder.remat)
