"""Scores whose truth is known, and how often the intervals cover it.

A seed moves the log-odds of a right answer on all items, an item moves them for all seeds, and the
answer is a coin with those odds. The truth is the mean over all seeds and items that could have
been drawn: a one-dimensional integral, since the sum of both effects is normal.

Axis legend: R replications, s seeds, n items.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import optimize, special, stats

from mos_jax.statistics.comparison import ALPHA, difference_errors
from mos_jax.statistics.crossed import LEVEL, mean_intervals


@dataclasses.dataclass(frozen=True)
class Design:
    """A population of seeds and items, and how many of each are drawn.

    Attributes:
      seeds: s.
      mean: true mean score of the baseline, between 0 and 1.
      seed_spread: standard deviation of the seeds' effects on the log-odds.
      item_spread: the same of the items.
      difference: true mean of the arm minus that of the baseline.
      seed_correlation: of a seed's effects in both arms, 0..1.
      item_correlation: of an item's effects in both arms, 0..1.
      items: n.
    """

    seeds: int
    mean: float
    seed_spread: float
    item_spread: float = 1.5
    difference: float = 0.0
    seed_correlation: float = 0.0
    item_correlation: float = 0.8
    items: int = 256


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How often the 95% intervals held the truth, as shares of the replications.

    Attributes:
      mean: interval of the baseline's mean.
      difference: interval of the difference, seeds paired.
      independent: the same with seeds taken as independent.
      rejected: tests of no difference, seeds paired, with p below 0.05.
      width: mean width of the interval of the mean.
    """

    mean: float
    difference: float
    independent: float
    rejected: float
    width: float


def log_odds(mean: float, spread: float) -> float:
    """The centre of normal log-odds of this spread whose probabilities have this mean."""
    nodes, weights = special.roots_hermitenorm(101)
    weights = weights / weights.sum()
    return float(
        optimize.brentq(lambda x: weights @ special.expit(x + spread * nodes) - mean, -60, 60)
    )


def draw(
    design: Design, replications: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws scores of the baseline and of the arm, each fp64 [R, s, n] of zeros and ones."""
    spread = float(np.hypot(design.seed_spread, design.item_spread))
    seeds = design.seed_spread * _correlated(
        (replications, design.seeds, 1), design.seed_correlation, rng
    )
    items = design.item_spread * _correlated(
        (replications, 1, design.items), design.item_correlation, rng
    )
    shape = (replications, design.seeds, design.items)
    means = (design.mean, design.mean + design.difference)
    baseline, arm = (
        (rng.random(shape, np.float32) < special.expit(log_odds(mean, spread) + a + b)).astype(
            np.float64
        )
        for mean, a, b in zip(means, seeds, items, strict=True)
    )
    return baseline, arm


def coverage(design: Design, replications: int, rng: np.random.Generator) -> Coverage:
    """Draws a design many times and counts how often its intervals hold the truth."""
    baselines, arms = draw(design, replications, rng)
    _, low, high, _ = mean_intervals(baselines)
    held = []
    for paired in (True, False):
        found, error, degrees = difference_errors(arms, baselines, paired)
        half = stats.t.ppf((1 + LEVEL) / 2, degrees) * error
        held.append(np.abs(found - design.difference) <= half)
        if paired:
            rejected = 2 * stats.t.sf(np.abs(found) / error, degrees) < ALPHA
    return Coverage(
        mean=float(np.mean((low <= design.mean) & (design.mean <= high))),
        difference=float(held[0].mean()),
        independent=float(held[1].mean()),
        rejected=float(rejected.mean()),
        width=float(np.mean(high - low)),
    )


def bootstrap_coverage(
    design: Design, replications: int, rng: np.random.Generator, resamples: int = 400
) -> float:
    """The same for the mean with a crossed bootstrap's percentiles, to compare with.

    Seeds and items are both drawn with replacement, independently. All replications share their
    draws, which saves time and does not bias the share.
    """
    tables, _ = draw(design, replications, rng)
    s, n = design.seeds, design.items
    of_seeds = rng.multinomial(s, np.full(s, 1 / s), resamples) / s
    of_items = rng.multinomial(n, np.full(n, 1 / n), resamples) / n
    means = np.einsum("rsb,bs->rb", tables @ of_items.T, of_seeds)
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2], axis=1)
    return float(np.mean((low <= design.mean) & (design.mean <= high)))


def _correlated(shape: tuple[int, ...], correlation: float, rng: np.random.Generator) -> np.ndarray:
    shared, first, second = (rng.standard_normal(shape, np.float32) for _ in range(3))
    own = np.sqrt(1 - correlation)
    return np.stack([np.sqrt(correlation) * shared + own * x for x in (first, second)])
