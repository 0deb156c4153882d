"""Intervals for shares of right answers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mos_jax.errors import InputError

# Two-sided 95% quantile of the normal distribution.
Z95 = 1.959963984540054


def score_ends(
    share: ArrayLike, trials: ArrayLike, quantile: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of Wilson's score interval, elementwise.

    Args:
      share: observed shares, 0..1.
      trials: numbers of trials, above 0; an effective number need not be whole.
      quantile: of the normal or t distribution.

    Returns:
      Lower and upper ends, inside 0..1.
    """
    share, trials = np.asarray(share, np.float64), np.asarray(trials, np.float64)
    weight = np.square(np.asarray(quantile, np.float64)) / trials
    centre = share + weight / 2
    half = np.sqrt(weight * (share * (1 - share) + weight / 4))
    low, high = (centre - half) / (1 + weight), (centre + half) / (1 + weight)
    # Rounding must not push the ends past the exact limits at 0 and at all successes.
    return np.where(share == 0, 0.0, low), np.where(share == 1, 1.0, high)


def wilson_interval(successes: float, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), which stays inside [0, 1].

    Args:
      successes: number of successes, or the sum of scores in [0, 1] (then it is conservative,
        since a score's variance is at most that of a coin with the same mean).
      trials: number of trials, at least 1.
      z: normal quantile; the default gives a 95% interval.

    Returns:
      The lower and the upper end.

    Raises:
      InputError: if `trials` is below 1 or `successes` is outside 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise InputError(f"need 0 <= successes <= trials >= 1, got {successes!r} of {trials!r}")
    low, high = score_ends(successes / trials, trials, z)
    return float(low), float(high)
