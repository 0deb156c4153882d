"""What the metadata of a GGUF file say; whatever is not computed here is refused by name.

A GGUF file states less than a config.json: what llama.cpp fixes by architecture is fixed here too,
such as Gemma 3's five windowed layers to each global one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mos_jax.errors import InputError
from mos_jax.models.config import (
    MAX_LAYERS,
    MAX_SIZE,
    DecoderConfig,
    LinearScaling,
    RopeScaling,
    check_positive,
    check_size,
    default_head_dim,
)
from mos_jax.models.rope import inverse_frequencies

# Mistral's files say "llama".
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
# Divisors of the rotary frequencies; Llama 3.1 and 3.2 have them in place of `rope.scaling` keys.
ROPE_FACTORS = "rope_freqs.weight"

_KEYS = frozenset(
    """block_count context_length embedding_length feed_forward_length vocab_size
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base rope.scale_linear
    rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
    rope.scaling.finetuned""".split()
)
_GEMMA3_KEYS = frozenset(
    """attention.sliding_window attention.sliding_window_pattern rope.freq_base_swa
    final_logit_softcapping""".split()
)
# Keys that may only say what is computed anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "split.count": (0, 1),
    "llama.tensor_data_layout": ("Meta AI original pth",),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "gemma3.final_logit_softcapping": (0.0,),
}


class _Fields:
    """The keys of one architecture, without its name in front."""

    def __init__(self, fields: Mapping[str, Any], architecture: str):
        self.prefix = f"GGUF: {architecture}."
        start = architecture + "."
        self.found = {k.removeprefix(start): v for k, v in fields.items() if k.startswith(start)}

    def get(self, key: str, default: Any = None) -> Any:
        return self.found.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        check_size(self.prefix + key, value, MAX_LAYERS if key == "block_count" else MAX_SIZE)
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        check_positive(self.prefix + key, self.get(key, default))
        # Stored in single precision: take the shortest number that rounds to it (1e-05).
        with np.errstate(over="ignore"):  # `create` refuses the infinity
            return float(str(np.float32(self.get(key, default))))

    def refuse(self, key: str, supported: str) -> InputError:
        value = self.get(key)
        return InputError(f"{self.prefix}{key} = {value!r} is not supported; only {supported}")


def config_from_gguf(
    fields: Mapping[str, Any],
    tensors: Collection[str],
    rope_factors: np.ndarray | None = None,
) -> DecoderConfig:
    """Returns the config that the metadata of a GGUF file state.

    Architectures are `GGUF_ARCHITECTURES`. A Mistral file calls itself "llama" and does not state
    Mistral 7B v0.1's window of 4096 tokens, so that all its layers see every earlier token; read
    that model from its folder where longer texts matter.

    Args:
        fields: Metadata by key, as `mos_jax.models.gguf.GGUFFile.fields` has it.
        tensors: Names of the file's tensors; embeddings are tied unless "output.weight" is one.
        rope_factors: fp [head_dim / 2], the tensor `ROPE_FACTORS` if the file has one: what each
            rotary frequency is divided by. Factors that a `RopeScaling` does not give are refused.

    Raises:
        InputError: Another architecture; a key that would change the result; a key missing or of
            the wrong type.
    """
    architecture = fields.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise InputError(
            f"GGUF: general.architecture = {architecture!r} is not supported; "
            f"{', '.join(GGUF_ARCHITECTURES)} are"
        )
    for key, neutral in _NEUTRAL.items():
        if key in fields and fields[key] not in neutral:
            wanted = f"only {neutral[-1]!r} is"
            if key == "split.count":
                wanted = "merge the parts into one file first (llama-gguf-split --merge)"
            raise InputError(f"GGUF: {key} = {fields[key]!r} is not supported; {wanted}")
    own = _Fields(fields, architecture)
    known = _KEYS | _GEMMA3_KEYS if architecture == "gemma3" else _KEYS
    for key in sorted(own.found.keys() - known):
        if f"{architecture}.{key}" not in _NEUTRAL:
            raise InputError(f"{own.prefix}{key} = {own.found[key]!r} is not supported")

    d_model, heads = own.size("embedding_length"), own.size("attention.head_count")
    vocabulary = fields.get("tokenizer.ggml.tokens")
    head_dim = own.get("attention.key_length") or default_head_dim(d_model, heads)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise own.refuse(key, f"{head_dim} is, the width of a head")
    config = DecoderConfig.create(
        name=fields.get("general.name") or architecture,
        num_layers=own.size("block_count"),
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=own.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        d_ff=own.size("feed_forward_length"),
        vocab_size=own.size(
            "vocab_size", len(vocabulary) if isinstance(vocabulary, list) else None
        ),
        rope_base=own.number("rope.freq_base", 10000.0),
        rms_eps=own.number("attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in tensors,
        max_positions=own.size("context_length"),
        rope_scaling=_linear_scaling(own),
        **_of_family(own, architecture, d_model, heads),
    )
    if rope_factors is None:
        return config
    if config.rope_scaling is not None or architecture != "llama":
        raise InputError(f"GGUF: tensor {ROPE_FACTORS} beside {architecture}'s own RoPE settings")
    return dataclasses.replace(config, rope_scaling=_llama3_scaling(config, rope_factors))


def _of_family(own: _Fields, architecture: str, d_model: int, heads: int) -> dict[str, Any]:
    """Returns the fields of the config in which an architecture departs from Llama."""
    if architecture != "gemma3":
        return {
            "family": architecture,
            "qkv_bias": architecture == "qwen2",
            "qk_norm": architecture == "qwen3",
        }
    fields: dict[str, Any] = {
        "family": "gemma3",
        "qk_norm": True,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embed_scale": math.sqrt(d_model),
    }
    layers = own.size("block_count")
    if layers == 62:  # the 27B model, which the file does not tell otherwise; llama.cpp does so too
        fields["query_scale"] = (d_model // heads) ** -0.5
    if not own.get("attention.sliding_window"):
        return fields
    pattern: Any = own.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        windowed = tuple(layer for layer, local in enumerate(pattern) if local)
        if len(pattern) != layers:
            raise own.refuse("attention.sliding_window_pattern", f"one for each of {layers} is")
    else:
        every = own.size("attention.sliding_window_pattern", 6)
        windowed = tuple(layer for layer in range(layers) if layer % every < every - 1)
    if windowed:
        fields |= {
            "window": own.size("attention.sliding_window"),
            "windowed_layers": windowed,
            "local_rope_base": own.number("rope.freq_base_swa", 10000.0),
        }
    return fields


def _linear_scaling(own: _Fields) -> LinearScaling | None:
    # An absent type means "linear" to llama.cpp, and a factor of 0 none.
    kind = own.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise own.refuse("rope.scaling.type", "'none' and 'linear' are")
    key = "rope.scaling.factor" if own.get("rope.scaling.factor") else "rope.scale_linear"
    if kind == "none" or not own.get(key):
        return None
    factor = own.number(key)
    return None if factor == 1 else LinearScaling(factor)


def _llama3_scaling(config: DecoderConfig, factors: np.ndarray) -> RopeScaling | None:
    """Returns the scaling that divides the frequencies of `config` by `factors`.

    Only the ratios of original length, low and high factor can be told from the factors: the low
    one is taken to be 1, as in every published model. Llama's own settings are tried first, then
    those through which the interpolated factors go.
    """
    plain = inverse_frequencies(config)
    if factors.shape != plain.shape or not (np.isfinite(factors) & (factors > 0)).all():
        raise InputError(
            f"GGUF: tensor {ROPE_FACTORS} must hold {len(plain)} positive numbers, "
            "one for each pair of a head"
        )
    if (factors == 1).all():
        return None
    factor = float(str(np.float32(factors.max())))
    candidates = [(4.0, 8192)]
    between = (factors > 1) & (factors < factors.max())
    if between.sum() > 1:
        share = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        # The share of the old frequency grows with it, from 0 at the low to 1 at the high limit.
        slope, offset = np.polyfit(plain[between] / (2 * math.pi), share.astype(np.float64), 1)
        if slope > 0 > offset:
            candidates.append((round(float(1 - 1 / offset), 3), round(-slope / offset)))
    for high, length in candidates:
        scaling = RopeScaling(factor, 1.0, high, length)
        scaled = inverse_frequencies(dataclasses.replace(config, rope_scaling=scaling))
        if high > 1 and np.allclose(plain / factors, scaled, rtol=1e-5, atol=0):
            return scaling
    raise InputError(
        f"GGUF: tensor {ROPE_FACTORS} holds factors that Llama 3's RoPE scaling does not give, "
        f"between {factors.min():g} and {factors.max():g}; other scalings are not supported"
    )
