"""Sizes of a Llama-architecture decoder, and how a model file states them.

`DecoderConfig` holds every number the computation depends on. `KNOWN_CONFIGS` has those of public
models, so that parameter budgets can be worked out without their weights; the two `config_from_*`
functions read them from a file and refuse, by name, whatever this decoder does not compute.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mos_jax.errors import InputError, suggest

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The "llama3" change of rotary frequencies, as Llama 3.1 and 3.2 use it.

    Wavelengths above `original_max_positions / low_freq_factor` positions are stretched by
    `factor`, those below `original_max_positions / high_freq_factor` kept, others interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of one decoder. Build it with `create`, which checks the values.

    Attributes:
        name: For people; nothing is computed from it.
        num_layers: Number of blocks, L.
        d_model: Width of the residual stream, d.
        num_heads: Number of query heads, H.
        num_kv_heads: Number of key and value heads, KV; divides H.
        head_dim: Width of one head, even; H * head_dim may differ from d.
        d_ff: Width inside the gated MLP, f.
        vocab_size: Rows of the embedding, V.
        rope_base: Base of the rotary frequencies.
        rms_eps: Added to the mean square in every RMS norm.
        tied_embeddings: Whether the head is the embedding, transposed.
        max_positions: Longest sequence, in tokens, the model was made for.
        rope_scaling: Change of the rotary frequencies, or None.
    """

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    rope_base: float
    rms_eps: float
    tied_embeddings: bool
    max_positions: int
    rope_scaling: RopeScaling | None = None

    @classmethod
    def create(cls, **fields: Any) -> DecoderConfig:
        """Returns a config of these fields after checking them.

        Raises:
            InputError: A field is unknown, missing, of the wrong type, or the sizes disagree.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise InputError(f"unknown config field {name!r}: {suggest(name, known)}")
        for name, field in known.items():
            if name not in fields and field.default is dataclasses.MISSING:
                raise InputError(f"config field {name!r} is missing")
        config = cls(**fields)
        for name in _SIZES:
            _check_size(name, getattr(config, name))
        if config.head_dim % 2:
            raise InputError(f"head_dim = {config.head_dim} must be even: RoPE rotates pairs")
        if config.num_heads % config.num_kv_heads:
            raise InputError(
                f"num_heads = {config.num_heads} must be a multiple of "
                f"num_kv_heads = {config.num_kv_heads}"
            )
        _check_positive("rope_base", config.rope_base)
        _check_positive("rms_eps", config.rms_eps)
        if not isinstance(config.tied_embeddings, bool):
            raise InputError(f"tied_embeddings = {config.tied_embeddings!r} must be true or false")
        scaling = config.rope_scaling
        if scaling is not None:
            if not isinstance(scaling, RopeScaling):
                raise InputError(f"rope_scaling = {scaling!r} must be a RopeScaling or None")
            for name in ("factor", "low_freq_factor", "high_freq_factor"):
                _check_positive(f"rope_scaling.{name}", getattr(scaling, name))
            _check_size("rope_scaling.original_max_positions", scaling.original_max_positions)
            if scaling.low_freq_factor >= scaling.high_freq_factor:
                raise InputError(
                    f"rope_scaling.low_freq_factor = {scaling.low_freq_factor} must be less than "
                    f"high_freq_factor = {scaling.high_freq_factor}"
                )
        return config

    def site_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Returns (num_layers, d_in, d_out) of each projection, for y = x @ W, in SITES order."""
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        ends = (
            (self.d_model, q_width),
            (self.d_model, kv_width),
            (self.d_model, kv_width),
            (q_width, self.d_model),
            (self.d_model, self.d_ff),
            (self.d_model, self.d_ff),
            (self.d_ff, self.d_model),
        )
        return {
            site: (self.num_layers, d_in, d_out)
            for site, (d_in, d_out) in zip(SITES, ends, strict=True)
        }

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each base weight by name, in a fixed order.

        "embed" [V, d]; "head" [d, V] only when untied; "final_norm" [d]; "blocks/attn_norm" and
        "blocks/mlp_norm" [L, d]; and "blocks/<site>" [L, d_in, d_out] for each of SITES.
        """
        norm = (self.num_layers, self.d_model)
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, self.d_model)}
        if not self.tied_embeddings:
            shapes["head"] = (self.d_model, self.vocab_size)
        shapes["final_norm"] = (self.d_model,)
        shapes |= {"blocks/attn_norm": norm, "blocks/mlp_norm": norm}
        return shapes | {f"blocks/{site}": shape for site, shape in self.site_shapes().items()}

    @property
    def num_parameters(self) -> int:
        """Number of base weights; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.weight_shapes().values())


_SIZES = tuple(
    field.name for field in dataclasses.fields(DecoderConfig) if field.type in (int, "int")
)


def _check_size(name: str, value: Any) -> None:
    if value is None:
        raise InputError(f"{name} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} = {value!r} must be a whole number, 1 or more")


def _check_positive(name: str, value: Any) -> None:
    if value is None:
        raise InputError(f"{name} is missing")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise InputError(f"{name} = {value!r} must be a finite number above 0")


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
        _check_size(f"config.json: {key}", raw.get(key))
    fields = {field: raw[key] for field, key in sizes.items()}
    heads = fields["num_heads"]
    kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    rope_base, rope_scaling = _huggingface_rope(raw)
    return DecoderConfig.create(
        name=name or raw.get("_name_or_path") or "llama",
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=_head_dim(fields["d_model"], heads) if head_dim is None else head_dim,
        rope_base=rope_base,
        rms_eps=raw.get("rms_norm_eps", 1e-6),
        tied_embeddings=raw.get("tie_word_embeddings", False),
        max_positions=raw.get("max_position_embeddings", 2048),
        rope_scaling=rope_scaling,
        **fields,
    )


def _head_dim(d_model: int, num_heads: int) -> int:
    if d_model % num_heads:
        raise InputError(
            f"no head width is given, and width {d_model} is not a multiple of {num_heads} heads"
        )
    return d_model // num_heads


def _huggingface_rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    for key, table in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(table, (Mapping, type(None))):
            raise InputError(f"config.json: {key} = {table!r} must be an object or null")
    if new and old and new != old:
        raise InputError(f"config.json: rope_parameters = {new!r} disagrees with {old!r}")
    table = dict(new or old or {})
    base = table.pop("rope_theta", raw.get("rope_theta", 10000.0))
    _check_positive("config.json: rope_theta", base)
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
        _check_size(f"GGUF: llama.{key}", value)
        return int(value)

    def number(key: str, default: float | None = None) -> float:
        _check_positive(f"GGUF: llama.{key}", llama.get(key, default))
        # Stored in single precision: take the shortest number that rounds to it (1e-05).
        with np.errstate(over="ignore"):  # `create` refuses the infinity
            return float(str(np.float32(llama.get(key, default))))

    d_model, heads = size("embedding_length"), size("attention.head_count")
    vocabulary = fields.get("tokenizer.ggml.tokens")
    head_dim = llama.get("attention.key_length") or _head_dim(d_model, heads)
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
