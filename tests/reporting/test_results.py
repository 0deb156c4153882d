import json
import shutil

import numpy as np
import pytest

from mos_jax import InputError
from mos_jax.reporting.results import load_results
from tests.reporting.demo import SMALL, fill, make_sweep


def stored_scores(folder, arm, seed, rate="0.002"):
    slug = arm.replace(" ", "_")
    file = folder / f"runs/{slug}/final-lr{rate}-seed{seed}/scores.json"
    return json.loads(file.read_text())["test"]


def test_arms_keep_the_order_and_hold_their_runs(small):
    results = load_results([small])
    assert [arm.name for arm in results.arms] == list(SMALL)
    assert results.baselines == ("LoRA e=2",)
    mos = results.arm("MoS")
    assert [record["stage"] for record in mos.tuning] == ["tune"] * 2
    assert sorted(mos.scores) == [0, 1, 2, 3]
    assert mos.seeds == "4"
    np.testing.assert_array_equal(mos.scores[2], stored_scores(small, "MoS", 2))
    assert mos.learning_rate == 2e-3
    assert mos.fact("trained_parameters") == 610_560
    assert mos.median("step_seconds") == 2.2
    assert results.lacking == []
    assert results.lora.name == "LoRA e=2"
    assert results.guess[0] == 0.125


def test_gaps_are_seen_and_nothing_stands_in_for_them(study):
    results = load_results([study])
    assert {
        (record["arm"], record["stage"], record["seed"], record["status"])
        for record in results.lacking
    } == {
        ("-sp", "final", 3, "missing"),
        ("LoRA e=1", "final", 3, "missing"),
        ("LoRA e=1", "final", 2, "failed"),
        ("pure sharing", "tune", 1000, "failed"),
    }
    assert results.arm("-sp").seeds == "3 of 4"
    assert sorted(results.arm("LoRA e=1").scores) == [0, 1]
    assert results.arm("LoRA e=1").unequal
    failed = [t.value for t in results.arm("pure sharing").trials("validation_loss")]
    assert failed.count(None) == 1


def test_curves_are_of_the_steps_that_all_seeds_have(small):
    curve = load_results([small]).arm("MoS").curve("validation_accuracy")
    np.testing.assert_array_equal(curve.steps, [10, 20, 30, 40])
    assert curve.values.shape == (4, 4)
    lines = [
        json.loads(line)
        for line in (small / "runs/MoS/final-lr0.002-seed1/metrics.jsonl").read_text().splitlines()
    ]
    np.testing.assert_allclose(
        curve.values[1], [line["validation_accuracy"] for line in lines if line["step"] % 10 == 0]
    )
    assert load_results([small]).arm("MoS").curve("no such metric") is None


def test_two_sweeps_become_one_report(small, tmp_path):
    other = tmp_path / "other"
    arms = {"MoS": SMALL["MoS"], "LoRA e=2": SMALL["LoRA e=2"]}
    fill(other, make_sweep(other, arms), arms)
    results = load_results([small, other])
    assert [arm.name for arm in results.arms] == [
        "LoRA e=2 [small]", "MoS [small]", "LoRA e=8", "MoS [other]", "LoRA e=2 [other]",
    ]  # fmt: skip
    assert results.baselines == ("LoRA e=2 [small]",)
    assert {record["arm"] for record in results.records} == {arm.name for arm in results.arms}
    assert results.title == "small and other"


def test_sweeps_of_different_budgets_have_none_together(small, tmp_path):
    arms = {"MoS": SMALL["MoS"]}
    fill(tmp_path, make_sweep(tmp_path, arms, budget_rank=1), arms)
    assert load_results([small]).section.budget_rank == 2
    assert load_results([small, tmp_path]).section.budget_rank == 0


def test_arms_that_could_not_be_told_apart_are_refused(small):
    with pytest.raises(InputError, match="have the same last name"):
        load_results([small, small])


def test_baselines_can_be_chosen_and_are_checked(small):
    assert load_results([small], ["MoS", "LoRA e=8"]).baselines == ("MoS", "LoRA e=8")
    with pytest.raises(InputError, match=r"--baseline=Mos is no arm; did you mean 'MoS'"):
        load_results([small], ["Mos"])


def test_a_folder_without_a_sweep_or_a_finished_run_is_refused(small, tmp_path):
    with pytest.raises(InputError, match="holds no sweep"):
        load_results([tmp_path])
    shutil.copy(small / "sweep.json", tmp_path / "sweep.json")
    with pytest.raises(InputError, match="none of 18 runs is finished"):
        load_results([tmp_path])
