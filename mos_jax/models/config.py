"""The typed configuration of a decoder: every number its computation depends on."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

from mos_jax.errors import InputError, suggest

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Families by the names of their files and tensors. Llama is Llama 1 to 3.2 and SmolLM2.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
ACTIVATIONS = ("silu", "gelu_tanh")
# Far above any model, and low enough that a damaged file asks for little before its tensors, whose
# bytes are counted, are looked at.
MAX_SIZE, MAX_LAYERS = 2**31 - 1, 2**16


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
class LinearScaling:
    """Every rotary frequency divided by `factor` (position interpolation, arXiv 2306.15595).

    The larger Gemma 3 do so in their global layers.
    """

    factor: float


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of one decoder. Build it with `create`, which checks the values.

    The fields with a default say where a family departs from Llama.

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
        family: One of `FAMILIES`; decides the names in files and nothing that is computed.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: Whether an RMS norm over each head of queries and keys precedes RoPE.
        post_norms: Whether the outputs of attention and MLP are normed before they are added.
        activation: Of the gate, one of `ACTIVATIONS`; "gelu_tanh" is GELU's tanh approximation.
        embed_scale: Factor of the embeddings, rounded to their dtype; None: they stay as they are.
        query_scale: Factor of the scores of attention; None: head_dim ** -0.5.
        window: Tokens that a windowed layer sees, the token itself included; None: all layers see
            every earlier token.
        windowed_layers: Windowed layers, ascending; None: all of them if `window` is set.
        local_rope_base: Base of the rotary frequencies in windowed layers, where `rope_scaling`
            then does not apply; None: as in the others.
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
    rope_scaling: RopeScaling | LinearScaling | None = None
    family: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: str = "silu"
    embed_scale: float | None = None
    query_scale: float | None = None
    window: int | None = None
    windowed_layers: tuple[int, ...] | None = None
    local_rope_base: float | None = None

    @classmethod
    def create(cls, **fields: Any) -> DecoderConfig:
        """Returns a config of these fields after checking them.

        Values that say what None says become None (`windowed_layers` that name every layer, a
        `query_scale` of head_dim ** -0.5, a `local_rope_base` that is `rope_base`), so that equal
        models compare equal.

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
            check_size(name, getattr(config, name))
        check_size("num_layers", config.num_layers, MAX_LAYERS)
        if config.head_dim % 2:
            raise InputError(f"head_dim = {config.head_dim} must be even: RoPE rotates pairs")
        if config.num_heads % config.num_kv_heads:
            raise InputError(
                f"num_heads = {config.num_heads} must be a multiple of "
                f"num_kv_heads = {config.num_kv_heads}"
            )
        check_positive("rope_base", config.rope_base)
        check_positive("rms_eps", config.rms_eps)
        for name in ("tied_embeddings", "qkv_bias", "qk_norm", "post_norms"):
            if not isinstance(getattr(config, name), bool):
                raise InputError(f"{name} = {getattr(config, name)!r} must be true or false")
        for name, choices in (("family", FAMILIES), ("activation", ACTIVATIONS)):
            value = getattr(config, name)
            if value not in choices:
                raise InputError(f"{name} = {value!r} is unknown; {suggest(str(value), choices)}")
        for name in ("embed_scale", "query_scale", "local_rope_base"):
            if getattr(config, name) is not None:
                check_positive(name, getattr(config, name))
        _check_rope_scaling(config.rope_scaling)
        _check_windows(config)
        said: dict[str, Any] = {
            "windowed_layers": tuple(range(config.num_layers)),
            "query_scale": config.head_dim**-0.5,
        }
        if config.rope_scaling is None:
            said["local_rope_base"] = config.rope_base
        redundant = [name for name, value in said.items() if getattr(config, name) == value]
        return cls(**fields | dict.fromkeys(redundant)) if redundant else config

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

    def is_windowed(self) -> tuple[bool, ...]:
        """Returns for each layer whether it sees only `window` tokens."""
        if self.window is None:
            return (False,) * self.num_layers
        if self.windowed_layers is None:
            return (True,) * self.num_layers
        return tuple(layer in self.windowed_layers for layer in range(self.num_layers))

    def architecture(self) -> dict[str, Any]:
        """Returns what the computation depends on, as JSON values: neither `name` nor `family`.

        Fields that were added later are left out while they have their default, so that what is
        derived from this stays the same for models that do not use them.
        """
        fields = dataclasses.asdict(self)
        del fields["name"], fields["family"]
        for name in _LATER:
            if fields[name] == _LATER[name]:
                del fields[name]
        return fields

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each base weight by name, in a fixed order.

        "embed" [V, d]; "head" [d, V] only when untied; "final_norm" [d]; "blocks/attn_norm" and
        "blocks/mlp_norm" [L, d]; and "blocks/<site>" [L, d_in, d_out] for each of SITES. With
        `post_norms` also "blocks/attn_post_norm" and "blocks/mlp_post_norm" [L, d], with `qk_norm`
        "blocks/q_norm" and "blocks/k_norm" [L, head_dim], with `qkv_bias` "blocks/q_bias",
        "blocks/k_bias" and "blocks/v_bias" [L, d_out of the projection]. Norm weights are the
        factor itself, in every family.
        """
        norm, sites = (self.num_layers, self.d_model), self.site_shapes()
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, self.d_model)}
        if not self.tied_embeddings:
            shapes["head"] = (self.d_model, self.vocab_size)
        shapes["final_norm"] = (self.d_model,)
        shapes |= {"blocks/attn_norm": norm, "blocks/mlp_norm": norm}
        if self.post_norms:
            shapes |= {"blocks/attn_post_norm": norm, "blocks/mlp_post_norm": norm}
        if self.qk_norm:
            head = (self.num_layers, self.head_dim)
            shapes |= {"blocks/q_norm": head, "blocks/k_norm": head}
        if self.qkv_bias:
            for part in ("q", "k", "v"):
                shapes[f"blocks/{part}_bias"] = (self.num_layers, sites[f"{part}_proj"][2])
        return shapes | {f"blocks/{site}": shape for site, shape in sites.items()}

    @property
    def num_parameters(self) -> int:
        """Number of base weights; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.weight_shapes().values())


_SIZES = tuple(
    field.name for field in dataclasses.fields(DecoderConfig) if field.type in (int, "int")
)
# Fields that came after bases had their first fingerprints, with their defaults.
_LATER = {
    field.name: field.default
    for field in dataclasses.fields(DecoderConfig)
    if field.default is not dataclasses.MISSING and field.name not in ("rope_scaling", "family")
}


def _check_rope_scaling(scaling: Any) -> None:
    if scaling is None:
        return
    if not isinstance(scaling, (RopeScaling, LinearScaling)):
        raise InputError(
            f"rope_scaling = {scaling!r} must be a RopeScaling, a LinearScaling or None"
        )
    check_positive("rope_scaling.factor", scaling.factor)
    if isinstance(scaling, LinearScaling):
        return
    for name in ("low_freq_factor", "high_freq_factor"):
        check_positive(f"rope_scaling.{name}", getattr(scaling, name))
    check_size("rope_scaling.original_max_positions", scaling.original_max_positions)
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise InputError(
            f"rope_scaling.low_freq_factor = {scaling.low_freq_factor} must be less than "
            f"high_freq_factor = {scaling.high_freq_factor}"
        )


def _check_windows(config: DecoderConfig) -> None:
    if config.window is None:
        for name in ("windowed_layers", "local_rope_base"):
            if getattr(config, name) is not None:
                raise InputError(
                    f"{name} = {getattr(config, name)!r} is for windowed layers, but window is None"
                )
        return
    check_size("window", config.window)
    layers = config.windowed_layers
    if layers is None:
        return
    whole = isinstance(layers, tuple) and all(type(layer) is int for layer in layers)
    in_range = whole and all(0 <= layer < config.num_layers for layer in layers)
    if not layers or not in_range or list(layers) != sorted(set(layers)):
        raise InputError(
            f"windowed_layers = {layers!r} must be a tuple of distinct, ascending layers from 0 to "
            f"{config.num_layers - 1}, at least one, or None for all"
        )


def check_size(name: str, value: Any, most: int = MAX_SIZE) -> None:
    """Raises InputError unless `value`, called `name`, is a whole number from 1 to `most`."""
    if value is None:
        raise InputError(f"{name} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} = {value!r} must be a whole number, 1 or more")
    if value > most:
        raise InputError(f"{name} = {value!r:.40} must be at most {most}")


def check_positive(name: str, value: Any) -> None:
    """Raises InputError unless `value`, called `name`, is a finite number above 0."""
    if value is None:
        raise InputError(f"{name} is missing")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise InputError(f"{name} = {value!r:.40} must be a finite number above 0")


def default_head_dim(d_model: int, num_heads: int) -> int:
    """Width of a head where a file gives none. Raises InputError if it is not whole."""
    if d_model % num_heads:
        raise InputError(
            f"no head width is given, and width {d_model} is not a multiple of {num_heads} heads"
        )
    return d_model // num_heads
