"""Strict promotion of dtypes and ranks, as a decorator.

The numerics of adapters, of the frozen base and of the loss are written so that no silent
broadcasting and no silent widening happens; this decorator makes JAX raise where one would. It is
local, not global, because optax, quantised arrays and bf16 attention do not survive it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")


def strict(function: Callable[P, T]) -> Callable[P, T]:
    """Returns `function`, traced under strict dtype promotion and with rank promotion an error."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            return function(*args, **kwargs)

    return wrapped
