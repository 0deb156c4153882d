"""What a Hugging Face `config.json` says, and back; what is not computed is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mos_jax.errors import InputError
from mos_jax.models.config import (
    MAX_LAYERS,
    DecoderConfig,
    check_positive,
    check_size,
    default_head_dim,
)
from mos_jax.models.huggingface_rope import read_gemma_rope, read_rope, write_rope

MODEL_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
# Gemma 3 with an image encoder; its language model is a "gemma3_text" in `text_config`.
_WITH_IMAGES = "gemma3"
_GEMMA_WITH_IMAGES = "Gemma3ForConditionalGeneration"

_SIZES = {
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "vocab_size": "vocab_size",
}
# What an absent field means in transformers. A size that has no entry here must be given: nobody
# means its default.
_COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    # The published text_config of the larger models leaves most of these out.
    "gemma3": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
}
# Fields that change the result, and the values that leave it as computed here. The first is what an
# absent field means.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
}
_NEUTRAL_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": ("silu",), "attention_bias": (False, None), "sliding_window": (None,)},
    "mistral": {"hidden_act": ("silu",), "attention_bias": (False, None)},
    # Qwen 2 has its three biases whatever attention_bias says.
    "qwen2": {"hidden_act": ("silu",)},
    "qwen3": {"hidden_act": ("silu",), "attention_bias": (False, None)},
    "gemma3": {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "hidden_act": ("gelu_pytorch_tanh", None),
        "attention_bias": (False, None),
    },
}
_FULL, _WINDOWED = "full_attention", "sliding_attention"


def config_from_huggingface(raw: Mapping[str, Any], name: str | None = None) -> DecoderConfig:
    """Returns the config that a `config.json` of a causal language model states.

    Of a Gemma 3 with an image encoder (`model_type` "gemma3") it is that of the language model.

    Args:
        raw: The parsed `config.json`, as transformers 4 or 5 writes it. Absent fields have the
            defaults of transformers.
        name: Name of the result; by default `_name_or_path`, else the family's.

    Raises:
        InputError: Another architecture; a field that would change the result; a field missing
            or of the wrong type.
    """
    kind = raw.get("model_type")
    if kind == _WITH_IMAGES:
        return _config_beside_images(raw, name)
    family = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise InputError(
            f"config.json: model_type = {kind!r} is not supported; only "
            f"{', '.join((*MODEL_TYPES, _WITH_IMAGES))} are"
        )
    if raw.get("architectures") not in (None, [ARCHITECTURES[family]]):
        raise InputError(
            f"config.json: architectures = {raw['architectures']!r} is not supported; "
            f"only {[ARCHITECTURES[family]]!r} is for model_type {kind!r}"
        )
    for key, neutral in (_NEUTRAL | _NEUTRAL_OF[family]).items():
        if raw.get(key, neutral[0]) not in neutral:
            raise InputError(
                f"config.json: {key} = {raw[key]!r} is not supported; only {neutral[0]!r} is"
            )
    # The fields of RoPE are read from what was given, since the versions keep them in two places.
    filled = _COMMON | _DEFAULTS[family] | dict(raw)
    for key in _SIZES.values():
        check_size(f"config.json: {key}", filled.get(key))
    check_size("config.json: num_hidden_layers", filled["num_hidden_layers"], MAX_LAYERS)
    fields: dict[str, Any] = {field: filled[key] for field, key in _SIZES.items()}
    heads, kv_heads = fields["num_heads"], filled.get("num_key_value_heads")
    head_dim = filled.get("head_dim")
    if head_dim is None:
        head_dim = default_head_dim(fields["d_model"], heads)
    fields |= _windows(filled, family, fields["num_layers"])
    if family == "gemma3":
        fields |= _gemma_fields(raw, filled, windowed=fields["window"] is not None)
    else:
        fields["rope_base"], fields["rope_scaling"] = read_rope(raw, filled["rope_theta"])
    return DecoderConfig.create(
        name=name or raw.get("_name_or_path") or family,
        family=family,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        rms_eps=filled["rms_norm_eps"],
        tied_embeddings=filled["tie_word_embeddings"],
        max_positions=filled["max_position_embeddings"],
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3"),
        **fields,
    )


def config_to_huggingface(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `config.json` from which transformers and `config_from_huggingface` build it.

    It has the fields that the computation depends on; ids of special tokens and the dtype of the
    weights are for the caller to add. RoPE is written as transformers 4 has it, which 5 reads too.

    Raises:
        InputError: The files of the family cannot say a field of `config` (a window in a Llama).
    """
    family = config.family
    (model_type,) = (kind for kind, of in MODEL_TYPES.items() if of == family)
    raw: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": model_type}
    raw |= {key: getattr(config, field) for field, key in _SIZES.items()}
    raw |= {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_positions,
        "attention_dropout": 0.0,
    }
    activation = "hidden_activation" if family == "gemma3" else "hidden_act"
    raw |= {
        key: neutral[0]
        for key, neutral in _NEUTRAL_OF[family].items()
        if key in (activation, "attention_bias")
    }
    raw |= write_rope(config)
    windowed = config.is_windowed()
    if family != "llama":
        raw["sliding_window"] = config.window
    if family in ("qwen2", "qwen3", "gemma3"):
        raw["layer_types"] = [_WINDOWED if flag else _FULL for flag in windowed]
    if family in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = any(windowed)
        # What versions without layer_types go by.
        raw["max_window_layers"] = windowed.index(True) if any(windowed) else config.num_layers
    if family == "gemma3":
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        # An integer there; what none can say differs when it is read below.
        raw["query_pre_attn_scalar"] = max(1, round(max(scale, 1e-9) ** -2))
    read = config_from_huggingface(raw, config.name)
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(read, field.name)
        if ours != theirs and field.name != "name":
            raise InputError(
                f"a config.json of model_type {model_type!r} cannot say {field.name} = {ours!r}: "
                f"it would be read as {theirs!r}"
            )
    return raw


def _config_beside_images(raw: Mapping[str, Any], name: str | None) -> DecoderConfig:
    text = raw.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type", "gemma3_text") != "gemma3_text":
        raise InputError(
            f"config.json: text_config of model_type {_WITH_IMAGES!r} must be an object whose own "
            f"model_type is 'gemma3_text', got {text!r:.80}"
        )
    expected = (None, [_GEMMA_WITH_IMAGES])
    if raw.get("architectures") not in expected:
        raise InputError(
            f"config.json: architectures = {raw['architectures']!r} is not supported; only "
            f"{expected[1]!r} is for model_type {_WITH_IMAGES!r}"
        )
    # Said of the whole model, and meant for the text as well.
    shared = {key: raw[key] for key in ("quantization_config", "tie_word_embeddings") if key in raw}
    for key, value in shared.items():
        if text.get(key, value) != value:
            raise InputError(
                f"config.json: {key} = {value!r} disagrees with text_config, {text[key]!r}"
            )
    text = shared | {"model_type": "gemma3_text"} | dict(text)
    return config_from_huggingface(text, name or raw.get("_name_or_path"))


def _windows(raw: Mapping[str, Any], family: str, num_layers: int) -> dict[str, Any]:
    """The fields `window` and `windowed_layers`."""
    window = raw.get("sliding_window")
    if family in ("qwen2", "qwen3"):
        used = raw.get("use_sliding_window", False)
        if not isinstance(used, bool):
            raise InputError(f"config.json: use_sliding_window = {used!r} must be true or false")
        window = window if used else None
    if window is not None:
        check_size("config.json: sliding_window", window)
    kinds = raw.get("layer_types")
    if kinds is None:
        kinds = _usual_layer_types(raw, family, num_layers, window)
    whole = isinstance(kinds, list) and len(kinds) == num_layers
    if not whole or any(kind not in (_FULL, _WINDOWED) for kind in kinds):
        raise InputError(
            f"config.json: layer_types = {kinds!r} must say {_FULL!r} or {_WINDOWED!r} for each "
            f"of the {num_layers} layers"
        )
    if family in ("llama", "mistral") and (
        kinds != _usual_layer_types(raw, family, num_layers, window)
    ):
        raise InputError(
            f"config.json: layer_types = {kinds!r} is not supported with sliding_window = "
            f"{window!r} in this architecture, whose layers are all alike"
        )
    windowed = tuple(layer for layer, kind in enumerate(kinds) if kind == _WINDOWED)
    if windowed and window is None:
        raise InputError(
            f"config.json: layer_types has {_WINDOWED!r}, but no sliding_window is set"
            + (" and used" if family in ("qwen2", "qwen3") else "")
        )
    return {"window": window, "windowed_layers": windowed} if windowed else {"window": None}


def _usual_layer_types(
    raw: Mapping[str, Any], family: str, num_layers: int, window: int | None
) -> list[str]:
    """What the layers are where `layer_types` does not say it."""
    if family == "gemma3":
        pattern = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 6))
        check_size("config.json: sliding_window_pattern", pattern)
        return [_FULL if (layer + 1) % pattern == 0 else _WINDOWED for layer in range(num_layers)]
    if window is None:
        return [_FULL] * num_layers
    if family == "mistral":
        return [_WINDOWED] * num_layers
    first = raw["max_window_layers"]
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise InputError(f"config.json: max_window_layers = {first!r} must be 0 or more")
    return [_WINDOWED if layer >= first else _FULL for layer in range(num_layers)]


def _gemma_fields(
    raw: Mapping[str, Any], filled: Mapping[str, Any], windowed: bool
) -> dict[str, Any]:
    scalar = filled["query_pre_attn_scalar"]
    check_positive("config.json: query_pre_attn_scalar", scalar)
    base, scaling, local = read_gemma_rope(
        raw, filled["rope_theta"], filled["rope_local_base_freq"]
    )
    return {
        "rope_base": base,
        "rope_scaling": scaling,
        "local_rope_base": local if windowed else None,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embed_scale": filled["hidden_size"] ** 0.5,
        "query_scale": scalar**-0.5,
    }
