"""Arrays in bfloat16 that lie on the device as the integers of the same bits.

XLA on CPU computes nothing in bfloat16: before it gathers from an array, slices or overwrites it,
it turns all of it into fp32, at every step of a decoder, however little is read. Integers it leaves
alone. So what is large and read in parts (slots of a bank, a key-value cache) lies as uint16, and
parts of it become bfloat16 where they are used. Elsewhere than on CPU this costs nothing.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import ml_dtypes
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)


def dtype_at_rest(dtype: str | np.dtype) -> np.dtype:
    """The dtype that arrays of this dtype have at rest."""
    dtype = np.dtype(dtype)
    return np.dtype(np.uint16) if dtype == ml_dtypes.bfloat16 else dtype


def as_bits(x: Array) -> Array:
    """An array as it lies at rest: bfloat16 as uint16, others as they are."""
    return _view(x, np.dtype(np.uint16)) if x.dtype == ml_dtypes.bfloat16 else x


def from_bits(x: Array) -> Array:
    """An array as it is used: uint16 as bfloat16, others as they are."""
    return _view(x, np.dtype(ml_dtypes.bfloat16)) if x.dtype == np.uint16 else x


def _view(x: Array, dtype: np.dtype) -> Array:
    return x.view(dtype) if isinstance(x, np.ndarray) else jax.lax.bitcast_convert_type(x, dtype)
