"""Low-rank factors: the one form that every adapter takes before it meets a model.

Axis legend: L adapted blocks, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mos_jax.adapters.strictness import strict


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The change `scale * a^T b` of one weight W [h, o], or of the weights of L blocks.

    The rows of `a` and `b` are the rank vectors (LoRA, arXiv 2106.09685). With leading axis L the
    object stands for all blocks of a site type, without it for one block; `jax.lax.scan` and
    `jax.vmap` move between the two.

    Attributes:
      a: fp32 [L, r, h] or [r, h].
      b: fp32 [L, r, o] or [r, o].
      scale: fp32 [L] or []. An array, so that it scans, maps and may differ by block.
      layers: the blocks of the model that the L entries stand for; None = all, in order. Static.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    layers: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def rank(self) -> int:
        """Number of rank vectors, r."""
        return self.a.shape[-2]

    def count(self) -> int:
        """Number of entries of `a` and `b` together."""
        return self.a.size + self.b.size

    @strict
    def apply(self, x: jax.Array) -> jax.Array:
        """Computes `scale * (x a^T) b` for one block: x [N, h] -> [N, o] in x's dtype.

        This is where fp32 factors meet a base of another dtype: they are cast to the dtype of
        `x` for the two products; the r-wide middle stays fp32, where the scale is applied.
        """
        middle = jax.lax.dot_general(
            x,
            self.a.astype(x.dtype),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return (middle * self.scale).astype(x.dtype) @ self.b.astype(x.dtype)

    @strict
    def delta(self) -> jax.Array:
        """The dense change of the weight: fp32 [L, h, o] or [h, o]."""
        scale = self.scale.reshape((*self.scale.shape, 1, 1))
        return scale * jnp.einsum("...rh,...ro->...ho", self.a, self.b)

    @strict
    def merge(self, weight: jax.Array) -> jax.Array:
        """Returns `weight` [.., h, o] plus `delta()`, summed in fp32, in the weight's dtype.

        With `layers` set, `weight` holds all blocks of the model and only those are changed.
        """
        if self.layers is None:
            return (weight.astype(jnp.float32) + self.delta()).astype(weight.dtype)
        rows = jnp.asarray(self.layers)
        merged = weight[rows].astype(jnp.float32) + self.delta()
        return weight.at[rows].set(merged.astype(weight.dtype))

    def for_all_layers(self, num_layers: int) -> LowRank:
        """Spreads the factors of some blocks over all `num_layers`; the others get zeros."""
        if self.layers is None:
            return self
        rows = jnp.asarray(self.layers)

        def spread(array: jax.Array) -> jax.Array:
            return jnp.zeros((num_layers, *array.shape[1:]), array.dtype).at[rows].set(array)

        return LowRank(spread(self.a), spread(self.b), spread(self.scale))
