"""What the metadata of a GGUF file say; whatever is not computed here is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mos_jax.errors import InputError
from mos_jax.models.config import DecoderConfig, check_positive, check_size, default_head_dim

_GGUF_KEYS = frozenset(
    """block_count context_length embedding_length feed_forward_length vocab_size
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base""".split()
)


def config_from_gguf(fields: Mapping[str, Any], tensors: Collection[str]) -> DecoderConfig:
    """Returns the config that the metadata of a GGUF file states.

    Args:
        fields: Metadata by key, as `mos_jax.models.gguf.GGUFFile.fields` has it.
        tensors: Names of the file's tensors; embeddings are tied unless "output.weight" is one.

    Raises:
        InputError: Another architecture; a "llama." key or a `rope_freqs.weight` tensor that would
            change the result; a key missing or of the wrong type.
    """
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise InputError(
            f"GGUF: general.architecture = {architecture!r} is not supported; only 'llama' is"
        )
    if "rope_freqs.weight" in tensors:
        raise InputError(
            "GGUF: tensor rope_freqs.weight (scaled rotary frequencies) is not supported; "
            "read this model from its Hugging Face folder, whose config.json has the scaling"
        )
    llama = {
        key.removeprefix("llama."): value
        for key, value in fields.items()
        if key.startswith("llama.")
    }
    if llama.get("rope.scaling.type") == "none":
        llama = {key: v for key, v in llama.items() if not key.startswith("rope.scaling.")}
    for key in sorted(llama.keys() - _GGUF_KEYS):
        raise InputError(f"GGUF: llama.{key} = {llama[key]!r} is not supported")

    def size(key: str, default: int | None = None) -> int:
        value: Any = llama.get(key, default)
        check_size(f"GGUF: llama.{key}", value)
        return int(value)

    def number(key: str, default: float | None = None) -> float:
        check_positive(f"GGUF: llama.{key}", llama.get(key, default))
        # Stored in single precision: take the shortest number that rounds to it (1e-05).
        with np.errstate(over="ignore"):  # `create` refuses the infinity
            return float(str(np.float32(llama.get(key, default))))

    d_model, heads = size("embedding_length"), size("attention.head_count")
    vocabulary = fields.get("tokenizer.ggml.tokens")
    head_dim = llama.get("attention.key_length") or default_head_dim(d_model, heads)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if llama.get(key, head_dim) != head_dim:
            raise InputError(
                f"GGUF: llama.{key} = {llama[key]!r} is not supported; only {head_dim} is, "
                "the width of a head"
            )
    return DecoderConfig.create(
        name=fields.get("general.name") or "llama",
        num_layers=size("block_count"),
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        d_ff=size("feed_forward_length"),
        vocab_size=size("vocab_size", len(vocabulary) if isinstance(vocabulary, list) else None),
        rope_base=number("rope.freq_base", 10000.0),
        rms_eps=number("attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in tensors,
        max_positions=size("context_length"),
    )
