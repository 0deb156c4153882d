import dataclasses

import numpy as np
import pytest
from scipy import stats

from mos_jax import InputError
from mos_jax.statistics.comparison import (
    compare,
    detectable,
    holm,
    is_non_inferior,
    verdict,
)


def scores(mean, seeds=4, items=256, seed=0):
    return (np.random.default_rng(seed).random((seeds, items)) < mean).astype(float)


def test_a_difference_by_hand():
    arm, baseline = np.array([[0.8, 0.6, 0.9], [0.7, 0.9, 1.0]]), np.array([[0.5, 0.2, 0.1]] * 2)
    found = compare(arm, baseline)
    # Differences: rows 0.3 0.4 0.8 and 0.2 0.7 0.9; row means 0.5, 0.6; column means .25 .55 .85.
    seeds, items, error = 6 * 0.05**2, 2 * 2 * 0.3**2 / 2, 4 * 0.1**2 / 2 * 0.75
    assert found.difference == pytest.approx(0.55)
    # The floor, two items of three, is the larger one here.
    assert (seeds + items - error) / 6 < 2 / 9
    assert found.error == pytest.approx(np.sqrt(2 / 9))
    half = stats.t.ppf(0.975, found.degrees) * found.error
    assert (found.low, found.high) == pytest.approx((max(0.55 - half, -1), min(0.55 + half, 1)))
    assert found.p_value == pytest.approx(2 * stats.t.sf(0.55 / found.error, found.degrees))


def test_one_seed_each_is_the_paired_t_test():
    arm, baseline = scores(0.6, 1), scores(0.5, 1, seed=1)
    found, known = compare(arm, baseline), stats.ttest_rel(arm[0], baseline[0])
    assert not found.carries_seeds
    assert found.p_value == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval(0.95)))


def test_the_sign_follows_the_sides():
    arm, baseline = scores(0.6), scores(0.4, seed=1)
    there, back = compare(arm, baseline), compare(baseline, arm)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.p_value == pytest.approx(back.p_value)


def test_rows_are_paired_by_their_seeds():
    arm, baseline = scores(0.6), scores(0.5, seed=1)
    straight = compare(arm, baseline, [3, 1, 2, 0], [3, 1, 2, 0])
    shuffled = compare(arm, baseline[::-1], [3, 1, 2, 0], [0, 2, 1, 3])
    assert straight.paired
    assert straight == shuffled
    assert straight != compare(arm, baseline[::-1])


def test_other_seeds_are_taken_as_independent():
    arm, baseline = scores(0.6), scores(0.5, 3, seed=1)
    found = compare(arm, baseline)
    assert not found.paired
    assert (found.seeds, found.baseline_seeds) == (4, 3)
    assert not compare(arm[:3], baseline, [0, 1, 2], [1, 2, 3]).paired
    # The order of rows means nothing then.
    assert compare(arm[::-1], baseline).error == pytest.approx(found.error)


def test_a_seed_effect_of_both_sides_cancels_when_paired():
    shift = np.array([[-0.2], [0.0], [0.1], [0.3]])
    arm, baseline = 0.35 + shift + 0.1 * scores(0.6), 0.35 + shift + 0.1 * scores(0.5, seed=1)
    paired, unpaired = compare(arm, baseline), compare(arm, baseline, baseline_seeds=[4, 5, 6, 7])
    assert paired.error * 5 < unpaired.error


@pytest.mark.parametrize("seeds", [1, 4])
def test_arms_that_agree_everywhere_still_have_an_interval(seeds):
    found = compare(np.ones((seeds, 256)), np.ones((seeds, 256)))
    assert (found.difference, found.p_value) == (0, 1)
    assert found.high == -found.low == pytest.approx(stats.t.ppf(0.975, 255) * np.sqrt(2) / 256)
    assert verdict(found).difference.startswith("no difference seen")


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(InputError, match=r"got 1\.2"):
        holm([0.1, 1.2])


def test_verdicts_use_the_corrected_p():
    found = compare(scores(0.75), scores(0.5, seed=1))
    assert str(verdict(found)) == "better"
    assert str(verdict(compare(scores(0.5, seed=1), scores(0.75)))) == "worse"
    unclear = dataclasses.replace(found, p_value=0.01, corrected_p=0.06, arms=6)
    d = detectable(found, 0.05 / 6)
    assert d > detectable(found)
    assert str(verdict(unclear)) == (
        f"no difference seen at this size; would have seen one of {d:.3f}"
    )


def test_non_inferiority_is_about_the_lower_end():
    found = dataclasses.replace(compare(scores(0.5), scores(0.5, seed=1)), low=-0.04)
    assert is_non_inferior(found, 0.05)
    assert not is_non_inferior(found, 0.04)
    assert verdict(found, 0.05).margin == "non-inferior at margin 0.05"
    assert verdict(found, 0.03).margin == "not shown to be non-inferior at margin 0.03"
    assert str(verdict(found, 0.05)).endswith("; non-inferior at margin 0.05")


@pytest.mark.parametrize("margin", [0, -0.05, 1, float("nan")])
def test_margins_that_mean_nothing(margin):
    with pytest.raises(InputError, match="margin must lie"):
        verdict(compare(scores(0.5), scores(0.5)), margin)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="256 items and the baseline 255"):
        compare(scores(0.5), scores(0.5)[:, :-1])
    with pytest.raises(InputError, match="baseline's scores are empty"):
        compare(scores(0.5), [])
    with pytest.raises(InputError, match="one seed for each of 4 rows"):
        compare(scores(0.5), scores(0.5), seeds=[1, 1, 2, 3])
