"""A run that is killed, stopped or starved goes on as if nothing had happened."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from mos_jax import InputError
from mos_jax.errors import RunEnded
from mos_jax.training import loop
from mos_jax.training.endings import Diverged, Stopped, disk_errors_in_words
from mos_jax.training.loop import train
from tests.training.fixtures_training import tiny_mapping, tiny_run, write_data

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)


def run_process(*arguments, wait=True):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("die_at.py")), *map(str, arguments)]
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if not wait:
        return process
    _, errors = process.communicate(timeout=200)
    return process.returncode, errors.decode()


def records(workdir):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_speed(found):
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in found]


@pytest.fixture(scope="module")
def train_path(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, train_path):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    status, errors = run_process(train_path, workdir, "never")
    assert status == 0, errors
    return workdir


def test_killed_again_and_again_it_ends_with_bitwise_the_same_adapter(
    tmp_path, train_path, uninterrupted
):
    workdir = tmp_path / "run"
    moments = [
        ("step:1",),
        ("saving:2", 0),
        ("saving:2", 30),
        ("step:5",),
        ("saving:6", 60),
        ("adapter",),
        ("summary",),
    ]
    for moment in moments:
        status, errors = run_process(train_path, workdir, *moment)
        assert status == -signal.SIGKILL, (moment, errors)
        assert not (workdir / "summary.json").exists()
    status, errors = run_process(train_path, workdir, "never")
    assert status == 0, errors
    for name in ("adapter/adapter.safetensors", "adapter/adapter.json"):
        assert (workdir / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    assert [r["step"] for r in records(workdir)] == [1, 2, 3, 4, 5, 6]
    assert without_speed(records(workdir)) == without_speed(records(uninterrupted))


def test_sigterm_saves_and_says_so_and_the_rest_follows(tmp_path, train_path, monkeypatch):
    """In this process: the handler is the loop's, the signal is real."""
    stop = tiny_run(train_path, dropout=0.1)
    seen = []

    class Killer(loop.Reporter):
        def step(self, step, metrics, tokens, seconds):
            super().step(step, metrics, tokens, seconds)
            seen.append(step)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Reporter", Killer)
        with pytest.raises(Stopped, match=r"SIGTERM: saved step \d of 6 in .*the same") as stopped:
            train(stop, tmp_path / "run", QUIET)
    assert stopped.value.status == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    saved = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()]
    assert max(saved) == max(seen)
    train(stop, tmp_path / "run", QUIET)
    train(stop, tmp_path / "whole", QUIET)
    a, b = (tmp_path / name / "adapter/adapter.safetensors" for name in ("run", "whole"))
    assert a.read_bytes() == b.read_bytes()
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_signal_after_the_last_step_stops_before_the_run_is_finished(
    tmp_path, train_path, monkeypatch
):
    """Such as in the last validation: finishing may take longer than is left before a kill."""
    run, validate = tiny_run(train_path, steps=2), loop.validate

    def told(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return validate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", told)
        with pytest.raises(Stopped, match=r"SIGUSR1: saved step 2 of 2 in .*the same") as stopped:
            train(run, tmp_path / "run", QUIET)
    assert stopped.value.status == 128 + signal.SIGUSR1
    assert not (tmp_path / "run/adapter").exists()
    assert train(run, tmp_path / "run", QUIET)["steps"] == 2


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, train_path):
    run = tiny_run(train_path, learning_rate=1e30, clip_norm=0.0, warmup_share=0.0)
    with pytest.raises(Diverged, match=r"step [23]: loss .*Lower training.learning_rate"):
        train(run, tmp_path / "run", QUIET)
    kept = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()]
    assert all(step <= 2 for step in kept)
    assert not (tmp_path / "run/adapter").exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, train_path, uninterrupted):
    workdir = tmp_path / "run"
    program = (
        "import resource, sys\n"
        "from tests.training import die_at\n"
        "from mos_jax.training.checkpoint import Checkpoints\n"
        "from mos_jax.errors import RunEnded\n"
        "def starve(checkpoints, state, *_):\n"
        "    if int(state.step) == 4:\n"
        "        checkpoints.wait()\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        "die_at.before(Checkpoints, 'save', starve, None)\n"
        "try:\n"
        "    die_at.main(sys.argv[1], sys.argv[2], 'never')\n"
        "except RunEnded as error:\n"
        "    print(error)\n"
        "    sys.exit(9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, train_path, str(workdir)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 9, done.stdout + done.stderr
    assert "could not be written" in done.stdout
    assert "step 2 is kept" in done.stdout
    status, errors = run_process(train_path, workdir, "never")
    assert status == 0, errors
    name = "adapter/adapter.safetensors"
    assert (workdir / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_a_finished_run_returns_its_summary_without_touching_anything(
    uninterrupted, train_path, monkeypatch
):
    monkeypatch.setattr(loop.Session, "create", lambda config: pytest.fail("built a session"))
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    summary = train(tiny_run(train_path, dropout=0.1), uninterrupted, QUIET)
    assert summary["steps"] == 6
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")} == before


def test_another_config_is_refused_and_more_steps_are_not(tmp_path, train_path):
    console = Console(record=True, width=200, file=io.StringIO())
    train(tiny_run(train_path, steps=2), tmp_path / "run", QUIET)
    with pytest.raises(InputError, match=r"learning_rate was 0.003, now 0.1"):
        train(tiny_run(train_path, steps=2, learning_rate=0.1), tmp_path / "run", QUIET)
    summary = train(tiny_run(train_path, steps=4), tmp_path / "run", console)
    assert summary["steps"] == 4
    said = console.export_text()
    assert "training.steps: 2 -> 4" in said
    assert "schedule" in said
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4]
    with pytest.raises(InputError, match=r"is at step 4, beyond training\.steps=3"):
        train(tiny_run(train_path, steps=3), tmp_path / "run", QUIET)


def test_bad_input_writes_nothing(tmp_path, train_path):
    mapping = tiny_mapping(train_path)
    mapping["adapter"]["rank"] = 500
    with pytest.raises(InputError, match="rank=500"):
        train(loop.RunConfig.from_mapping(mapping), tmp_path / "run", QUIET)
    mapping = tiny_mapping(str(tmp_path / "missing.jsonl"))
    with pytest.raises(InputError, match=r"missing\.jsonl"):
        train(loop.RunConfig.from_mapping(mapping), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_a_logger_that_is_missing_is_said_before_anything_is_written(
    tmp_path, train_path, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    mapping = tiny_mapping(train_path)
    mapping["logging"]["wandb_project"] = "mine"
    with pytest.raises(InputError, match=r"'mine', but wandb is not installed"):
        train(loop.RunConfig.from_mapping(mapping), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_at_the_end_keeps_the_training(tmp_path, train_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = tiny_run(train_path, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("mos_jax.training.finish.save_adapter", full)
        with pytest.raises(RunEnded, match=r"No space left.*is kept"):
            train(run, tmp_path / "run", QUIET)
    assert train(run, tmp_path / "run", QUIET)["steps"] == 2
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2]


def test_only_errors_of_a_run_s_files_are_told_as_such(tmp_path):
    """With `filename` where Python gives one: not of a write to a file that is open."""
    folder = tmp_path / "above" / "run"
    of_run = [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied", str(folder / "adapter")),
        PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "above")),
    ]
    for error in of_run:
        with pytest.raises(RunEnded, match=r"above/run cannot be written or read \(.*is kept"):
            with disk_errors_in_words(folder):
                raise error
    others = [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        TimeoutError("the logging service did not answer"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/elsewhere/model.json"),
    ]
    for error in others:
        with pytest.raises(type(error)) as raised, disk_errors_in_words(folder):
            raise error
        assert raised.value is error


def test_two_runs_in_one_folder_refuse_each_other(tmp_path, train_path):
    folder = loop.WorkDir(tmp_path / "run")
    with folder.lock(), pytest.raises(InputError, match="another run is at work"):
        train(tiny_run(train_path), tmp_path / "run", QUIET)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_torn_line_of_metrics_is_dropped(tmp_path):
    from mos_jax.training.metrics import MetricsFile

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    metrics = MetricsFile(path, 1)
    metrics.write({"step": 2, "loss": 0.4})
    metrics.close()
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(1, 1.0), (2, 0.4)]


def test_errors_of_the_disk_reach_the_user_in_words(tmp_path, train_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(RunEnded, match=r"No space left.*no checkpoint is left"):
        train(tiny_run(train_path), tmp_path / "run", QUIET)


def test_killed_from_outside_at_a_random_moment(tmp_path, train_path, uninterrupted):
    workdir = tmp_path / "run"
    process = run_process(train_path, workdir, "never", wait=False)
    deadline = time.monotonic() + 150
    while not (workdir / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    status, errors = run_process(train_path, workdir, "never")
    assert status == 0, errors
    name = "adapter/adapter.safetensors"
    assert (workdir / name).read_bytes() == (uninterrupted / name).read_bytes()
