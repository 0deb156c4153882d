"""What a Hugging Face `config.json` says; whatever is not computed here is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mos_jax.errors import InputError
from mos_jax.models.config import (
    DecoderConfig,
    RopeScaling,
    check_positive,
    check_size,
    default_head_dim,
)

# Fields of config.json that change the result, and the values that leave it as computed here. The
# first is what an absent field means.
_HUGGINGFACE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
}


def config_from_huggingface(raw: Mapping[str, Any], name: str | None = None) -> DecoderConfig:
    """Returns the config that a `config.json` of a LlamaForCausalLM states.

    Args:
        raw: The parsed `config.json`, as transformers 4 (`rope_theta`, `rope_scaling`) or 5
            (`rope_parameters`) writes it. Absent fields have the defaults of transformers.
        name: Name of the result; by default `_name_or_path`, else "llama".

    Raises:
        InputError: Another architecture; a field that would change the result; a field missing
            or of the wrong type.
    """
    if raw.get("model_type") != "llama":
        raise InputError(
            f"config.json: model_type = {raw.get('model_type')!r} is not supported; only 'llama' is"
        )
    if raw.get("architectures") not in (None, ["LlamaForCausalLM"]):
        raise InputError(
            f"config.json: architectures = {raw['architectures']!r} is not supported; "
            "only ['LlamaForCausalLM'] is"
        )
    for key, neutral in _HUGGINGFACE_NEUTRAL.items():
        if raw.get(key, neutral[0]) not in neutral:
            raise InputError(
                f"config.json: {key} = {raw[key]!r} is not supported; only {neutral[0]!r} is"
            )
    sizes = {
        "num_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "num_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "vocab_size": "vocab_size",
    }
    for key in sizes.values():
        check_size(f"config.json: {key}", raw.get(key))
    fields = {field: raw[key] for field, key in sizes.items()}
    heads = fields["num_heads"]
    kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    rope_base, rope_scaling = _huggingface_rope(raw)
    return DecoderConfig.create(
        name=name or raw.get("_name_or_path") or "llama",
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=default_head_dim(fields["d_model"], heads) if head_dim is None else head_dim,
        rope_base=rope_base,
        rms_eps=raw.get("rms_norm_eps", 1e-6),
        tied_embeddings=raw.get("tie_word_embeddings", False),
        max_positions=raw.get("max_position_embeddings", 2048),
        rope_scaling=rope_scaling,
        **fields,
    )


def _huggingface_rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    for key, table in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(table, (Mapping, type(None))):
            raise InputError(f"config.json: {key} = {table!r} must be an object or null")
    if new and old and new != old:
        raise InputError(f"config.json: rope_parameters = {new!r} disagrees with {old!r}")
    table = dict(new or old or {})
    base = table.pop("rope_theta", raw.get("rope_theta", 10000.0))
    check_positive("config.json: rope_theta", base)
    if raw.get("rope_theta", base) != base:
        raise InputError(f"config.json: rope_theta = {raw['rope_theta']!r} disagrees with {base!r}")
    old_kind = table.pop("type", None)
    kind = table.pop("rope_type", old_kind or "default")
    if kind not in ("default", "llama3") or old_kind not in (None, kind):
        raise InputError(
            f"config.json: rope type {kind!r} is not supported; only 'default' and 'llama3' are"
        )
    if table.pop("partial_rotary_factor", 1) != 1:
        raise InputError("config.json: a partial_rotary_factor other than 1 is not supported")
    scaling = None
    positions = table.pop("original_max_position_embeddings", None)  # not used in the default type
    if kind == "llama3":
        # What is missing is None here, which `create` refuses by name.
        scaling = RopeScaling(
            factor=table.pop("factor", None),
            low_freq_factor=table.pop("low_freq_factor", None),
            high_freq_factor=table.pop("high_freq_factor", None),
            original_max_positions=positions,
        )
    if table:
        raise InputError(f"config.json: RoPE setting {min(table)!r} is not supported")
    return float(base), scaling
