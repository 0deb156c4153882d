"""The product of tokens with one weight of the base, whatever form the weight has."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax.sharding import Mesh

from mos_jax.models.quantized import Quantized, Weight, dequantize
from mos_jax.models.sharding import constrain, gather_weight, output_axes


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


def dense_on_mesh(x: jax.Array, weight: Weight, mesh: Mesh, name: str) -> jax.Array:
    """`dense` for the site `name`, its weight divided over a mesh; see `sharding.py`.

    The weight is gathered here, and again in the backward pass: what is kept between the two is
    what each device holds of it, whatever the decoder's `remat`.
    """
    return constrain(_gathered_product(x, weight, mesh, name), mesh, *output_axes(name))


@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _gathered_product(x: jax.Array, weight: Weight, mesh: Mesh, name: str) -> jax.Array:
    return x @ dequantize(gather_weight(weight, mesh, name), x.dtype)
