"""The mean of scores over seeds and items, with an interval that carries the variance over both.

Scores form a table [s, n]: s runs that differ in their seed answered the same n items. Seeds and
items are both draws from populations (another seed, another question would do as well), and one
cell holds one score: the two-way random-effects layout without replication,

    score[k, i] = mean + seed[k] + item[i] + error[k, i],

with mean squares MS of seeds, items and error, and

    var(mean) = (MS_seeds + MS_items - MS_error) / (s n)

(Searle, Casella and McCulloch, "Variance Components", 1992, chapter 4). Three things make of it an
interval that holds its 95% with 3 to 8 seeds; `results/coverage.md` has the numbers.

  * Degrees of freedom after Satterthwaite (Biometrics Bulletin 2, 1946), in which the mean square
    of the seeds enters as its median-unbiased estimate. With 2 degrees of freedom the plain one is
    too small in 63 of 100 draws, and each time the interval would be too sure of itself twice: by
    its variance and by its quantile.
  * The variance never falls below half of what the items alone bring. A whole would be the usual
    truncation of a negative component, and covers over 98% where seeds and items differ little.
  * The ends are those of Wilson's score interval at the effective number of items that the
    variance amounts to, so they stay within 0..1 and keep their coverage near the ends.

When all scores agree no variance is seen, yet some is there. The variance is never taken below
that of one item having come out the other way for all seeds; at n of n right in every run the
interval is therefore Wilson's of n items, however many seeds there were.

Axis legend: s seeds, n items; functions on arrays allow further axes in front.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from mos_jax.errors import InputError
from mos_jax.statistics.shares import score_ends

LEVEL = 0.95
# Least variance, in units of what the items alone bring.
FLOOR = 0.5


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The mean of a table of scores.

    Attributes:
      mean: mean score, 0..1.
      low: lower end of the 95% interval.
      high: upper end.
      degrees: degrees of freedom of the t quantile.
      seed_variance: variance of the seeds' effects; None with a single seed.
      item_variance: variance of the items' effects; with a single seed it holds the error's too.
      error_variance: variance of what is left in a cell; None with a single seed.
      seeds: s.
      items: n.
      carries_seeds: whether the interval carries the variance over seeds. With a single seed it
        does not: it is then the interval of that one run on other items.
    """

    mean: float
    low: float
    high: float
    degrees: float
    seed_variance: float | None
    item_variance: float
    error_variance: float | None
    seeds: int
    items: int
    carries_seeds: bool

    def to_dict(self) -> dict[str, float | int | bool | None]:
        """JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Part:
    """One term in the variance of a mean, in units of that variance.

    Attributes:
      value: [...], an estimate of the term.
      degrees: its degrees of freedom.
    """

    value: np.ndarray
    degrees: int


@dataclasses.dataclass(frozen=True)
class MeanSquares:
    """Mean squares of tables [..., s, n] with s, n >= 2.

    Attributes:
      seeds: [...], with s - 1 degrees of freedom.
      items: [...], with n - 1.
      error: [...], with (s - 1)(n - 1).
    """

    seeds: np.ndarray
    items: np.ndarray
    error: np.ndarray


def mean_squares(tables: np.ndarray) -> MeanSquares:
    """Splits the sum of squares of [..., s, n] by seeds, items and what is left."""
    s, n = tables.shape[-2:]
    centred = tables - tables.mean((-2, -1), keepdims=True)
    of_seeds = n * np.square(centred.mean(-1)).sum(-1)
    of_items = s * np.square(centred.mean(-2)).sum(-1)
    total = np.square(centred).sum((-2, -1))
    left = np.maximum(total - of_seeds - of_items, 0.0)
    return MeanSquares(of_seeds / (s - 1), of_items / (n - 1), left / ((s - 1) * (n - 1)))


def seed_parts(tables: np.ndarray) -> tuple[Part | None, Part | None]:
    """The terms of seeds and of error in the variance of the means of [..., s, n].

    Both None with a single seed, whose effect cannot be told from the mean.
    """
    s, n = tables.shape[-2:]
    if s < 2:
        return None, None
    squares = mean_squares(tables)
    return (
        Part(squares.seeds / (s * n), s - 1),
        Part(squares.error / (s * n), (s - 1) * (n - 1)),
    )


def item_part(item_means: np.ndarray) -> Part:
    """The term of the items, from each item's mean over the seeds [..., n]."""
    n = item_means.shape[-1]
    return Part(item_means.var(-1, ddof=1) / n, n - 1)


def combine(
    seeds: Sequence[Part | None], items: Part, errors: Sequence[Part | None], unseen: float
) -> tuple[np.ndarray, np.ndarray]:
    """The variance of a mean and its degrees of freedom.

    Args:
      seeds: terms of the seeds, one for each table that the mean is made of.
      items: term of the items.
      errors: terms of the error, which the others count too often.
      unseen: the least that the variance is taken to be, above 0. What is missing up to it counts
        as a term of the items.

    Returns:
      Variance [...] and degrees of freedom [...], at least 1.
    """
    known = [part for part in seeds if part is not None]
    left = [part for part in errors if part is not None]
    error = np.sum([part.value for part in left], axis=0)
    least = FLOOR * np.maximum(items.value, error)
    excess = items.value - error
    variance = np.maximum(np.sum([part.value for part in known], axis=0) + excess, least)
    likely = [part.value * part.degrees / stats.chi2.median(part.degrees) for part in known]
    whole = np.maximum(np.sum(likely, axis=0) + excess, least)
    pieces = [
        *(value**2 / part.degrees for value, part in zip(likely, known, strict=True)),
        *(part.value**2 / part.degrees for part in (items, *left)),
    ]
    missing = np.maximum(unseen - whole, 0.0)
    pieces.append(missing**2 / items.degrees)
    degrees = (whole + missing) ** 2 / np.sum(pieces, axis=0)
    return np.maximum(variance, unseen), np.maximum(degrees, 1.0)


def mean_intervals(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means, lower ends, upper ends and degrees of freedom, each [...], of tables [..., s, n]."""
    n = tables.shape[-1]
    seeds, error = seed_parts(tables)
    one_item = (1 / n) * (1 - 1 / n) / (n - 1)
    variance, degrees = combine([seeds], item_part(tables.mean(-2)), [error], one_item)
    mean = tables.mean((-2, -1))
    # The variance of n coins is p(1 - p) / (n - 1) when estimated with n - 1 degrees of freedom.
    nearby = np.clip(mean, 1 / n, 1 - 1 / n)
    coin = nearby * (1 - nearby) / (n - 1)
    effective = n * coin / variance
    quantile = stats.t.ppf((1 + LEVEL) / 2, degrees)
    low, high = score_ends(mean, effective, quantile)
    return mean, low, high, degrees


def estimate(scores: Any) -> Estimate:
    """The mean of a table of scores with its 95% interval over seeds and items.

    Args:
      scores: [s, n] from 0 to 1, one row for each seed, the same items in each row; a list of
        rows will do.

    Raises:
      InputError: if the table is empty or ragged, has fewer than two items, or holds anything
        outside 0..1.
    """
    table = as_table(scores)
    s, n = table.shape
    mean, low, high, degrees = mean_intervals(table)
    seed_variance = error_variance = None
    item_variance = float(table.mean(0).var(ddof=1))
    if s > 1:
        squares = mean_squares(table)
        error_variance = float(squares.error)
        seed_variance = max(float(squares.seeds - squares.error) / n, 0.0)
        item_variance = max(float(squares.items - squares.error) / s, 0.0)
    return Estimate(
        mean=float(mean),
        low=float(low),
        high=float(high),
        degrees=float(degrees),
        seed_variance=seed_variance,
        item_variance=item_variance,
        error_variance=error_variance,
        seeds=s,
        items=n,
        carries_seeds=s > 1,
    )


def as_table(scores: Any, name: str = "scores") -> np.ndarray:
    """Checks a table of scores and returns it as fp64 [s, n].

    Args:
      scores: what is to be a table.
      name: what to call it in an error.

    Raises:
      InputError: as `estimate`.
    """
    try:
        rows = [np.asarray(row, dtype=np.float64) for row in scores]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} must be rows of numbers, one row for each seed: {error}"
        ) from error
    if not rows:
        raise InputError(f"{name} are empty; need a row of scores for each seed")
    if any(row.ndim != 1 for row in rows):
        raise InputError(
            f"{name} must have two axes, seeds and items; got rows of shape {rows[0].shape}"
        )
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise InputError(f"{name} are ragged: rows of {lengths} items; each seed needs the same")
    if lengths[0] < 2:
        raise InputError(f"{name} have {lengths[0]} items; an interval over items needs at least 2")
    table = np.stack(rows)
    wrong = ~((table >= 0) & (table <= 1))
    if wrong.any():
        seed, item = np.argwhere(wrong)[0]
        raise InputError(
            f"{name} must lie in 0..1, got {table[seed, item]} at row {seed}, item {item}"
        )
    return table
