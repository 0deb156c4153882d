"""Where the report meets the statistics: intervals by arm, differences to a baseline, verdicts."""

from __future__ import annotations

import dataclasses

import numpy as np

from mos_jax.reporting.results import Arm, Results
from mos_jax.statistics.comparison import Comparison, compare, holm, verdict
from mos_jax.statistics.crossed import estimate

# Seeds that must pair before an arm is judged against the baseline.
LEAST_PAIRS = 3


@dataclasses.dataclass(frozen=True)
class Score:
    """The test accuracy of an arm.

    Attributes:
      mean: over the seeds that finished, and items.
      low: lower end of its 95% interval.
      high: upper end.
      seeds: finished seeds.
      planned: seeds that were to be run.
      items: test items.
      over_items_only: whether the interval is of one seed, and so knows nothing of their spread.
    """

    mean: float
    low: float
    high: float
    seeds: int
    planned: int
    items: int
    over_items_only: bool = False


@dataclasses.dataclass(frozen=True)
class Difference:
    """An arm against a baseline, on the seeds that both have.

    Attributes:
      arm: its name.
      mean: arm minus baseline; None where no comparison was made.
      low: lower end of its 95% interval.
      high: upper end.
      p: of no difference, corrected for the number of arms compared with this baseline.
      pairs: seeds that both have.
      verdict: in words, or why there is none.
      non_inferior: in words, or "" when the config fixes no margin.
    """

    arm: str
    mean: float | None
    low: float
    high: float
    p: float | None
    pairs: int
    verdict: str
    non_inferior: str = ""


def arm_scores(results: Results) -> dict[str, Score]:
    """The score of every arm that has a finished run with test scores, from the seeds it has."""
    found = {}
    for arm in results.arms:
        if not arm.scores:
            continue
        one = estimate(list(arm.scores.values()))
        found[arm.name] = Score(
            one.mean, one.low, one.high, one.seeds, len(arm.final), one.items, not one.carries_seeds
        )
    return found


def compare_arms(results: Results, baseline: str) -> list[Difference]:
    """Every other arm against a baseline, each on the seeds that both have.

    An arm with fewer than `LEAST_PAIRS` of them, or with other test items, is not compared, and
    does not count in the correction of the p-values.
    """
    base = results.arm(baseline)
    others = [arm for arm in results.arms if arm.name != baseline]
    pairs = {arm.name: sorted(set(arm.scores) & set(base.scores)) for arm in others}
    refused = {arm.name: _refusal(arm, base, len(pairs[arm.name])) for arm in others}
    compared = {
        arm.name: compare(
            [arm.scores[seed] for seed in pairs[arm.name]],
            [base.scores[seed] for seed in pairs[arm.name]],
        )
        for arm in others
        if not refused[arm.name]
    }
    corrected = holm([one.p_value for one in compared.values()])
    for (name, one), p in zip(list(compared.items()), corrected, strict=True):
        compared[name] = dataclasses.replace(one, corrected_p=p, arms=len(compared))
    margin = results.section.margin or None
    return [
        _difference(arm.name, compared[arm.name], margin)
        if arm.name in compared
        else Difference(
            arm.name, None, np.nan, np.nan, None, len(pairs[arm.name]), refused[arm.name]
        )
        for arm in others
    ]


def _refusal(arm: Arm, base: Arm, pairs: int) -> str:
    """Why an arm is not compared, or ""."""
    if arm.scores and base.scores and arm.data != base.data:
        return f"no verdict: its test items are not those of {base.name}"
    if pairs < LEAST_PAIRS:
        return f"no verdict: only {pairs} of {len(base.final)} seeds pair, {LEAST_PAIRS} are needed"
    return ""


def _difference(arm: str, found: Comparison, margin: float | None) -> Difference:
    words = verdict(found, margin)
    return Difference(
        arm,
        found.difference,
        found.low,
        found.high,
        found.corrected_p,
        found.seeds,
        words.difference,
        words.margin or "",
    )
