"""Runs of two processes with two devices each, which meet on this machine."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from rich.console import Console

from mos_jax.adapters.storage import adapter_arrays, load_adapter
from mos_jax.distributed.hosts import client
from mos_jax.errors import InputError
from mos_jax.training.config import RunConfig
from mos_jax.training.loop import train
from mos_jax.training.session import find_placement
from tests.distributed import hosts_config, hosts_main, hosts_members
from tests.experiments.fixtures_programs import ROOT
from tests.training.fixtures_training import write_data

ENVIRONMENT = {
    "JAX_NUM_CPU_DEVICES": "2",
    "PYTHONPATH": str(ROOT),
    # Programs so small take longest to compile.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    # Where the cache's lock is taken for long, JAX warns and compiles.
    "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache,"
    "ignore:Error writing persistent compilation cache",
}
# Generous: a machine may be busy with other things, and nothing here depends on time.
PATIENCE = 850
pytestmark = pytest.mark.timeout(900)
# Adapter and optimiser divided between the processes, too: their parts are saved by both.
MESH = ("--config.mesh.fsdp=-1", "--config.mesh.tensor=2", "--config.mesh.shard_above_mib=0.0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The folder of the same run on one device."""
    folder = tmp_path_factory.mktemp("alone")
    config = RunConfig.from_mapping(hosts_config.get_config(data).to_dict())
    train(config, folder, Console(quiet=True))
    return folder


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def command(data, folder, *flags):
    config = f"--config={hosts_config.__file__}:{data}"
    return [hosts_main.__file__, config, f"--workdir={folder}", *MESH, *flags]


def start(*words, **environment):
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait(*processes):
    """Status, standard output and standard error of each."""
    try:
        ended = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the tasks of a script
    return [(p.returncode, *texts) for p, texts in zip(processes, ended, strict=True)]


def run_two(data, folder, *flags, own=((), ())):
    words = command(data, folder, *flags)
    meeting = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--lost_after=20")
    return wait(
        *(start(sys.executable, *words, *meeting, f"--process_id={i}", *own[i]) for i in range(2))
    )


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(folder, alone):
    ours, theirs = records(folder), records(alone)
    assert [r["step"] for r in ours] == list(range(1, hosts_config.STEPS + 1))
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(
            [r[name] for r in ours], [r[name] for r in theirs], rtol=1e-5, err_msg=name
        )
    have, want = (adapter_arrays(load_adapter(path / "adapter")) for path in (folder, alone))
    for name, array in want.items():
        assert np.abs(have[name] - array).max() <= 1e-5 * np.abs(array).max(), name
    have, want = (json.loads((path / "summary.json").read_text()) for path in (folder, alone))
    assert have["validation"]["loss"] == pytest.approx(want["validation"]["loss"], rel=1e-5)
    for key in ("base_fingerprint", "adapter_bytes", "data", "budget"):
        assert have[key] == want[key], key


def test_two_processes_do_the_run_of_one_device(data, alone, tmp_path):
    found = run_two(data, tmp_path, "--config.evaluation.samples=1")
    assert [(status, told) for status, _, told in found] == [(0, ""), (0, "")]
    assert_same_run(tmp_path, alone)
    # The first process tells of the run, the second says nothing.
    (_, first, _), (_, second, _) = found
    assert "step 8/8" in first
    assert "what comes after" in first
    # (Gloo's threads tell of connections on every process's standard output, and into each other.)
    assert not re.search("step|loss|adapter|run", second)


def test_a_killed_process_ends_the_other_and_slurm_starts_both_again(data, alone, tmp_path):
    """Through launch/slurm.sh; a stand-in for srun starts two tasks as SLURM would."""
    folder, logs = tmp_path / "run", [tmp_path / name for name in ("0.out", "0.err", "1.out")]
    srun = tmp_path / "srun"
    srun.write_text(
        "#!/usr/bin/env bash\n"
        'SLURM_PROCID=1 SLURM_LOCALID=1 "$@" >>"$LOGS/1.out" 2>&1 &\n'
        'SLURM_PROCID=0 SLURM_LOCALID=0 "$@" >>"$LOGS/0.out" 2>>"$LOGS/0.err"\n'
        "status=$?\n"
        "wait $!\n"
        "second=$?\n"
        "exit $((second > status ? second : status))\n"
    )
    python = tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\nexec {sys.executable} {hosts_main.__file__} "${{@:2}}"\n'
    )
    for program in (srun, python):
        program.chmod(0o755)
    script = start(
        "bash",
        "launch/slurm.sh",
        *command(data, folder, "--lost_after=20")[1:],
        SLURM_JOB_ID="1",
        SLURM_NTASKS="2",
        SLURM_STEP_NODELIST="127.0.0.1",
        JAX_COORDINATOR_PORT=str(free_port()),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYTHON=str(python),
        LOGS=str(tmp_path),
        PAUSE="0",
        KILL="1 4",
    )
    [(status, _, told)] = wait(script)
    out, lost, second = (log.read_text() for log in logs)
    assert status == 0, out + lost + second
    assert told.endswith("launch/slurm.sh: srun ended with status 137; starting again\n")
    assert lost == (
        "error: process 1 of 2 is lost: no sign of life for 20 s; process 0 ends with it. Start "
        "all processes again with the same command; the run goes on from its last checkpoint\n"
    )
    assert "resuming after step 2" in out
    assert_same_run(folder, alone)


def test_processes_that_disagree_name_every_field_and_write_nothing(data, tmp_path):
    own = (["--config.training.seed=3"], ["--config.training.learning_rate=0.5"])
    line = (
        "error: the processes disagree on the config: training.learning_rate is 0.003 in process 0 "
        "and 0.5 in process 1; training.seed is 3 in process 0 and 0 in process 1\n"
    )
    found = run_two(data, tmp_path / "run", own=own)
    assert [(status, told) for status, _, told in found] == [(2, line), (2, line)]
    assert not (tmp_path / "run").exists()


def members(then, count=2):
    port = str(free_port())
    words = (sys.executable, hosts_members.__file__)
    return wait(*(start(*words, str(number), port, then) for number in range(count)))


def test_the_loss_of_the_first_process_is_told_after_jax_s_own_words():
    (killed, _, _), (status, _, told) = members("killed")
    assert (killed, status) == (-signal.SIGKILL, 75)
    last = told.splitlines()[-1]
    assert re.match(r"error: process 0 of 2 is lost: .*; process 1 ends with it\. Start all", last)


def test_an_error_of_one_process_ends_all_with_its_line_and_its_status():
    (first, _, told), (second, _, own) = members("refused")
    assert (first, second) == (2, 2)
    assert own == "error: --workdir is a file\n"
    assert told == "error: process 1 of 2 ended: --workdir is a file\n"


def test_a_process_that_waits_in_vain_gives_up():
    [(status, _, told)] = members("late", count=1)
    assert (status, told.count("\n")) == (75, 1)
    assert re.match(r"error: waited 3 s for the other processes at 127\.0\.0\.1:\d+, and not", told)


def test_several_processes_need_a_mesh(data, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    config = RunConfig.from_mapping(hosts_config.get_config(data).to_dict())
    with pytest.raises(InputError, match="2 processes with 4 devices need a mesh over all of them"):
        find_placement(config)


def test_alone_nothing_of_this_is_there(alone):
    assert jax.process_count() == 1
    with pytest.raises(InputError, match="1 processes, which have not met"):
        client()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watch_")]
