"""How much of the memory probe a model holds, in bits.

A value of v tokens drawn from V costs v log2(V) bits to someone who knows only how it was drawn.
Someone who also has the model pays the model's code length of the value given its key, its
negative log likelihood in bits. What the model saves is what it holds.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from mos_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Recall:
    """What a model recalls of n pairs.

    Attributes:
      pairs: n.
      pairs_recalled: those whose value is the model's greedy answer, token by token.
      bits_prior: what the n values hold.
      bits_recalled: sum over pairs of max(0, prior bits - code length). Never below 0 and never
        above `bits_prior`. For each pair the better of model and uniform code is chosen for free;
        naming the choice would cost up to one bit a pair, so it is an upper bound by that much,
        and a model that has learnt nothing may show a little of it. Read it beside the base's.
      bits_counted: pairs recalled times the bits of a pair. It leaves out pairs half known, and
        counts a value in full that is the likeliest of many close ones, so it may lie on either
        side of `bits_recalled`.
    """

    pairs: int
    pairs_recalled: int
    bits_prior: float
    bits_recalled: float
    bits_counted: float

    def to_dict(self) -> dict[str, int | float]:
        """JSON values, beside those of an evaluation, which has the number of pairs."""
        found = dataclasses.asdict(self)
        del found["pairs"]
        return found


def bits_recalled(nats: np.ndarray, scores: np.ndarray, bits_per_pair: float) -> Recall:
    """Counts the bits recalled.

    Args:
      nats: fp64 [n], negative log likelihood of each pair's value given its key.
      scores: fp64 [n], 1 where all its tokens are the most likely ones, else 0.
      bits_per_pair: what a value holds, `MemoryTask.bits_per_pair`.

    Raises:
      InputError: for shapes that differ, a likelihood above 1, a value that is not finite, or
        `bits_per_pair` not above 0.
    """
    if nats.shape != scores.shape or nats.ndim != 1:
        raise InputError(f"need nats and scores of one shape [n], got {nats.shape}, {scores.shape}")
    if not (math.isfinite(bits_per_pair) and bits_per_pair > 0):
        raise InputError(f"bits_per_pair is {bits_per_pair!r}; it must be above 0")
    # Rounding of a logsumexp in fp32 may leave a sure token just below 0.
    if not np.isfinite(nats).all() or (nats < -1e-3).any():
        raise InputError(f"code lengths must be finite and not below 0, got {nats.min()!r} nats")
    saved = bits_per_pair - np.maximum(nats, 0.0) / math.log(2)
    recalled = int(np.sum(scores == 1.0))
    return Recall(
        pairs=len(nats),
        pairs_recalled=recalled,
        bits_prior=len(nats) * bits_per_pair,
        bits_recalled=float(np.maximum(saved, 0.0).sum()),
        bits_counted=recalled * bits_per_pair,
    )
