import json
import math

import numpy as np
import pytest
from scipy import stats

from mos_jax import InputError
from mos_jax.statistics.crossed import Part, combine, estimate, mean_intervals, mean_squares

# Row means 0.5, 0.7; column means 0.3, 0.6, 0.9; additive but for +-0.1 in four cells.
TABLE = np.array([[0.3, 0.4, 0.8], [0.3, 0.8, 1.0]])


def test_mean_squares_by_hand():
    squares = mean_squares(TABLE)
    assert squares.seeds == pytest.approx(3 * 2 * 0.1**2)
    assert squares.items == pytest.approx(2 * 2 * 0.3**2 / 2)
    # Left over: +-0.1, -+0.1, 0.
    assert squares.error == pytest.approx(4 * 0.1**2 / 2)


def test_components_by_hand():
    found = estimate(TABLE)
    assert found.mean == pytest.approx(0.6)
    assert found.seed_variance == pytest.approx((0.06 - 0.02) / 3)
    assert found.item_variance == pytest.approx((0.18 - 0.02) / 2)
    assert found.error_variance == pytest.approx(0.02)
    assert (found.seeds, found.items, found.carries_seeds) == (2, 3, True)


def test_interval_by_hand():
    found = estimate(TABLE)
    # Among three items, one that came out otherwise is more than the variance that is seen.
    one_item = (1 / 3) * (2 / 3) / 2
    assert (0.06 + 0.18 - 0.02) / 6 < one_item
    seeds = 0.06 / stats.chi2.ppf(0.5, 1)
    missing = 6 * one_item - (seeds + 0.16)
    below = seeds**2 / 1 + 0.18**2 / 2 + 0.02**2 / 2 + missing**2 / 2
    degrees = (6 * one_item) ** 2 / below
    assert found.degrees == pytest.approx(degrees)
    # Wilson's ends solve (mean - x)^2 = t^2 x (1 - x) / n for the effective n.
    effective = 3 * (0.6 * 0.4 / 2) / one_item
    t = stats.t.ppf(0.975, degrees)
    for end in (found.low, found.high):
        assert (0.6 - end) ** 2 == pytest.approx(t**2 * end * (1 - end) / effective)


def test_seeds_that_agree_do_not_shrink_the_variance_below_half_of_the_items():
    items, error = Part(np.array(4.0), 10), Part(np.array(3.0), 20)
    variance, _ = combine([Part(np.array(0.0), 2)], items, [error], 1e-9)
    assert variance == 2.0
    variance, degrees = combine([Part(np.array(3.0), 2)], items, [error], 1e-9)
    assert variance == 4.0
    likely = 3 * 2 / stats.chi2.ppf(0.5, 2)
    assert degrees == pytest.approx((likely + 1) ** 2 / (likely**2 / 2 + 16 / 10 + 9 / 20))
    assert combine([], items, [], 5.0)[0] == 5.0


def test_more_spread_between_seeds_widens_the_interval():
    rng = np.random.default_rng(0)
    scores = (rng.random((4, 256)) < 0.5).astype(float)
    apart = np.clip(scores + np.array([[-0.3], [-0.1], [0.1], [0.3]]), 0, 1)
    narrow, wide = estimate(scores), estimate(apart)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert wide.degrees < 10


def test_many_tables_at_once_are_as_one_by_one():
    tables = np.random.default_rng(1).integers(0, 2, (5, 3, 20)).astype(float)
    for k, (mean, low, high, degrees) in enumerate(zip(*mean_intervals(tables), strict=True)):
        one = estimate(tables[k])
        assert (one.mean, one.low, one.high, one.degrees) == pytest.approx(
            (mean, low, high, degrees)
        )


@pytest.mark.parametrize("seeds", [1, 3, 8])
def test_all_right_is_not_certain(seeds):
    found = estimate(np.ones((seeds, 256)))
    t = stats.t.ppf(0.975, 255)
    assert found.high == 1
    assert found.low == pytest.approx(256 / (256 + t**2))
    mirrored = estimate(np.zeros((seeds, 256)))
    assert (mirrored.low, mirrored.high) == pytest.approx((0, 1 - found.low))


def test_one_miss_in_768_is_no_less_certain_than_none():
    scores = np.ones((3, 256))
    scores[0, 0] = 0
    found, perfect = estimate(scores), estimate(np.ones((3, 256)))
    assert 0.97 < found.low < found.mean < found.high < 1
    assert perfect.low == pytest.approx(found.low, abs=0.01)


def test_scores_that_all_agree_in_the_middle_have_some_width():
    found = estimate(np.full((3, 256), 0.5))
    assert 0 < found.high - found.low < 0.05


def test_a_single_seed_gives_the_interval_over_items_and_says_so():
    scores = np.array([[1.0] * 40 + [0.0] * 60])
    found = estimate(scores)
    assert not found.carries_seeds
    assert found.seed_variance is None
    assert found.error_variance is None
    t = stats.t.ppf(0.975, 99)
    assert found.degrees == pytest.approx(99)
    assert (0.4 - found.low) ** 2 == pytest.approx(t**2 * found.low * (1 - found.low) / 100)


def test_it_goes_into_json():
    assert json.loads(json.dumps(estimate(TABLE.tolist()).to_dict()))["items"] == 3


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([], "empty"),
        ([[]], "0 items"),
        ([[1.0]], "at least 2"),
        ([[1, 0], [1, 0, 1]], r"ragged: rows of \[2, 3\]"),
        ([1, 0, 1], "two axes"),
        ([[0.5, 1.5]], r"0\.\.1, got 1.5 at row 0, item 1"),
        ([[0.5, -0.1]], "got -0.1"),
        ([[0.5, math.nan]], "got nan"),
        ([["a", "b"]], "rows of numbers"),
        (3, "rows of numbers"),
    ],
)
def test_tables_that_cannot_be_used(scores, words):
    with pytest.raises(InputError, match=words):
        estimate(scores)
