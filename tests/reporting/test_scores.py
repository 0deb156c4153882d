import numpy as np
import pytest

from mos_jax.reporting.results import load_results
from mos_jax.reporting.scores import arm_scores, compare_arms
from mos_jax.statistics.comparison import compare, verdict
from mos_jax.statistics.crossed import estimate
from mos_jax.sweeps.runner import final_runs
from mos_jax.sweeps.tuning import choose_rates
from tests.reporting.demo import SMALL, fill, make_sweep, write_run


@pytest.fixture(scope="module")
def results(study):
    return load_results([study])


def of(found, arm):
    return next(one for one in found if one.arm == arm)


def test_scores_are_from_the_seeds_that_are_there(results):
    found = arm_scores(results)
    assert list(found) == [arm.name for arm in results.arms]
    for arm in results.arms:
        table = np.stack(list(arm.scores.values()))
        one, expected = found[arm.name], estimate(table)
        assert one.mean == pytest.approx(table.mean())
        assert (one.low, one.high) == (expected.low, expected.high)
        assert (one.seeds, one.planned, one.items) == (len(table), 4, 256)
        assert not one.over_items_only
    assert found["LoRA e=1"].seeds == 2


def test_an_arm_with_a_gap_is_compared_on_the_seeds_that_pair(results):
    found = of(compare_arms(results, "LoRA e=2"), "-sp")
    arm, base = results.arm("-sp").scores, results.arm("LoRA e=2").scores
    assert sorted(arm) == [0, 1, 2]
    expected = compare([arm[s] for s in range(3)], [base[s] for s in range(3)])
    assert found.pairs == 3
    assert found.mean == pytest.approx(np.mean([(arm[s] - base[s]).mean() for s in range(3)]))
    assert (found.low, found.high) == (expected.low, expected.high)


def test_with_fewer_than_three_pairs_there_is_no_verdict(results):
    found = compare_arms(results, "LoRA e=2")
    one = of(found, "LoRA e=1")
    assert one.mean is None
    assert one.p is None
    assert one.verdict == "no verdict: only 2 of 4 seeds pair, 3 are needed"
    assert one.non_inferior == ""
    # Against a baseline that lacks seeds nothing is judged.
    assert all(other.mean is None for other in compare_arms(results, "LoRA e=1"))


def test_p_values_are_corrected_for_the_arms_that_were_compared(results):
    found = [one for one in compare_arms(results, "LoRA e=2") if one.mean is not None]
    base = results.arm("LoRA e=2").scores
    raw = []
    for one in found:
        arm = results.arm(one.arm).scores
        seeds = sorted(set(arm) & set(base))
        raw.append(compare([arm[s] for s in seeds], [base[s] for s in seeds]).p_value)
    smallest = int(np.argmin(raw))
    assert len(found) == 7
    assert found[smallest].p == pytest.approx(min(1, 7 * raw[smallest]))
    assert all(one.p >= p for one, p in zip(found, raw, strict=True))


def test_verdicts_and_margin_are_those_of_the_statistics(tmp_path):
    for margin in (0.0, 0.2):
        folder = tmp_path / str(margin)
        fill(folder, make_sweep(folder, rates="", margin=margin))
        results = load_results([folder])
        arm, base = (results.arm(name).scores for name in ("MoS", "LoRA e=2"))
        alone = load_results([folder], ["LoRA e=2"])
        found = of(compare_arms(alone, "LoRA e=2"), "MoS")
        words = verdict(compare(list(arm.values()), list(base.values())), margin or None)
        assert found.non_inferior == (words.margin or "")
        assert ("0.2" in found.non_inferior) == bool(margin)
        assert found.verdict.split(";")[0] in ("better", "worse", "no difference seen at this size")


def test_one_seed_has_an_interval_over_items_and_says_so(tmp_path):
    fill(tmp_path, make_sweep(tmp_path, rates="", seeds=1))
    results = load_results([tmp_path])
    assert all(score.over_items_only for score in arm_scores(results).values())
    assert all("only 1 of 1 seeds" in one.verdict for one in compare_arms(results, "LoRA e=2"))


def test_arms_on_other_items_are_not_paired(tmp_path):
    sweep = make_sweep(tmp_path, rates="")
    for run in final_runs(sweep, choose_rates(sweep, tmp_path)):
        _, accuracy, parameters = SMALL[run.arm]
        other = run.arm == "MoS"
        write_run(tmp_path, run, accuracy, parameters, data="other" if other else "d")
    found = compare_arms(load_results([tmp_path]), "LoRA e=2")
    assert of(found, "MoS").verdict == "no verdict: its test items are not those of LoRA e=2"
    assert of(found, "LoRA e=8").mean is not None
