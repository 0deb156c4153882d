"""Sizes of public models, so that budgets can be worked out without their weights."""

from __future__ import annotations

from typing import Any

from mos_jax.errors import InputError, suggest
from mos_jax.models.config import DecoderConfig, RopeScaling


def _known(name: str, *sizes: int, **others: Any) -> DecoderConfig:
    layers, width, heads, kv_heads, head_dim, d_ff, vocab, positions = sizes
    constants = {"rope_base": 10000.0, "rms_eps": 1e-5, "tied_embeddings": False} | others
    return DecoderConfig.create(
        name=name,
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        d_ff=d_ff,
        vocab_size=vocab,
        max_positions=positions,
        **constants,
    )


def _gemma(name: str, layers: int, width: int, d_ff: int) -> DecoderConfig:
    """A Gemma 3 for text alone: five windowed layers, then a global one."""
    windowed = tuple(layer for layer in range(layers) if layer % 6 != 5)
    return _known(
        name, layers, width, 4, 1, 256, d_ff, 262144, 32768,
        family="gemma3", rope_base=1e6, rms_eps=1e-6, tied_embeddings=True, qk_norm=True,
        post_norms=True, activation="gelu_tanh", embed_scale=width**0.5, window=512,
        windowed_layers=windowed, local_rope_base=10000.0,
    )  # fmt: skip


_LLAMA31 = {"rope_base": 500000.0, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)}
_LLAMA32 = {
    "rope_base": 500000.0,
    "tied_embeddings": True,
    "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192),
}
_SMOLLM2 = {"rope_base": 100000.0, "tied_embeddings": True}
_QWEN2 = {"family": "qwen2", "rope_base": 1e6, "rms_eps": 1e-6, "qkv_bias": True}
_QWEN3 = {"family": "qwen3", "rope_base": 1e6, "rms_eps": 1e-6, "qk_norm": True}
_TIED = {"tied_embeddings": True}

# Sizes in the order of `_known`: layers, width, heads, KV heads, head, FFN, vocabulary, positions.
KNOWN_CONFIGS: dict[str, DecoderConfig] = {
    config.name: config
    for config in (
        _known("llama2-7b", 32, 4096, 32, 32, 128, 11008, 32000, 4096),
        _known("llama2-13b", 40, 5120, 40, 40, 128, 13824, 32000, 4096),
        _known("llama2-70b", 80, 8192, 64, 8, 128, 28672, 32000, 4096),
        _known("llama3-8b", 32, 4096, 32, 8, 128, 14336, 128256, 8192, rope_base=500000.0),
        _known("llama3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, 131072, **_LLAMA31),
        _known("llama3.2-3b", 28, 3072, 24, 8, 128, 8192, 128256, 131072, **_LLAMA32),
        _known("llama3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, 131072, **_LLAMA32),
        _known("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, 8192, **_SMOLLM2),
        _known("smollm2-360m", 32, 960, 15, 5, 64, 2560, 49152, 8192, **_SMOLLM2),
        _known(
            "smollm2-1.7b", 24, 2048, 32, 32, 64, 8192, 49152, 8192,
            rope_base=130000.0, tied_embeddings=True,
        ),
        _known(
            "mistral-7b-v0.1", 32, 4096, 32, 8, 128, 14336, 32000, 32768,
            family="mistral", window=4096,
        ),
        _known(
            "mistral-7b-v0.3", 32, 4096, 32, 8, 128, 14336, 32768, 32768,
            family="mistral", rope_base=1e6,
        ),
        _known("qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864, 151936, 32768, **_QWEN2, **_TIED),
        _known("qwen2.5-1.5b", 28, 1536, 12, 2, 128, 8960, 151936, 131072, **_QWEN2, **_TIED),
        _known("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064, 131072, **_QWEN2),
        _known("qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151936, 40960, **_QWEN3, **_TIED),
        _known("qwen3-1.7b", 28, 2048, 16, 8, 128, 6144, 151936, 40960, **_QWEN3, **_TIED),
        _known("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, 40960, **_QWEN3),
        _gemma("gemma3-270m", 18, 640, 2048),
        _gemma("gemma3-1b", 26, 1152, 6912),
    )
}  # fmt: skip


def find_known(name: str) -> DecoderConfig | None:
    """The entry that a folder or a file of weights is named after, or None.

    "path/to/Llama-2-7b-hf" and "meta-llama/Llama-3.2-3B" are "llama2-7b" and "llama3.2-3b".
    """
    short = _letters(name.replace("\\", "/").rstrip("/").rpartition("/")[2])
    short = short.removeprefix("meta").removesuffix("hf")
    return next((c for known, c in KNOWN_CONFIGS.items() if _letters(known) == short), None)


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def known_config(name: str) -> DecoderConfig:
    """Returns the entry of `KNOWN_CONFIGS` called `name`; raises InputError if there is none."""
    if name not in KNOWN_CONFIGS:
        raise InputError(f"unknown model {name!r}: {suggest(name, KNOWN_CONFIGS)}")
    return KNOWN_CONFIGS[name]
