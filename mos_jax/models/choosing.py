"""The next token of every row: the likeliest, or sampled, each row in its own way.

What a row gets is a function of its own logits and controls, to the bit, whoever is beside it: work
that no row asks for is left out, and leaving it out changes nothing.

Axis legend: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# The ordered integers that stand for floats, see `_ordered`.
_LOWEST, _HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """How each row's tokens are chosen.

    Attributes:
      temperature: fp32 [B]; 0 is greedy, otherwise logits are divided by it.
      top_p: fp32 [B]; see `keep_likeliest`.
      top_k: int32 [B]; see `keep_likeliest`.
      seed: uint32 [B, 2], of the noise: two words of which either makes another stream.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    seed: jax.Array


def choose(logits: jax.Array, positions: jax.Array, controls: Controls) -> jax.Array:
    """Picks the next token of every row.

    Args:
      logits: fp32 [B, V].
      positions: int32 [B], of the tokens that are picked. The noise is a function of a row's seed
        and of this.
      controls: of the rows.

    Returns:
      int32 [B].
    """
    temperature, top_p, top_k = controls.temperature, controls.top_p, controls.top_k
    sampled = temperature > 0
    narrow = sampled & ((top_p < 1) | (top_k > 0))
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample() -> jax.Array:
        # The largest becomes 0 first, so that no temperature makes two of them infinite.
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
        shifted = shifted / jnp.where(sampled, temperature, jnp.float32(1))[:, None]
        kept = jax.lax.cond(
            jnp.any(narrow),
            lambda: jnp.where(narrow[:, None], keep_likeliest(shifted, top_p, top_k), shifted),
            lambda: shifted,
        )
        # The largest sum with Gumbel noise is a draw from the softmax (arXiv 1611.01144).
        draw = functools.partial(_noise, size=logits.shape[1])
        noise = jax.vmap(draw)(controls.seed, positions)
        drawn = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)
        return jnp.where(sampled, drawn, greedy)

    return jax.lax.cond(jnp.any(sampled), sample, lambda: greedy)


def keep_likeliest(logits: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Sets to -inf all logits [B, V] that are not among the likeliest.

    The `top_k` largest stay, and of these the smallest set whose probability among them reaches
    `top_p` (nucleus sampling, arXiv 1904.09751); logits that are equal stay or go together.

    Args:
      logits: fp32 [B, V].
      top_p: fp32 [B], above 0; from 1 on it leaves all.
      top_k: int32 [B]; 0 leaves all.
    """
    ordered = _ordered(logits)

    # A logit stays as long as those above it are fewer than k, or have less mass than p. So there
    # is a least one that stays, found by halving: cheaper than to sort a vocabulary.
    def few(threshold: jax.Array) -> jax.Array:
        return jnp.sum(ordered > threshold[:, None], axis=-1, dtype=jnp.int32) < top_k

    least = jnp.where(top_k > 0, _first(few, top_k.shape), jnp.int32(_LOWEST))
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    mass = jnp.where(ordered >= least[:, None], mass, jnp.float32(0))
    # A share too small for a normal fp32 would be taken for 0, and nothing has less mass than that.
    share = jnp.maximum(top_p, jnp.float32(np.finfo(np.float32).tiny))
    wanted = share * jnp.sum(mass, axis=-1)

    def light(threshold: jax.Array) -> jax.Array:
        above = jnp.where(ordered > threshold[:, None], mass, jnp.float32(0))
        return jnp.sum(above, axis=-1) < wanted

    nucleus = jnp.where(top_p < 1, _first(light, top_p.shape), jnp.int32(_LOWEST))
    return jnp.where(ordered >= jnp.maximum(least, nucleus)[:, None], logits, -jnp.inf)


def log_probabilities(
    logits: jax.Array, tokens: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Natural logarithms of the probabilities of tokens, and of the likeliest.

    Args:
      logits: fp32 [B, V].
      tokens: int32 [B].
      count: how many of the likeliest; at most V.

    Returns:
      Of the tokens, fp32 [B]; ids of the likeliest, int32 [B, count], likeliest first; and theirs,
      fp32 [B, count].
    """
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - total
    largest, ids = jax.lax.top_k(logits, count)
    return own, ids.astype(jnp.int32), largest - total[:, None]


def _noise(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """Gumbel noise fp32 [size] of one token: seed uint32 [2], position int32 []."""
    # The two words are a key of threefry as they are.
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (size,), jnp.float32)


def _ordered(x: jax.Array) -> jax.Array:
    """Integers in the order of the floats that they stand for: fp32 -> int32."""
    # The bits of negative floats grow with their size. Adding 0 makes -0 equal to 0.
    bits = jax.lax.bitcast_convert_type(x + jnp.float32(0), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(_HIGHEST), bits)


def _first(holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Of each row, the first int32 for which `holds`, which holds for all larger ones."""

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        found = holds(middle)
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    start = jnp.full(shape, _LOWEST, jnp.int32), jnp.full(shape, _HIGHEST, jnp.int32)
    return jax.lax.fori_loop(0, 32, halve, start)[0]
