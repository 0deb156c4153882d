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


_LLAMA32 = {
    "rope_base": 500000.0,
    "tied_embeddings": True,
    "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192),
}

# Sizes in the order of `_known`: layers, width, heads, KV heads, head, FFN, vocabulary, positions.
KNOWN_CONFIGS: dict[str, DecoderConfig] = {
    config.name: config
    for config in (
        _known("llama2-7b", 32, 4096, 32, 32, 128, 11008, 32000, 4096),
        _known("llama2-13b", 40, 5120, 40, 40, 128, 13824, 32000, 4096),
        _known("llama2-70b", 80, 8192, 64, 8, 128, 28672, 32000, 4096),
        _known("llama3-8b", 32, 4096, 32, 8, 128, 14336, 128256, 8192, rope_base=500000.0),
        _known("llama3.2-3b", 28, 3072, 24, 8, 128, 8192, 128256, 131072, **_LLAMA32),
        _known("llama3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, 131072, **_LLAMA32),
        _known(
            "smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, 8192,
            rope_base=100000.0, tied_embeddings=True,
        ),
    )
}  # fmt: skip


def known_config(name: str) -> DecoderConfig:
    """Returns the entry of `KNOWN_CONFIGS` called `name`; raises InputError if there is none."""
    if name not in KNOWN_CONFIGS:
        raise InputError(f"unknown model {name!r}: {suggest(name, KNOWN_CONFIGS)}")
    return KNOWN_CONFIGS[name]
