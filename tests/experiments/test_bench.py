"""The benchmark of training: its arithmetic, and the whole program on tiny sizes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import quickstart
from experiments.bench.report import ONEDNN, STOCK, check_config
from experiments.bench.rounds import check_losses, machine_facts, play, ratio
from experiments.bench.worker import Run, Worker
from mos_jax.errors import InputError, RunEnded
from mos_jax.training.config import RunConfig

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "bench_training.py"


class Recorder:
    """Stands in for a worker: the k-th call in all takes k seconds."""

    def __init__(self, others=()):
        self.calls = []
        self.others = list(others)

    def run(self, contestant):
        self.calls.append(contestant)
        seconds = float(len(self.calls))
        return Run(seconds, self.others.pop(0) if self.others else None, seconds / 2)


class Fragile:
    """A side that tells who it is, or fails as asked."""

    def __init__(self, loss):
        self.loss = loss

    def prepare(self):
        return {"fragile": {"loss": self.loss, "process": os.getpid()}}

    def run(self, contestant):
        if contestant == "input":
            raise InputError("no such thing")
        if contestant == "defect":
            raise ZeroDivisionError("by nought")
        os._exit(9)


def test_order_rotates_and_the_first_round_does_not_count():
    recorder = Recorder()
    played = play([(name, recorder) for name in "abc"], 3, lambda text: None)
    assert recorder.calls == list("abc" + "bca" + "cab" + "abc")
    assert played.seconds == {"a": [6.0, 8.0, 10.0], "b": [4.0, 9.0, 11.0], "c": [5.0, 7.0, 12.0]}
    assert played.others == {name: [0.0] * 3 for name in "abc"}
    assert played.processor == {"a": [3.0, 4.0, 5.0], "b": [2.0, 4.5, 5.5], "c": [2.5, 3.5, 6.0]}


@pytest.mark.parametrize(
    ("others", "calls", "counted"),
    [
        ([0.9, 0.01], 2, 2.0),  # the warm-up round is never repeated
        ([0.0, 0.3, 0.02], 3, 3.0),
        ([0.0, 0.3, 0.2, 0.4], 4, 3.0),
    ],
)
def test_disturbed_runs_are_repeated_and_the_least_disturbed_counts(others, calls, counted):
    recorder = Recorder(others)
    played = play([("a", recorder)], 1, lambda text: None)
    assert len(recorder.calls) == calls
    assert played.seconds == {"a": [counted]}
    assert played.others == {"a": [others[int(counted) - 1]]}


def test_ratios_are_taken_within_a_round():
    # The machine is ten times slower in the second round, for both.
    found = ratio([1.0, 20.0, 3.0], [2.0, 20.0, 2.0], at_most=1.1)
    assert found["rounds"] == [0.5, 1.0, 1.5]
    assert (found["median"], found["min"], found["max"]) == (1.0, 0.5, 1.5)
    assert found["at_most"] == 1.1
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize("other", [1.01, math.nan])
def test_losses_that_differ_end_the_benchmark(other):
    check_losses({"a": {"loss": 1.0}, "b": {"loss": 1.0005}})
    with pytest.raises(RunEnded, match="differ"):
        check_losses({"a": {"loss": 1.0}, "b": {"loss": other}})


def test_a_side_works_in_a_process_of_its_own_and_its_failures_arrive():
    with Worker("tests.experiments.test_bench:Fragile", 1, loss=2.5) as worker:
        facts = worker.prepare()["fragile"]
        assert facts["loss"] == 2.5
        assert facts["process"] != os.getpid()
        with pytest.raises(InputError, match="no such thing"):
            worker.run("input")
        with pytest.raises(RuntimeError, match="by nought"):
            worker.run("defect")
        with pytest.raises(RunEnded, match="status 9"):
            worker.run("die")


def test_configs_that_the_other_side_cannot_follow_are_refused():
    config = quickstart.get_config()
    assert check_config(RunConfig.from_mapping(config.to_dict())).rank == config.adapter.rank
    config.training.dropout = 0.1
    with pytest.raises(InputError, match=r"training\.dropout is 0\.1"):
        check_config(RunConfig.from_mapping(config.to_dict()))
    with pytest.raises(InputError, match="needs 'mos'"):
        check_config(RunConfig.from_mapping(quickstart.get_config("lora").to_dict()))


def test_machine_facts_are_json():
    facts = json.loads(json.dumps(machine_facts(2)))
    assert facts["cores"] == os.cpu_count()
    assert facts["threads"] == 2
    assert facts["versions"]["jax"]


@pytest.mark.parity
def test_products_through_onednn_have_the_gradients_of_mkl():
    torch = pytest.importorskip("torch")
    from experiments.bench.peft_side import PeftDense

    side = PeftDense("tiny-random", 2, [1, 6], 1)
    found = []
    for way in ("peft sdpa", "peft sdpa onednn"):
        side.run(way)
        found.append([p.grad for p in side._model.parameters() if p.requires_grad])
    # LoRA's B is zero, so nothing reaches its A yet.
    assert sum(float(slope.abs().max()) > 0 for slope in found[0]) == len(found[0]) // 2
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parity
def test_quick_benchmark_compares_like_with_like(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "deep" / "bench.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--tries=1", f"--out={out}"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    dense, job = found["dense"], found["job"]
    assert set(dense["contestants"]) == {"base", "lora", "mos", *STOCK, ONEDNN}
    for part in (dense, job):
        contestants = part["contestants"]
        losses = [facts["loss"] for facts in contestants.values()]
        assert max(losses) - min(losses) < 1e-3
        for facts in contestants.values():
            assert len(facts["seconds"]["rounds"]) == 1
            assert facts["seconds"]["min"] > 0
        for name, value in part["ratios"].items():
            assert len(value["rounds"]) == 1
            assert name in done.stdout
    seconds = {name: facts["seconds"]["median"] for name, facts in dense["contestants"].items()}
    processor = {n: facts["processor_seconds"] for n, facts in dense["contestants"].items()}
    found_ratio = dense["ratios"]["mos/base, processor"]["median"]
    assert found_ratio == processor["mos"]["median"] / processor["base"]["median"]
    assert dense["ratios"]["mos/base"]["median"] == seconds["mos"] / seconds["base"]
    assert dense["best_peft"] == min(("peft sdpa", "peft eager"), key=seconds.__getitem__)
    assert dense["contestants"]["mos"]["flops"] == dense["contestants"]["lora"]["flops"]
    assert dense["contestants"]["mos"]["flops"] > dense["contestants"]["base"]["flops"] > 0
    # Every contestant learns from the same examples, in as many steps.
    counts = {(facts["examples"], facts["steps"]) for facts in job["contestants"].values()}
    assert len(counts) == 1
    ours, best = (job["contestants"][name] for name in ("mos", job["best_peft"]))
    rates = [facts["examples"] / facts["seconds"]["median"] for facts in (ours, best)]
    ratio_found = job["ratios"][f"mos/{job['best_peft']}"]
    assert ratio_found["median"] == pytest.approx(rates[0] / rates[1])
    assert ratio_found["at_least"] == 2.0
