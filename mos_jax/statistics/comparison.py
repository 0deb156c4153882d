"""Paired differences of arms against a baseline, and what may be said about them.

All arms answer the same items, so a difference is taken item by item. Where both arms ran the same
seeds it is taken seed by seed too: the table of differences [s, n] is treated as `crossed` treats
scores. Treating the seeds of both arms as independent has twice the degrees of freedom, and where
they are independent its interval is a sixth shorter with 3 seeds and a tenth with 5. But runs of
one seed share their data order, and how much that makes them move together cannot be seen in a
handful of runs: at a correlation of 0.9 the independent form covers up to 100% and hides
differences, where the table of differences keeps between 92 and 98% whatever the correlation
(`results/coverage.md`). So independence is assumed only where there is no choice: where the seeds
of both arms are not the same.

The variance never falls below that of two items having come out otherwise for all seeds, one in
favour of each side, so arms that agree everywhere still have an interval (in the manner of Bonett
and Price, J. Educational and Behavioral Statistics 37, 2012, who add such a pair).

Axis legend: s seeds, n items; functions on arrays allow further axes in front.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from mos_jax.errors import InputError
from mos_jax.statistics.crossed import LEVEL, as_table, combine, item_part, seed_parts

ALPHA = 1 - LEVEL
POWER = 0.8


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm against a baseline on the same items.

    Attributes:
      difference: mean score of the arm minus that of the baseline, -1..1.
      low: lower end of the 95% interval, not corrected for the number of arms.
      high: upper end.
      p_value: two-sided, of no difference, not corrected.
      corrected_p: the same after Holm's correction over the arms of the family.
      arms: number of arms in the family, 1 for a single comparison.
      error: standard error of the difference.
      degrees: its degrees of freedom.
      seeds: runs of the arm.
      baseline_seeds: runs of the baseline.
      items: n.
      paired: whether the seeds were the same and differences were taken seed by seed.
      carries_seeds: whether the interval carries the variance over seeds of both sides; a side with
        a single run shows none.
    """

    difference: float
    low: float
    high: float
    p_value: float
    corrected_p: float
    arms: int
    error: float
    degrees: float
    seeds: int
    baseline_seeds: int
    items: int
    paired: bool
    carries_seeds: bool

    def to_dict(self) -> dict[str, float | int | bool]:
        """JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a comparison shows, in words.

    Attributes:
      difference: "better", "worse", or that none was seen and what would have been.
      margin: "non-inferior at margin m" or "not shown to be non-inferior at margin m"; None where
        no margin was fixed.
    """

    difference: str
    margin: str | None = None

    def __str__(self) -> str:
        return "; ".join(words for words in (self.difference, self.margin) if words)


def difference_errors(
    arms: np.ndarray, baselines: np.ndarray, paired: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences of means, their standard errors and degrees of freedom, each [...].

    Args:
      arms: scores [..., s, n].
      baselines: scores [..., t, n]; t = s when paired.
      paired: whether row k of both comes from one seed.
    """
    n = arms.shape[-1]
    item_differences = arms.mean(-2) - baselines.mean(-2)
    tables = [arms - baselines] if paired else [arms, baselines]
    parts = [seed_parts(table) for table in tables]
    variance, degrees = combine(
        [seeds for seeds, _ in parts],
        item_part(item_differences),
        [error for _, error in parts],
        unseen=2 / n**2,
    )
    return item_differences.mean(-1), np.sqrt(variance), degrees


def compare(
    arm: Any,
    baseline: Any,
    seeds: Sequence[int] | None = None,
    baseline_seeds: Sequence[int] | None = None,
) -> Comparison:
    """Compares an arm with a baseline.

    Args:
      arm: scores [s, n] from 0 to 1, one row for each seed.
      baseline: scores [t, n] on the same items in the same order.
      seeds: which seed each row of `arm` comes from; default: 0, 1, ...
      baseline_seeds: the same for `baseline`. Rows are paired where both have the same seeds, in
        whatever order.

    Raises:
      InputError: if a table cannot be used (as `estimate`), the numbers of items differ, or the
        seeds do not fit the rows.
    """
    table, other = as_table(arm, "the arm's scores"), as_table(baseline, "the baseline's scores")
    if table.shape[1] != other.shape[1]:
        raise InputError(
            f"the arm has {table.shape[1]} items and the baseline {other.shape[1]}; differences "
            "are taken item by item, so both must be scored on the same items"
        )
    ids, other_ids = _seeds_of(table, seeds), _seeds_of(other, baseline_seeds)
    paired = sorted(ids) == sorted(other_ids)
    if paired:
        other = other[[other_ids.index(seed) for seed in ids]]
    found, error, degrees = (float(x) for x in difference_errors(table, other, paired))
    half = float(stats.t.ppf((1 + LEVEL) / 2, degrees)) * error
    p_value = 2 * float(stats.t.sf(abs(found) / error, degrees))
    return Comparison(
        difference=found,
        low=max(found - half, -1.0),
        high=min(found + half, 1.0),
        p_value=p_value,
        corrected_p=p_value,
        arms=1,
        error=error,
        degrees=degrees,
        seeds=len(ids),
        baseline_seeds=len(other_ids),
        items=table.shape[1],
        paired=paired,
        carries_seeds=min(len(ids), len(other_ids)) > 1,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm, Scand. J. Statistics 6, 1979), in given order.

    Raises:
      InputError: if a value is outside 0..1.
    """
    wrong = [p for p in p_values if not 0 <= p <= 1]
    if wrong:
        raise InputError(f"p-values must lie in 0..1, got {wrong[0]!r}")
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[k])
        corrected[k] = min(largest, 1.0)
    return corrected


def detectable(comparison: Comparison, level: float = ALPHA) -> float:
    """The smallest true difference that a design of this kind sees in 80% of all repetitions.

    It is what quantiles of the noncentral t distribution amount to within a percent: the standard
    error times the sum of the quantiles of the two-sided test and of the power. The error is that
    of this comparison, so with few seeds it is itself uncertain.

    Args:
      comparison: gives the standard error and its degrees of freedom.
      level: of the two-sided test.

    Returns:
      The difference, at most 1.
    """
    test = stats.t.ppf(1 - level / 2, comparison.degrees)
    power = stats.t.ppf(POWER, comparison.degrees)
    return min(float(test + power) * comparison.error, 1.0)


def is_non_inferior(comparison: Comparison, margin: float) -> bool:
    """Whether the arm is shown to be worse by less than `margin`, one-sided at 97.5%.

    Args:
      comparison: of the arm with the baseline.
      margin: largest loss that does not matter, in units of the score; fixed before the runs.

    Raises:
      InputError: if the margin is not above 0 and below 1.
    """
    if not 0 < margin < 1:
        raise InputError(f"margin must lie between 0 and 1, got {margin!r}; 0.05 is five points")
    return comparison.low > -margin


def verdict(comparison: Comparison, margin: float | None = None) -> Verdict:
    """Says what a comparison shows at 5%, after correction for the number of arms.

    Where no difference was seen, the one that would have been is that of the test at the strictest
    level of the correction, 5% over the number of arms.

    Args:
      comparison: of the arm with the baseline.
      margin: of non-inferiority, fixed before the runs; None = not asked.

    Raises:
      InputError: as `is_non_inferior`.
    """
    if comparison.corrected_p < ALPHA:
        words = "better" if comparison.difference > 0 else "worse"
    else:
        seen = detectable(comparison, ALPHA / comparison.arms)
        words = f"no difference seen at this size; would have seen one of {seen:.3f}"
    if margin is None:
        return Verdict(words)
    shown = is_non_inferior(comparison, margin)
    return Verdict(
        words, f"{'non-inferior' if shown else 'not shown to be non-inferior'} at margin {margin:g}"
    )


def _seeds_of(table: np.ndarray, seeds: Sequence[int] | None) -> list[int]:
    ids = list(range(len(table))) if seeds is None else [int(seed) for seed in seeds]
    if len(ids) != len(table) or len(set(ids)) < len(ids):
        raise InputError(
            f"need one seed for each of {len(table)} rows of scores, each once; got {ids}"
        )
    return ids
