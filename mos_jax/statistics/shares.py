"""Intervals for shares of right answers."""

from __future__ import annotations

import math

from mos_jax.errors import InputError

# Two-sided 95% quantile of the normal distribution.
Z95 = 1.959963984540054


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
    share = successes / trials
    denominator = 1 + z * z / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low, high = (centre - half) / denominator, (centre + half) / denominator
    # Rounding must not push the ends past the exact limits at 0 and at all successes.
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)
