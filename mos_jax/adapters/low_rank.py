"""Low-rank factors: the one form that every adapter takes before it meets a model.

Axis legend: L adapted blocks, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError


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
        # In full fp32: it is computed once, and merged weights keep whatever it loses.
        highest = jax.lax.Precision.HIGHEST
        return scale * jnp.einsum("...rh,...ro->...ho", self.a, self.b, precision=highest)

    @strict
    def merge(self, weight: jax.Array) -> jax.Array:
        """Returns `weight` [.., h, o] plus `delta()`, summed in fp32, in the weight's dtype.

        With `layers` set, `weight` holds all blocks of the model and only those are changed.

        Raises:
          InputError: if `weight` does not hold the blocks that the factors are for.
        """
        self._check_blocks(weight.shape[:-2])
        if self.layers is None:
            return (weight.astype(jnp.float32) + self.delta()).astype(weight.dtype)
        rows = jnp.asarray(self.layers)
        merged = weight[rows].astype(jnp.float32) + self.delta()
        return weight.at[rows].set(merged.astype(weight.dtype))

    def for_all_layers(self, num_layers: int) -> LowRank:
        """Spreads the factors of some blocks over all `num_layers`; the others get zeros.

        Returns:
          a [num_layers, r, h], b [num_layers, r, o], scale [num_layers], `layers` None.

        Raises:
          InputError: if the factors are those of one block, or of blocks that a model of
            `num_layers` does not have, or of another number of blocks when they are for all.
        """
        self._check_blocks((num_layers,))
        if self.layers is None:
            return self
        rows = jnp.asarray(self.layers)

        def spread(array: jax.Array) -> jax.Array:
            return jnp.zeros((num_layers, *array.shape[1:]), array.dtype).at[rows].set(array)

        return LowRank(spread(self.a), spread(self.b), spread(self.scale))

    def _check_blocks(self, blocks: tuple[int, ...]) -> None:
        """Raises InputError unless these are factors for weights with the leading axes `blocks`."""
        own = self.a.shape[:-2]
        if self.layers is None:
            fits = own == blocks
        else:
            fits = (
                len(own) == len(blocks) == 1
                and own[0] == len(self.layers)
                and 0 <= min(self.layers)
                and max(self.layers) < blocks[0]
            )
        if not fits:
            which = "" if self.layers is None else f", for the blocks {list(self.layers)},"
            raise InputError(
                f"factors with the leading axes {list(own)}{which} do not fit weights with "
                f"{list(blocks)}: [] is one block, [L] a model of L blocks"
            )
