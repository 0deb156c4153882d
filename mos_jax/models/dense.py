"""The product of tokens with one weight of the base, whatever form the weight has."""

from __future__ import annotations

import jax
import numpy as np

from mos_jax.models.quantized import Quantized, Weight, dequantize


def dense(x: jax.Array, weight: Weight) -> jax.Array:
    """Computes x [N, d_in] times weight [d_in, d_out].

    A quantised weight is turned into numbers of x's dtype here, and again in the backward pass:
    what is kept between the two are its codes, whatever the decoder's `remat`.
    """
    if isinstance(weight, jax.Array | np.ndarray):
        return x @ weight
    return _dequantized_product(x, weight)


@jax.checkpoint
def _dequantized_product(x: jax.Array, weight: Quantized) -> jax.Array:
    return x @ dequantize(weight, x.dtype)
