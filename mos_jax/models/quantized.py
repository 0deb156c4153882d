"""Weights of a base in 8 or 4 bits, and the way back to numbers.

A quantised weight keeps, for every block of `BLOCK` neighbours along d_in, one scale, and for
every entry a code. Which numbers the codes stand for is qwix's definition: `QArray` and
`qwix.dequantize` do the arithmetic. 4-bit codes are packed here, two to a byte: XLA on CPU holds
arrays of a 4-bit dtype packed, but unpacks all layers of one before the scan begins.

Axis legend: L blocks (layers), h = d_in, o = d_out, c = h / BLOCK scales of a column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError, suggest

# Entries along d_in that share a scale, as in QLoRA (arXiv 2305.14314).
BLOCK = 64
SCALE_DTYPE = jnp.dtype(jnp.bfloat16)
# The 16 values of NF4: quantiles of a normal distribution (QLoRA, appendix E).
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedNF4:
    """A weight in NF4, two codes to a byte.

    Attributes:
      codes: uint8 [..., h / 2, o]; the low four bits of row i are entry 2 i, the high ones 2 i + 1.
      scale: bfloat16 [..., c, o].
    """

    codes: jax.Array
    scale: jax.Array

    def __getitem__(self, index: Any) -> PackedNF4:
        """The weight of some layers: `index` may select from axes before the last two."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for, [..., h, o]."""
        *layers, half, d_out = self.codes.shape
        return (*layers, 2 * half, d_out)

    def unpack(self) -> qwix.QArray:
        """One code a byte: a `QArray` with codes of the shape of the weight."""
        shifts = jnp.asarray([0, 4], jnp.uint8).reshape(2, 1)
        shifts = shifts.reshape((1,) * (self.codes.ndim - 1) + (2, 1))
        codes = (self.codes[..., None, :] >> shifts) & jnp.uint8(15)
        return qwix.QArray(codes.reshape(self.shape), self.scale, qtype="nf4")


Quantized: TypeAlias = "qwix.QArray | PackedNF4"
Weight: TypeAlias = "jax.Array | Quantized"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way to store a weight [..., h, o].

    Attributes:
      name: what the user calls it.
      entries: rows of the weight for one row of each stored array: of codes, of scales.
      encode: from fp32 [..., h, o] to those arrays.
      build: from those arrays to the weight.
    """

    name: str
    entries: tuple[int, int]
    dtypes: tuple[np.dtype, np.dtype]
    encode: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    build: Callable[[jax.Array, jax.Array], Quantized]

    @property
    def bits(self) -> float:
        """Stored bits for each weight, scales included."""
        sizes = zip(self.entries, self.dtypes, strict=True)
        return sum(8 * dtype.itemsize / rows for rows, dtype in sizes)


@jax.jit
@strict
def _encode_int8(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    blocks, scale = _normalised(weight, 127.0)
    codes = jnp.clip(jnp.round(blocks), -127.0, 127.0).astype(jnp.int8)
    return codes.reshape(weight.shape), scale


@jax.jit
@strict
def _encode_nf4(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    blocks, scale = _normalised(weight, 1.0)
    values = np.asarray(NF4_VALUES, np.float32)
    # The nearest value: how many of the midpoints between neighbours lie below.
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    for middle in (values[1:] + values[:-1]) / np.float32(2):
        codes = codes + (blocks > middle).astype(jnp.uint8)
    *layers, d_in, d_out = weight.shape
    pairs = codes.reshape(*layers, d_in // 2, 2, d_out)
    return pairs[..., 0, :] | (pairs[..., 1, :] << jnp.uint8(4)), scale


def _normalised(weight: jax.Array, top: float) -> tuple[jax.Array, jax.Array]:
    """Blocks [..., c, BLOCK, o] divided by their scale, which puts the largest near `top`."""
    *layers, d_in, d_out = weight.shape
    blocks = weight.reshape(*layers, d_in // BLOCK, BLOCK, d_out)
    # Rounded first: codes are then the best ones for the scale that is stored.
    scale = (jnp.max(jnp.abs(blocks), axis=-2) / jnp.float32(top)).astype(SCALE_DTYPE)
    divisor = scale.astype(jnp.float32)
    divisor = jnp.where(divisor == 0, jnp.ones_like(divisor), divisor)
    return blocks / divisor[..., None, :], scale


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", (1, BLOCK), (np.dtype(np.int8), SCALE_DTYPE), _encode_int8, qwix.QArray),
        Scheme("nf4", (2, BLOCK), (np.dtype(np.uint8), SCALE_DTYPE), _encode_nf4, PackedNF4),
    )
}


def find_scheme(name: str | None) -> Scheme | None:
    """The scheme called `name`; None for None. Raises InputError."""
    if name is None:
        return None
    if name not in SCHEMES:
        raise InputError(f"unknown quantize = {name!r}; {suggest(str(name), SCHEMES)}, or None")
    return SCHEMES[name]


def is_quantized(weight: Weight) -> bool:
    """Whether a weight is held as codes."""
    return isinstance(weight, qwix.QArray | PackedNF4)


def scheme_of(weight: Weight) -> str | None:
    """The name of the scheme of a weight; None if it is a plain array."""
    if not is_quantized(weight):
        return None
    return "nf4" if isinstance(weight, PackedNF4) else "int8"


def check_divides(name: str, d_in: int) -> None:
    """Raises InputError unless a weight with `d_in` inputs is made of whole blocks."""
    if d_in % BLOCK:
        raise InputError(
            f"{name} has d_in = {d_in}, which is not a multiple of {BLOCK}, the entries that share "
            "a scale; load this base without quantize"
        )


@strict
def dequantize(weight: Weight, dtype: Any) -> jax.Array:
    """The numbers of a weight, [..., h, o] in `dtype`; a plain array is returned as it is.

    The product of code and scale is taken in fp32 and then rounded.
    """
    if not isinstance(weight, PackedNF4 | qwix.QArray):
        return weight
    codes = weight.unpack() if isinstance(weight, PackedNF4) else weight
    return qwix.dequantize(codes.astype(jnp.float32)).astype(dtype)
