"""The linear layers of one block, each with its adapter's branch.

Axis legend: B rows, S tokens of a row, N = B * S, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from mos_jax.adapters.adapter import site_key
from mos_jax.adapters.low_rank import Factors, LowRank, from_rank, to_rank
from mos_jax.models.dense import dense, dense_on_mesh

Dropout = tuple[jax.Array, jax.Array | float]


class Projector:
    """The linear layers of one block, each with its adapter's branch where there is one."""

    def __init__(
        self,
        weights: Mapping[str, jax.Array],
        factors: Factors,
        dropout: Callable[[str, jax.Array], jax.Array] | None,
        mesh: Mesh | None = None,
    ):
        self.weights = weights
        self._factors = factors
        self._dropout = dropout
        self._mesh = mesh

    def __call__(self, x: jax.Array, *names: str) -> list[jax.Array]:
        """Applies the layers `names` to the same input: [N, d_in] -> [N, d_out] each."""
        if self._mesh is None:
            outputs = [dense(x, self.weights[name]) for name in names]
        else:
            outputs = [dense_on_mesh(x, self.weights[name], self._mesh, name) for name in names]
        adapted = [i for i, name in enumerate(names) if name in self._factors]
        if self._dropout is not None:
            for i in adapted:
                branch = self._factors[names[i]].apply(self._dropout(names[i], x))
                outputs[i] = outputs[i] + branch
            return outputs
        if adapted:
            branches = apply_together(x, [self._factors[names[i]] for i in adapted])
            for i, branch in zip(adapted, branches, strict=True):
                outputs[i] = outputs[i] + branch
        return outputs


def apply_together(x: jax.Array, factors: list[LowRank]) -> list[jax.Array]:
    """`[f.apply(x) for f in factors]` with one product for all A's.

    Products with so few rows are bound by reading `x`; stacking the A's of the layers that share
    an input reads it once, forward and backward. Factors with an axis B are stacked row by row.
    What is no `LowRank` and only stands in for one is applied alone.
    """
    alike = all(isinstance(f, LowRank) for f in factors)
    if not alike or len({f.a.ndim for f in factors}) > 1:  # some by row, some for all rows
        return [f.apply(x) for f in factors]
    stacked = jnp.concatenate([f.a for f in factors], axis=-2)
    scale = jnp.concatenate([f.scale_of_vectors() for f in factors], axis=-1)
    middle = checkpoint_name(to_rank(x, stacked, scale), "low_rank")
    outputs, start = [], 0
    for f in factors:
        part = jax.lax.slice_in_dim(middle, start, start + f.rank, axis=-1)
        outputs.append(from_rank(part, f.b))
        start += f.rank
    return outputs


def layer_dropout(
    dropout: Dropout | None, layer: jax.Array
) -> Callable[[str, jax.Array], jax.Array] | None:
    """The dropout of one block, by site type, or None where there is none."""
    if dropout is None:
        return None
    key, rate = dropout
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    key = jax.random.fold_in(key, layer)

    return lambda name, x: keep_fraction(site_key(key, name, "dropout"), keep, x)


def keep_fraction(key: jax.Array, keep: jax.Array, x: jax.Array) -> jax.Array:
    """Dropout (Srivastava et al. 2014): keeps each entry of x with probability `keep`, scaled."""
    mask = jax.random.bernoulli(key, keep, x.shape)
    return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))
