import io
import json
import shutil

import pytest
from rich.console import Console

from mos_jax.errors import InputError
from mos_jax.sweeps.combinators import arm
from mos_jax.sweeps.execute import Task, execute, status_of
from mos_jax.sweeps.executors import LocalExecutor
from mos_jax.sweeps.records import flatten, read_curve, read_records
from mos_jax.sweeps.runner import group, load_sweep, run_sweep
from mos_jax.sweeps.tuning import choose_rates
from mos_jax.training.loop import train
from mos_jax.training.workdir import WorkDir
from tests.sweeps.fixtures_sweeps import ITEMS, Pretend, tiny_sweep


def run(sweep, folder, executor=None, **options):
    console = Console(file=io.StringIO(), width=200)
    counts = run_sweep(sweep, folder, executor or Pretend(), console, **options)
    return counts, console.file.getvalue()


def test_tuning_comes_first_and_the_best_rate_is_used(tmp_path):
    executor = Pretend(best=1e-2)
    counts, text = run(tiny_sweep(), tmp_path, executor)
    assert executor.ran == [
        "lora/tune-lr0.001-seed1000",
        "lora/tune-lr0.01-seed1000",
        "mos/tune-lr0.001-seed1000",
        "mos/tune-lr0.01-seed1000",
        "lora/final-lr0.01-seed0",
        "mos/final-lr0.01-seed0",
        "lora/final-lr0.01-seed1",
        "mos/final-lr0.01-seed1",
    ]
    assert counts == {"finished": 4, "failed": 0, "missing": 0}
    assert "8/8 mos/final-lr0.01-seed1: test accuracy 0.500" in text
    chosen = json.loads((tmp_path / "learning_rates.json").read_text())
    assert chosen["lora"]["learning_rate"] == 0.01
    assert set(chosen["lora"]["tried"]) == {"0.001", "0.01"}
    assert chosen["lora"]["tried"]["0.01"] == {"loss": 0.0, "accuracy": 0.5, "runs": 1}


def test_a_finished_sweep_runs_nothing_and_more_seeds_only_add(tmp_path):
    run(tiny_sweep(), tmp_path)
    again = Pretend()
    run(tiny_sweep(), tmp_path, again)
    assert again.ran == []
    more = Pretend()
    run(tiny_sweep(seeds=3), tmp_path, more)
    assert more.ran == ["lora/final-lr0.01-seed2", "mos/final-lr0.01-seed2"]


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    first = Pretend(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_sweep(), tmp_path, first)
    second = Pretend()
    run(tiny_sweep(), tmp_path, second)
    assert len(first.ran) == 5
    assert len(first.ran + second.ran) == len({*first.ran, *second.ran}) == 8


def test_a_failed_run_is_recorded_and_stops_nothing(tmp_path):
    failing = Pretend(fails=["mos/final-lr0.01-seed0"])
    counts, text = run(tiny_sweep(), tmp_path, failing)
    assert counts == {"finished": 3, "failed": 1, "missing": 0}
    assert "failed (pretended)" in text
    resting = Pretend()
    run(tiny_sweep(), tmp_path, resting)
    assert resting.ran == []
    retried = Pretend()
    counts, _ = run(tiny_sweep(), tmp_path, retried, retry_failed=True)
    assert retried.ran == ["mos/final-lr0.01-seed0"]
    assert counts["finished"] == 4


def test_a_rate_that_failed_is_not_chosen_and_an_arm_without_a_rate_has_failed(tmp_path):
    failing = Pretend(best=1e-2, fails=["lora/tune-lr0.01", "mos/tune"])
    counts, _ = run(tiny_sweep(), tmp_path, failing)
    assert [name for name in failing.ran if "final" in name] == [
        "lora/final-lr0.001-seed0",
        "lora/final-lr0.001-seed1",
    ]
    assert counts == {"finished": 2, "failed": 2, "missing": 0}
    records = [r for r in read_records(tmp_path) if r["arm"] == "mos" and r["stage"] == "final"]
    assert {r["error"] for r in records} == {"no learning rate of this arm worked"}
    retried = Pretend(best=1e-3)
    counts, _ = run(tiny_sweep(), tmp_path, retried, retry_failed=True)
    assert counts["finished"] == 4


def test_a_rate_whose_loss_is_no_number_is_not_chosen(tmp_path):
    run(tiny_sweep(), tmp_path, Pretend(best=1e-3))
    file = tmp_path / "runs/lora/tune-lr0.001-seed1000/summary.json"
    summary = json.loads(file.read_text())
    summary["validation"]["loss"] = float("nan")
    file.write_text(json.dumps(summary))
    assert choose_rates(tiny_sweep(), tmp_path)["lora"].learning_rate == 1e-2


def test_accuracy_decides_when_asked_and_loss_breaks_ties(tmp_path):
    run(tiny_sweep(), tmp_path, Pretend(best=1e-2))
    assert choose_rates(tiny_sweep(), tmp_path)["lora"].learning_rate == 1e-2
    worse = tmp_path / "runs/lora/tune-lr0.001-seed1000/summary.json"
    summary = json.loads(worse.read_text())
    summary["validation"]["accuracy"] = 0.9
    worse.write_text(json.dumps(summary))
    by_accuracy = tiny_sweep(tuning_metric="accuracy")
    assert choose_rates(by_accuracy, tmp_path)["lora"].learning_rate == 1e-3
    assert choose_rates(by_accuracy, tmp_path)["mos"].learning_rate == 1e-2
    assert choose_rates(tiny_sweep(), tmp_path)["lora"].learning_rate == 1e-2


def test_the_folder_of_another_sweep_is_refused(tmp_path):
    run(tiny_sweep(), tmp_path)
    with pytest.raises(InputError, match=r"another sweep: training.steps was 3, now 4"):
        run(tiny_sweep(training={"steps": 4}), tmp_path)
    with pytest.raises(InputError, match="another sweep: arm 'mos' is gone"):
        run(tiny_sweep(ITEMS[:1]), tmp_path)
    changed = [ITEMS[0], arm("mos", method="mos", equivalent_rank=2, rank=4)]
    with pytest.raises(InputError, match=r"arm 'mos': adapter\.rank was 3, now 4"):
        run(tiny_sweep(changed), tmp_path)
    rates = [ITEMS[0], {**ITEMS[1], "sweep.learning_rates": "1e-3"}]
    with pytest.raises(InputError, match="arm 'mos': its learning rates"):
        run(tiny_sweep(rates), tmp_path)
    with pytest.raises(InputError, match=r"sweep\.seeds shrinks"):
        run(tiny_sweep(seeds=1), tmp_path)
    with pytest.raises(InputError, match=r"another sweep: sweep\.baseline was '', now 'mos'"):
        run(tiny_sweep(baseline="mos"), tmp_path)
    with pytest.raises(InputError, match=r"another sweep: .*sweep\.learning_rates"):
        run(tiny_sweep(learning_rates="1e-3"), tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    with pytest.raises(InputError, match=r"holds no sweep but thesis\.txt"):
        run(tiny_sweep(), other)


def test_a_sweep_stored_before_a_field_existed_goes_on(tmp_path):
    run(tiny_sweep(), tmp_path)
    file = tmp_path / "sweep.json"
    stored = json.loads(file.read_text())
    del stored["config"]["evaluation"]["compare_base"]
    del stored["config"]["training"]["b2"]
    file.write_text(json.dumps(stored))
    again = Pretend()
    run(tiny_sweep(), tmp_path, again)
    assert again.ran == []
    with pytest.raises(InputError, match=r"training\.b2 was 0\.999, now 0\.9"):
        run(tiny_sweep(training={"b2": 0.9}), tmp_path)


def test_a_rate_does_not_change_once_the_test_set_was_used(tmp_path):
    """A tuning run that failed and is tried again may speak for another rate."""
    run(tiny_sweep(), tmp_path, Pretend(best=1e-2, fails=["lora/tune-lr0.01"]))
    used = "'lora' now speak for the rate 0.01, but 2 reported runs at 0.001 have used"
    with pytest.raises(InputError, match=used):
        run(tiny_sweep(), tmp_path, Pretend(best=1e-2), retry_failed=True)
    assert not (tmp_path / "runs/lora/final-lr0.01-seed0").exists()
    shutil.rmtree(tmp_path / "runs/lora/final-lr0.001-seed0")
    shutil.rmtree(tmp_path / "runs/lora/final-lr0.001-seed1")
    counts, _ = run(tiny_sweep(), tmp_path, Pretend(best=1e-2))
    assert counts["finished"] == 4


def test_a_group_cut_short_is_tried_again_as_it_was(tmp_path):
    """Its checkpoint is named after its runs, those that are finished too."""
    sweep = tiny_sweep(stack=2)
    run(sweep, tmp_path)
    shutil.rmtree(tmp_path / "runs/mos/final-lr0.01-seed1")
    again = Pretend()
    _, text = run(sweep, tmp_path, again)
    assert again.ran == ["mos/final-lr0.01-seed0", "mos/final-lr0.01-seed1"]
    assert "8/8 mos/final-lr0.01-seed1" in text


def test_two_sweeps_at_once_in_one_folder_refuse_each_other(tmp_path):
    with WorkDir(tmp_path).lock(), pytest.raises(InputError, match="another run is at work in"):
        run(tiny_sweep(), tmp_path)


def test_runs_that_differ_in_seed_and_rate_are_grouped():
    sweep = tiny_sweep(seeds=3)
    assert [len(part) for part in group(sweep.final(), 2)] == [2, 1, 2, 1]
    assert [len(part) for part in group(sweep.tuning(), 8)] == [2, 2]
    assert [len(part) for part in group(sweep.final(), 1)] == [1] * 6
    for part in group([*sweep.tuning(), *sweep.final()], 8):
        assert len({(r.arm, r.stage) for r in part}) == 1


def test_records_hold_every_run_and_missing_ones_as_missing(tmp_path):
    sweep = tiny_sweep()
    failing = Pretend(fails=["lora/final-lr0.01-seed1"])
    run(sweep, tmp_path, failing)
    lost = tmp_path / "runs/mos/final-lr0.01-seed1"
    lost.rename(tmp_path / "elsewhere")
    records = read_records(tmp_path)
    assert [r["stage"] for r in records] == ["tune"] * 4 + ["final"] * 4
    status = {(r["arm"], r["seed"]): r["status"] for r in records[4:]}
    assert status == {
        ("lora", 0): "finished",
        ("mos", 0): "finished",
        ("lora", 1): "failed",
        ("mos", 1): "missing",
    }
    found = next(r for r in records if (r["arm"], r["stage"], r["seed"]) == ("mos", "final", 0))
    assert found["test_scores"] == [1.0, 0.0, 1.0, 0.0]
    assert (found["trained_parameters"], found["budget_ratio"]) == (120, 1.0)
    assert (found["train_loss"], found["temp_bytes"], found["step_seconds"]) == (1.0, 7, 0.5)
    assert found["config"]["adapter.shards_per_vector"] == 2
    assert found["method"] == "mos"
    assert [line["loss"] for line in read_curve(tmp_path, found)] == [2.0, 1.0]
    failed = next(r for r in records if r["status"] == "failed")
    assert (failed["error"], failed["test_accuracy"]) == ("pretended", None)
    assert load_sweep(tmp_path).to_dict() == sweep.to_dict()
    (tmp_path / "runs/lora/final-lr0.01-seed0/scores.json").unlink()
    with pytest.raises(InputError, match=r"scores\.json is missing, though"):
        read_records(tmp_path)


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no sweep: sweep\.json is missing"):
        read_records(tmp_path)
    (tmp_path / "sweep.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="is not the file of a sweep"):
        read_records(tmp_path)


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_a_run_that_another_process_works_on_is_not_judged(tmp_path):
    sweep = tiny_sweep(ITEMS[:1], learning_rates="", seeds=1)
    (only,) = sweep.final()
    with WorkDir(tmp_path / only.folder).lock():
        assert execute(Task.of(tmp_path, [only])) == ["missing"]
    assert "another run is at work" in (tmp_path / only.folder / "log.txt").read_text()


@pytest.mark.slow
def test_real_runs_are_those_of_the_training_loop(tmp_path):
    """A task of the executor ends as `train` would have ended, scores included."""
    sweep = tiny_sweep(ITEMS[:1], learning_rates="", seeds=1)
    (only,) = sweep.final()
    folder = tmp_path / only.folder
    assert execute(Task.of(tmp_path, [only])) == ["finished"]
    alone = train(only.config, tmp_path / "alone", Console(file=io.StringIO()))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation"] == alone["validation"]
    assert summary["test"] == alone["test"]
    assert "base" not in summary["test"]
    scores = json.loads((folder / "scores.json").read_text())
    assert (len(scores["validation"]), len(scores["test"])) == (8, 8)
    assert sum(scores["test"]) / 8 == summary["test"]["adapter"]["accuracy"]
    assert "step 3/3" in (folder / "log.txt").read_text()
    # The same two seeds in one compiled step.
    pair = tiny_sweep(ITEMS[1:], learning_rates="", seeds=2, stack=2)
    counts, text = run(pair, tmp_path / "pair", LocalExecutor())
    assert counts["finished"] == 2
    assert "2/2 mos/final" in text
    records = read_records(tmp_path / "pair")
    assert {r["status"] for r in records} == {"finished"}
    assert len({r["routing_checksum"] for r in records}) == 2
    hot = tiny_sweep(ITEMS[:1], learning_rates="1e38", seeds=1)
    (diverging,) = hot.final()
    assert execute(Task.of(tmp_path, [diverging])) == ["failed"]
    error = json.loads((tmp_path / diverging.folder / "error.json").read_text())
    assert error["type"] == "Diverged"
    assert "loss" in error["error"]
    assert status_of(tmp_path / diverging.folder) == "failed"
