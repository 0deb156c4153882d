import numpy as np
import pytest

from mos_jax import InputError
from mos_jax.statistics.shares import wilson_interval


def test_interval_of_a_known_share():
    # Newcombe 1998, table I: 81 of 263.
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_interval_at_the_ends():
    assert wilson_interval(0, 20)[0] == 0
    assert wilson_interval(20, 20)[1] == 1
    assert 0 < wilson_interval(0, 20)[1] < 0.2


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_interval_covers_about_as_often_as_it_says(share):
    counts = np.random.default_rng(0).binomial(256, share, 4000)
    covered = [low <= share <= high for low, high in (wilson_interval(int(c), 256) for c in counts)]
    assert 0.935 < np.mean(covered) < 0.975


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (-1, 3), (4, 3)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(InputError, match="successes"):
        wilson_interval(successes, trials)
