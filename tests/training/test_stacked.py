"""Runs in one compiled step end as they would have ended alone."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from experiments.bench.stacked import Program
from mos_jax import InputError, load_adapter
from mos_jax.models.tiny import tiny_config
from mos_jax.training import stacked
from mos_jax.training.config import RunConfig
from mos_jax.training.endings import Diverged, Stopped
from mos_jax.training.loop import train
from mos_jax.training.session import Loads
from mos_jax.training.stacked import train_stacked
from tests.training.fixtures_training import tiny_mapping, write_data

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
LORA = {"method": "lora", "rank": 2}


@pytest.fixture(scope="module")
def train_path(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def loads():
    return Loads()


def variants(train_path, *changes, adapter=None, **training):
    """Runs on the tiny base; each of `changes` maps dotted names to values."""
    configs = []
    for change in changes:
        mapping = tiny_mapping(train_path, **training)
        if adapter is not None:
            mapping["adapter"] = dict(adapter)
        for name, value in change.items():
            section, field = name.split(".")
            mapping[section][field] = value
        configs.append(RunConfig.from_mapping(mapping))
    return configs


def folders(root, count):
    return [root / f"run{number}" for number in range(count)]


def records(workdir):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def arrays(workdir):
    return load_file(Path(workdir) / "adapter/adapter.safetensors")


def distance(found, wanted):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.max(np.abs(found - wanted)) / max(np.max(np.abs(wanted)), 1e-30)


def assert_same_run(found, wanted, tolerance=1e-5):
    """Adapters, losses and evaluations of two finished folders."""
    ours, theirs = arrays(found), arrays(wanted)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert distance(array, theirs[name]) <= tolerance, name
    ours, theirs = records(found), records(wanted)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    assert [r.keys() for r in ours] == [r.keys() for r in theirs]
    for name in ("loss", "gradient_norm"):
        assert distance([r[name] for r in ours], [r[name] for r in theirs]) <= tolerance
    assert ours[-1]["validation_loss"] == pytest.approx(theirs[-1]["validation_loss"], rel=1e-5)
    for name in ("config.json", "scores.json"):
        assert json.loads((found / name).read_text()) == json.loads((wanted / name).read_text())


# In its first steps AdamW divides a gradient by its own size, so that where the gradient is nothing
# but rounding, the step is too. An eps above that rounding keeps single entries from jumping.
GROUPS = {
    "routing seeds of MoS, with dropout": (
        None,
        {"dropout": 0.2, "eps": 1e-5},
        ({"adapter.routing_seed": 0}, {"adapter.routing_seed": 5, "training.seed": 3}),
    ),
    "rates of LoRA": (
        LORA,
        {"weight_decay": 0.01},
        ({"training.learning_rate": 3e-3}, {"training.learning_rate": 1e-2, "training.seed": 1}),
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_stacked_runs_equal_the_separate_ones(tmp_path, train_path, loads, name):
    adapter, training, changes = GROUPS[name]
    configs = variants(train_path, *changes, adapter=adapter, **training)
    together, alone = folders(tmp_path / "together", 2), folders(tmp_path / "alone", 2)
    summaries = train_stacked(configs, together, QUIET, loads)
    for config, ours, theirs, summary in zip(configs, together, alone, summaries, strict=True):
        expected = train(config, theirs, QUIET, loads)
        assert_same_run(ours, theirs)
        own = {"compiled", "seconds", "adapter_bytes", "stacked", "validation"}
        assert {k: v for k, v in summary.items() if k not in own} == {
            k: v for k, v in expected.items() if k not in own
        }
        assert summary["stacked"]["runs"] == 2
        assert summary["seconds"].keys() == expected["seconds"].keys()
        assert json.loads((ours / "summary.json").read_text()) == summary
        assert load_adapter(ours / "adapter").config == config.adapter
    # The members are different runs, or equality would say little.
    first, second = map(arrays, together)
    assert all(not np.array_equal(first[k], second[k]) for k in first if "scaling" not in k)


def test_a_finished_group_is_not_touched_and_more_steps_go_on(tmp_path, train_path, loads):
    changes = ({"training.seed": 0}, {"training.seed": 1})
    configs = variants(train_path, *changes, steps=2)
    places = folders(tmp_path, 2)
    train_stacked(configs, places, QUIET, loads)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert [s["steps"] for s in train_stacked(configs, places, QUIET, loads)] == [2, 2]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    # One that is finished already is left out.
    third = variants(train_path, {"training.seed": 2}, steps=2)
    train_stacked([*configs, *third], [*places, tmp_path / "third"], QUIET, loads)
    assert {p: p.stat().st_mtime_ns for p in before if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }
    longer = variants(train_path, *changes, steps=4)
    assert [s["steps"] for s in train_stacked(longer, places, QUIET, loads)] == [4, 4]
    assert [r["step"] for r in records(places[1])] == [1, 2, 3, 4]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training import die_at
from tests.training.test_stacked import QUIET, folders, variants
from mos_jax.training import finish, stacked
from mos_jax.training.metrics import Reporter
train_path, root, moment = sys.argv[1:]
if moment == "step":
    die_at.before(Reporter, "step", lambda _, step, *__: step == 5, die_at.die)
elif moment == "finish":
    calls = []
    die_at.before(stacked, "finish", lambda *_: calls.append(0) or len(calls) == 2, die_at.die)
configs = variants(train_path, {"training.seed": 0}, {"training.seed": 1}, dropout=0.1)
stacked.train_stacked(configs, folders(Path(root), 2), QUIET)
"""


def test_a_killed_group_goes_on_as_if_nothing_had_happened(tmp_path, train_path):
    def call(root, moment):
        return subprocess.run(
            [sys.executable, "-c", KILLED, train_path, str(root), moment],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )

    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for moment in ("step", "finish"):
        done = call(torn, moment)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert (torn / "run0/summary.json").exists()
    assert not (torn / "run1/summary.json").exists()
    stamp = (torn / "run0/summary.json").stat().st_mtime_ns
    for root in (torn, whole):
        done = call(root, "never")
        assert done.returncode == 0, done.stderr
    assert (torn / "run0/summary.json").stat().st_mtime_ns == stamp
    for name in ("run0", "run1"):
        assert_same_run(torn / name, whole / name, tolerance=0.0)


def test_sigterm_saves_the_group(tmp_path, train_path, loads, monkeypatch):
    configs = variants(train_path, {"training.seed": 0}, {"training.seed": 1}, steps=3)

    class Killer(stacked.Reporter):
        def step(self, step, *rest):
            super().step(step, *rest)
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("mos_jax.training.loop.Reporter", Killer)
        with pytest.raises(Stopped, match=r"SIGTERM: saved step \d of 3 in .*group"):
            train_stacked(configs, folders(tmp_path, 2), QUIET, loads, group=tmp_path / "group")
    assert (tmp_path / "group/checkpoints").exists()
    train_stacked(configs, folders(tmp_path, 2), QUIET, loads, group=tmp_path / "group")
    assert [r["step"] for r in records(tmp_path / "run0")] == [1, 2, 3]


def test_a_run_that_diverges_leaves_the_others_as_they_were(tmp_path, train_path, loads):
    wild = {"clip_norm": 0.0, "warmup_share": 0.0, "steps": 5}
    changes = (
        {"training.learning_rate": 3e-3},
        {"training.learning_rate": 1e30},
        {"training.learning_rate": 1e-2, "training.seed": 1},
    )
    configs = variants(train_path, *changes, **wild)
    places = folders(tmp_path, 3)
    found = train_stacked(configs, places, QUIET, loads)
    assert isinstance(found[1], Diverged)
    assert "Lower training.learning_rate" in str(found[1])
    error = json.loads((places[1] / "error.json").read_text())
    assert error == {"error": str(found[1]), "type": "Diverged"}
    assert not (places[1] / "summary.json").exists()
    assert not (places[1] / "adapter").exists()
    assert all(math.isfinite(r["loss"]) for r in records(places[1]))
    assert not (places[0] / "error.json").exists()
    assert found[2]["steps"] == 5
    train(configs[0], tmp_path / "alone", QUIET, loads)
    assert_same_run(places[0], tmp_path / "alone")
    # Called again, nothing is trained again, and what diverged is still said.
    again = train_stacked(configs, places, QUIET, loads)
    assert str(again[1]) == str(found[1])
    assert again[0] == found[0]


def test_a_group_that_diverges_as_a_whole_ends_early(tmp_path, train_path, loads):
    rates = ({"training.learning_rate": 1e30}, {"training.learning_rate": 2e30})
    configs = variants(train_path, *rates, clip_norm=0.0, warmup_share=0.0, steps=50)
    found = train_stacked(configs, folders(tmp_path, 2), QUIET, loads)
    assert all(isinstance(one, Diverged) for one in found)
    assert max(r["step"] for r in records(tmp_path / "run0")) < 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training.steps": 7}, r"runs 0 and 1 cannot be stacked: training.steps is 6 and 7"),
        ({"training.dropout": 0.5}, r"training.dropout is 0.0 and 0.5; only training.seed, "),
        ({"adapter.rank": 4}, r"adapter.rank is 3 and 4"),
        ({"data.batch_size": 1}, r"data.batch_size is 2 and 1"),
        ({"base.remat": "full"}, r"base.remat is 'products' and 'full'"),
        ({}, r"runs 0 and 1 are the same"),
    ],
)
def test_runs_that_differ_in_more_are_refused_by_name(tmp_path, train_path, change, words):
    configs = variants(train_path, {}, change)
    with pytest.raises(InputError, match=words):
        train_stacked(configs, folders(tmp_path / "runs", 2), QUIET)
    assert not (tmp_path / "runs").exists()


def test_other_bad_input_is_refused_before_anything_is_written(tmp_path, train_path, monkeypatch):
    configs = variants(train_path, {}, {"training.seed": 1})
    places = folders(tmp_path / "runs", 2)
    with pytest.raises(InputError, match="no runs to stack"):
        train_stacked([], [], QUIET)
    with pytest.raises(InputError, match="2 runs and 1 folders"):
        train_stacked(configs, places[:1], QUIET)
    with pytest.raises(InputError, match="share the folder"):
        train_stacked(configs, [places[0], places[0]], QUIET)
    logged = [
        dataclasses.replace(c, logging=dataclasses.replace(c.logging, wandb_project="mine"))
        for c in configs
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(InputError, match="'mine', but stacked runs cannot log"):
        train_stacked(logged, places, QUIET)
    assert not (tmp_path / "runs").exists()


def test_folders_of_other_groups_and_of_runs_at_work_are_refused(tmp_path, train_path, loads):
    changes = ({"training.seed": 0}, {"training.seed": 1}, {"training.seed": 2})
    configs = variants(train_path, *changes, steps=1)
    places = folders(tmp_path, 3)
    place = stacked.WorkDir(tmp_path / "group")
    for busy in (stacked.WorkDir(places[1]), place):
        with busy.lock(), pytest.raises(InputError, match="another run is at work"):
            train_stacked(configs[:2], places[:2], QUIET, loads, group=place.path)
    assert not (places[0] / "config.json").exists()
    train_stacked(configs[:2], places[:2], QUIET, loads, group=place.path)
    with pytest.raises(InputError, match="not the runs to train"):
        train_stacked(configs[1:], places[1:], QUIET, loads, group=place.path)


@pytest.mark.parametrize("runs", [2, 4])
def test_stacking_multiplies_the_work_and_reads_the_base_once(train_path, runs):
    (config,) = variants(train_path, {})
    batch = Loads().data(config.data, Loads().base(config.base)).source(0)[0]
    alone, together = (
        Program.build(config, tiny_config(), batch, count).traced() for count in (0, runs)
    )
    assert together["flops"] == runs * alone["flops"]
    assert together["weight_bytes"] == alone["weight_bytes"] > 0
