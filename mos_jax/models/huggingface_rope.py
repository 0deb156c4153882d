"""What a Hugging Face `config.json` says about rotary position embedding, and back.

transformers 4 keeps the base in `rope_theta` (and Gemma's for windowed layers in
`rope_local_base_freq`) and what scales it in `rope_scaling`; transformers 5 keeps all of it in
`rope_parameters`, Gemma's by kind of layer. Both are read. The first is written, since both
versions read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mos_jax.errors import InputError
from mos_jax.models.config import DecoderConfig, LinearScaling, RopeScaling, check_positive

Scaling = RopeScaling | LinearScaling | None

_KINDS = ("default", "linear", "llama3")
# The entries of Gemma's `rope_parameters`.
GLOBAL, LOCAL = "full_attention", "sliding_attention"


def read_rope(raw: Mapping[str, Any], default_base: float) -> tuple[float, Scaling]:
    """Returns base and scaling of a model with one kind of rotary embedding.

    Raises:
        InputError: A setting is not computed here, missing, of the wrong type or contradicted.
    """
    new, old = _table(raw, "rope_parameters"), _table(raw, "rope_scaling")
    if new and old and new != old:
        raise InputError(f"config.json: rope_parameters = {new!r} disagrees with {old!r}")
    return _read_table(new or old, raw, "rope_theta", default_base)


def read_gemma_rope(
    raw: Mapping[str, Any], default_base: float, default_local: float
) -> tuple[float, Scaling, float]:
    """Returns base and scaling of Gemma's global layers, and the base of its windowed ones.

    Raises:
        InputError: As `read_rope`; or the windowed layers are scaled.
    """
    by_layer, old = _table(raw, "rope_parameters"), _table(raw, "rope_scaling")
    unknown = by_layer.keys() - {GLOBAL, LOCAL}
    if unknown:
        raise InputError(
            f"config.json: rope_parameters.{min(unknown)} is not supported; the entries of this "
            f"architecture are {GLOBAL!r} and {LOCAL!r}"
        )
    new = _table(by_layer, GLOBAL)
    if new and old and {**new, "rope_theta": None} != {**old, "rope_theta": None}:
        raise InputError(f"config.json: rope_parameters.{GLOBAL} = {new!r} disagrees with {old!r}")
    base, scaling = _read_table(new or old, raw, "rope_theta", default_base)
    local, local_scaling = _read_table(
        _table(by_layer, LOCAL), raw, "rope_local_base_freq", default_local
    )
    if local_scaling is not None:
        raise InputError(
            f"config.json: rope_parameters.{LOCAL}: a scaled RoPE in windowed layers is not "
            "supported"
        )
    return base, scaling, local


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of `config.json` for base and scaling, those of windowed layers too."""
    scaling = config.rope_scaling
    table: dict[str, Any] | None = None
    if isinstance(scaling, LinearScaling):
        table = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        table = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    fields = {"rope_theta": config.rope_base, "rope_scaling": table}
    if config.family == "gemma3":
        local = config.local_rope_base
        fields["rope_local_base_freq"] = config.rope_base if local is None else local
    return fields


def _table(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    table = raw.get(key)
    if not isinstance(table, (Mapping, type(None))):
        raise InputError(f"config.json: {key} = {table!r} must be an object or null")
    return dict(table or {})


def _read_table(
    table: dict[str, Any], raw: Mapping[str, Any], key: str, default: float
) -> tuple[float, Scaling]:
    """Returns base and scaling of one table; outside of it, the base stands at `key` of `raw`."""
    base = table.pop("rope_theta", raw.get(key, default))
    check_positive(f"config.json: {key}", base)
    if raw.get(key, base) != base:
        raise InputError(f"config.json: {key} = {raw[key]!r} disagrees with {base!r}")
    old_kind = table.pop("type", None)
    kind = table.pop("rope_type", old_kind or "default")
    if kind not in _KINDS or old_kind not in (None, kind):
        raise InputError(
            f"config.json: rope type {kind!r} is not supported; only {', '.join(_KINDS)} are"
        )
    if table.pop("partial_rotary_factor", 1) not in (1, None):
        raise InputError("config.json: a partial_rotary_factor other than 1 is not supported")
    scaling: Scaling = None
    positions = table.pop("original_max_position_embeddings", None)  # used by "llama3" alone
    if kind == "llama3":
        # What is missing is None here, which `create` refuses by name.
        scaling = RopeScaling(
            factor=table.pop("factor", None),
            low_freq_factor=table.pop("low_freq_factor", None),
            high_freq_factor=table.pop("high_freq_factor", None),
            original_max_positions=positions,
        )
    elif kind == "linear":
        scaling = LinearScaling(table.pop("factor", None))
    if table:
        raise InputError(f"config.json: RoPE setting {min(table)!r} is not supported")
    return float(base), scaling
