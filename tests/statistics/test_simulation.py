import dataclasses

import numpy as np
import pytest
from scipy import special, stats

from mos_jax.statistics.comparison import compare, detectable, difference_errors
from mos_jax.statistics.simulation import (
    Design,
    bootstrap_coverage,
    coverage,
    draw,
    log_odds,
)

REPLICATIONS = 2000


@pytest.mark.parametrize("mean", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.1, 0.8])
@pytest.mark.parametrize("seeds", [3, 4, 5, 8])
def test_intervals_cover_between_92_and_98_percent(seeds, spread, mean):
    found = coverage(Design(seeds, mean, spread), REPLICATIONS, np.random.default_rng(0))
    assert 0.92 <= found.mean <= 0.98
    assert 0.92 <= found.difference <= 0.98
    # The arms are equally good, so a rejection is an error.
    assert 0.02 <= found.rejected <= 0.08


@pytest.mark.parametrize("seeds", [3, 8])
def test_a_true_difference_is_covered_when_seeds_move_together(seeds):
    design = Design(seeds, 0.3, 0.4, difference=0.1, seed_correlation=0.9)
    found = coverage(design, REPLICATIONS, np.random.default_rng(1))
    assert 0.92 <= found.difference <= 0.98
    # Why seeds are paired: as if independent, the interval is far too wide here.
    assert found.independent > 0.98


def test_the_detectable_difference_is_seen_in_80_percent():
    design, rng = Design(5, 0.5, 0.3), np.random.default_rng(2)
    baselines, arms = draw(design, REPLICATIONS, rng)
    _, errors, _ = difference_errors(arms, baselines, paired=True)
    # The repetition whose error is nearest to the design's own.
    typical = int(np.argmin(np.abs(errors - np.sqrt(np.mean(errors**2)))))
    d = detectable(compare(arms[typical], baselines[typical]))
    assert 0.02 < d < 0.2
    found = coverage(dataclasses.replace(design, difference=d), REPLICATIONS, rng)
    assert 0.72 < found.rejected < 0.88


def test_the_crossed_bootstrap_is_too_sure_with_few_seeds():
    design, rng = Design(3, 0.5, 0.8), np.random.default_rng(3)
    assert bootstrap_coverage(design, 400, rng, resamples=200) < 0.9


def test_the_truth_is_the_mean_over_the_population():
    draws = np.random.default_rng(4).normal(log_odds(0.2, 1.7), 1.7, 400_000)
    assert np.mean(special.expit(draws)) == pytest.approx(0.2, abs=0.002)
    baseline, arm = draw(Design(8, 0.2, 0.3, difference=0.3), 500, np.random.default_rng(5))
    assert baseline.shape == (500, 8, 256)
    assert baseline.mean() == pytest.approx(0.2, abs=0.01)
    assert arm.mean() == pytest.approx(0.5, abs=0.01)


def test_seeds_and_items_move_scores_as_they_are_told():
    rng = np.random.default_rng(6)
    still, _ = draw(Design(4, 0.5, 0.0, item_spread=0.0), 300, rng)
    assert still.mean(2).std() == pytest.approx(0.5 / 16, rel=0.1)
    one, other = draw(Design(4, 0.5, 2.0, 0.0, seed_correlation=1.0), 300, rng)
    assert np.corrcoef(one.mean(2).ravel(), other.mean(2).ravel())[0, 1] > 0.95
    assert (
        stats.pearsonr(*(x.mean(2).ravel() for x in draw(Design(4, 0.5, 2.0), 300, rng)))[0] < 0.1
    )
