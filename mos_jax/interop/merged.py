"""An adapter merged into its base: new weights, checked, and the way back.

Axis legend: L blocks of the base, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError, suggest
from mos_jax.interop.check import PROBE_LENGTH, PROBE_ROWS, largest_difference, probe_logits
from mos_jax.models.base import DTYPES, Base
from mos_jax.models.decoder import Decoder
from mos_jax.models.quantized import dequantize


@dataclasses.dataclass(frozen=True)
class Merged:
    """A base with an adapter in its weights.

    Attributes:
      base: the merged model, used and written like any other base.
      dtype: of its weights.
      difference: the largest difference of logits between it and the base with the adapter beside
        it, over `tokens` tokens; both computed in the dtype of their weights.
      tokens: how many tokens that was measured on.
      lost: by site type, the share of the adapter's change that rounding to `dtype` took: the
        norm of what was rounded off divided by the norm of the change (Frobenius, all blocks). A
        change much smaller than the spacing of bf16 numbers around a weight is lost altogether.
    """

    base: Base
    dtype: str
    difference: float
    tokens: int
    lost: Mapping[str, float]
    original: Base | None = dataclasses.field(repr=False)

    def unmerge(self) -> Base:
        """The base as it was, to the bit: its arrays were kept.

        Raises:
          InputError: if the adapter was merged with `keep=False`.
        """
        if self.original is None:
            raise InputError(
                "the weights from before the merge were freed (keep=False), and subtracting the "
                "adapter would not give them back to the bit; load the base again"
            )
        return self.original


def merge(
    base: Base, factors: Mapping[str, LowRank], *, dtype: str | None = None, keep: bool = True
) -> Merged:
    """Adds the factors of an adapter to the weights of its base.

    Each weight becomes W + scale * a^T b, summed in fp32 and rounded once. Blocks that the factors
    leave out keep their weights to the bit. Site types are merged one after the other and their
    blocks one by one, so that beyond the two models no more than one block's change is in memory.

    A quantised base comes out as a plain one: all its sites become numbers of `dtype`, since the
    sum has no exact form in 4 or 8 bits.

    Args:
      base: the base. It is left as it is, unless `keep` is False.
      factors: `adapter.factors()`.
      dtype: "float32" or "bfloat16", of the merged weights (norms stay fp32); None = that of the
        base. A bf16 base merged to fp32 holds the sum without rounding it to bf16.
      keep: whether the original weights stay, for `unmerge`. If not, the arrays of a site are
        deleted as soon as its merged ones are there, and `base` cannot be used any more; memory
        then exceeds one model by the weights of one site type. All sites are checked before the
        first is deleted.

    Raises:
      InputError: for an unknown dtype, factors that do not fit the base, or, by site and block, a
        merged weight that is not finite.
    """
    dtype = base.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; {suggest(str(dtype), DTYPES)}")
    if not factors:
        raise InputError("there are no factors to merge; give adapter.factors()")
    before = probe_logits(base.model, factors)
    depth = base.config.num_layers
    whole = {name: _Blocks.spread(low_rank, depth) for name, low_rank in factors.items()}
    weights = base.model.weights
    if not keep:
        for name, blocks in whole.items():
            _checked(name, blocks, _merge_blocks(weights[f"blocks/{name}"], blocks, dtype), dtype)
    merged, lost = {}, {}
    for name in list(weights):
        weight, site = weights.pop(name), name.removeprefix("blocks/")
        if site in whole and name != site:
            merged[name], lost[site] = _checked(
                site, whole[site], _merge_blocks(weight, whole[site], dtype), dtype
            )
            if not keep:
                jax.block_until_ready(merged[name])
                jax.tree.map(lambda leaf: leaf.delete(), weight)
        else:
            merged[name] = plain_weight(name, weight, dtype)
    result = dataclasses.replace(
        base,
        name=f"{base.name} (merged)",
        model=Decoder(
            base.config,
            merged,
            base.model.remat,
            base.model.mesh,
            base.model.attention,
            base.model.logits_mib,
        ),
    )
    difference = largest_difference(before, probe_logits(result.model))
    tokens = PROBE_ROWS * PROBE_LENGTH
    return Merged(result, dtype, difference, tokens, lost, base if keep else None)


def plain_weight(name: str, weight: Any, dtype: str) -> jax.Array:
    """A weight as numbers of `dtype`: dequantised, or cast; norms stay fp32.

    An array that has the dtype already is returned itself.
    """
    kind = jnp.dtype(jnp.float32 if name.endswith("norm") else dtype)
    plain = dequantize(weight, kind)
    return plain if plain.dtype == kind else plain.astype(kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Factors for all L blocks, and which of those they change (bool [L])."""

    low_rank: LowRank
    changed: jax.Array

    @classmethod
    def spread(cls, low_rank: LowRank, depth: int) -> _Blocks:
        layers = range(depth) if low_rank.layers is None else low_rank.layers
        changed = np.isin(np.arange(depth), np.asarray(layers))
        return cls(low_rank.for_all_layers(depth), jnp.asarray(changed))


@functools.partial(jax.jit, static_argnames="dtype")
@strict
def _merge_blocks(weight: Any, blocks: _Blocks, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Returns the merged weight [L, h, o] and what `_checked` reads of each block, fp32 [L, 6]."""
    kind = jnp.dtype(dtype)

    def merge_block(_: None, block: tuple[Any, _Blocks]) -> tuple[None, Any]:
        old, new = block
        plain = plain_weight("", old, "float32")
        delta = new.low_rank.delta()
        exact = plain + delta
        rounded = exact.astype(kind)
        # Said outright: XLA may drop the rounding of a cast to bfloat16 and back.
        bits = jnp.finfo(kind)
        off = jax.lax.reduce_precision(exact, bits.nexp, bits.nmant) - exact
        statistics = jnp.stack(
            [
                jnp.all(jnp.isfinite(delta)).astype(jnp.float32),
                jnp.all(jnp.isfinite(exact)).astype(jnp.float32),
                jnp.all(jnp.isfinite(rounded)).astype(jnp.float32),
                jnp.max(jnp.abs(exact)),
                jnp.sum(delta * delta),
                jnp.sum(off * off),
            ]
        )
        kept = plain_weight("", old, dtype)
        return None, (jnp.where(new.changed, rounded, kept), statistics)

    return jax.lax.scan(merge_block, None, (weight, blocks))[1]


def _checked(
    name: str, blocks: _Blocks, merged: tuple[jax.Array, jax.Array], dtype: str
) -> tuple[jax.Array, float]:
    """Returns the merged weight and the share lost to rounding.

    Raises:
      InputError: if a weight is not finite.
    """
    weight, statistics = merged
    numbers = np.asarray(statistics, np.float64)
    changed = np.asarray(blocks.changed)
    for layer in np.flatnonzero(changed):
        delta, exact, rounded, largest, _, _ = numbers[layer]
        if delta and exact and rounded:
            continue
        if not delta:
            problem = "the adapter's change is not finite: its factors overflow or hold a NaN"
        elif not exact:
            problem = "the sum of weight and change is not finite in float32"
        else:
            problem = f"a value of {largest:.4g} is too large for {dtype}"
        raise InputError(f"cannot merge {name} of layer {layer}: {problem}; nothing was merged")
    size, off = numbers[changed, 4].sum(), numbers[changed, 5].sum()
    return weight, float(np.sqrt(off / size)) if size else 0.0
