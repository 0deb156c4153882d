"""The typed configuration of a decoder: every number its computation depends on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

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
            check_size(name, getattr(config, name))
        if config.head_dim % 2:
            raise InputError(f"head_dim = {config.head_dim} must be even: RoPE rotates pairs")
        if config.num_heads % config.num_kv_heads:
            raise InputError(
                f"num_heads = {config.num_heads} must be a multiple of "
                f"num_kv_heads = {config.num_kv_heads}"
            )
        check_positive("rope_base", config.rope_base)
        check_positive("rms_eps", config.rms_eps)
        if not isinstance(config.tied_embeddings, bool):
            raise InputError(f"tied_embeddings = {config.tied_embeddings!r} must be true or false")
        scaling = config.rope_scaling
        if scaling is not None:
            if not isinstance(scaling, RopeScaling):
                raise InputError(f"rope_scaling = {scaling!r} must be a RopeScaling or None")
            for name in ("factor", "low_freq_factor", "high_freq_factor"):
                check_positive(f"rope_scaling.{name}", getattr(scaling, name))
            check_size("rope_scaling.original_max_positions", scaling.original_max_positions)
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


def check_size(name: str, value: Any) -> None:
    """Raises InputError unless `value`, called `name`, is a whole number of at least 1."""
    if value is None:
        raise InputError(f"{name} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} = {value!r} must be a whole number, 1 or more")


def check_positive(name: str, value: Any) -> None:
    """Raises InputError unless `value`, called `name`, is a finite number above 0."""
    if value is None:
        raise InputError(f"{name} is missing")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise InputError(f"{name} = {value!r} must be a finite number above 0")


def default_head_dim(d_model: int, num_heads: int) -> int:
    """Width of a head where a file gives none. Raises InputError if it is not whole."""
    if d_model % num_heads:
        raise InputError(
            f"no head width is given, and width {d_model} is not a multiple of {num_heads} heads"
        )
    return d_model // num_heads
