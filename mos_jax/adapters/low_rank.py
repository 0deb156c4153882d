"""Low-rank factors: the one form that every adapter takes before it meets a model.

Axis legend: L adapted blocks, B rows of a batch, S tokens of a row, N = B * S, r rank, h = d_in,
o = d_out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

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

    Inside a block, that is for `apply`, a leading axis B means rows: row i of a batch has the
    change of entry i, so that one batch mixes adapters. Factors that a base shall scan over have
    no such axis; a callable of the block's index gives it (see `Decoder`).

    Attributes:
      a: fp32 [L, r, h] or [r, h]; inside a block also [B, r, h].
      b: fp32 [L, r, o] or [r, o]; inside a block also [B, r, o].
      scale: fp32 [L] or [], or [B]. An array, so that it scans, maps and may differ by block.
      layers: the blocks of the model that the L entries stand for; None = all, in order. Static.
      ranks: the rank of each of the L entries where they differ: below r, an entry ends in rows
        of zeros that are no part of it; None = r for all. Static.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    layers: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    ranks: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def rank(self) -> int:
        """Number of rank vectors, r; of the entry that has most, where they differ."""
        return self.a.shape[-2]

    def count(self) -> int:
        """Number of entries of `a` and `b` together."""
        return self.a.size + self.b.size

    def scaled(self, by: float | jax.Array) -> LowRank:
        """The change times `by`, a number or fp32 []; the same A and B."""
        return dataclasses.replace(self, scale=self.scale * jnp.asarray(by, jnp.float32))

    def __neg__(self) -> LowRank:
        """The opposite change, to the bit: what it adds, this takes away."""
        return dataclasses.replace(self, scale=-self.scale)

    @strict
    def apply(self, x: jax.Array) -> jax.Array:
        """Computes `scale * (x a^T) b` for one block: x [N, h] -> [N, o] in x's dtype.

        With a leading axis B, x holds B rows of S tokens each, one row after the other, and
        tokens of row i meet entry i.

        This is where fp32 factors meet a base of another dtype: they are cast to the dtype of
        `x` for the two products; the r-wide middle stays fp32, where the scale is applied.

        Raises:
          InputError: if the B rows do not divide N.
        """
        return from_rank(to_rank(x, self.a, self.scale_of_vectors()), self.b)

    def scale_of_vectors(self) -> jax.Array:
        """The scale once for each rank vector: fp32 [..., r], with the leading axes of `a`."""
        return jnp.broadcast_to(self.scale[..., None], self.a.shape[:-1])

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
          a [num_layers, r, h], b [num_layers, r, o], scale [num_layers], `layers` and `ranks` None.

        Raises:
          InputError: if the factors are those of one block, or of blocks that a model of
            `num_layers` does not have, or of another number of blocks when they are for all.
        """
        self._check_blocks((num_layers,))
        if self.layers is None:
            return dataclasses.replace(self, ranks=None)
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


# What an adapter gives and a base takes: factors by site type.
Factors = Mapping[str, LowRank]


def to_rank(x: jax.Array, a: jax.Array, scale: jax.Array) -> jax.Array:
    """The middle of a low-rank product, `scale * (x a^T)`, scaled in fp32, in x's dtype.

    Args:
      x: tokens [N, h].
      a: [r, h] -> [N, r]; or [B, r, h], one for each row of S = N / B tokens -> [B, S, r].
      scale: of each rank vector, fp32 [r] or [B, r].

    Raises:
      InputError: if the B rows do not divide N.
    """
    if a.ndim == 2:
        middle = jax.lax.dot_general(
            x, a.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return (middle * scale[None, :]).astype(x.dtype)
    rows = a.shape[0]
    if x.shape[0] % rows:
        raise InputError(f"factors for {rows} rows do not fit a batch of {x.shape[0]} tokens")
    # One product for each row: as many FLOPs as with one adapter, and each row's A is read once.
    middle = jax.lax.dot_general(
        x.reshape(rows, -1, x.shape[1]),
        a.astype(x.dtype),
        (((2,), (2,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )
    return (middle * scale[:, None, :]).astype(x.dtype)


def from_rank(middle: jax.Array, b: jax.Array) -> jax.Array:
    """The other half: `middle` [N, r] times b [r, o], or [B, S, r] times [B, r, o], -> [N, o]."""
    if b.ndim == 2:
        return middle @ b.astype(middle.dtype)
    out = jax.lax.dot_general(middle, b.astype(middle.dtype), (((2,), (1,)), ((0,), (0,))))
    return out.reshape(-1, b.shape[2])
