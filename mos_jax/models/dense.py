"""The product of tokens with one weight of the base, whatever form the weight has."""

from __future__ import annotations

import jax


def dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Computes x [N, d_in] times weight [d_in, d_out]."""
    return x @ weight
