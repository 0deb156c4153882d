"""Runs of two processes with two devices each, which meet on this machine."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from mos_jax.adapters.storage import adapter_arrays, load_adapter
from mos_jax.distributed.hosts import client
from mos_jax.errors import InputError
from mos_jax.training.config import RunConfig
from mos_jax.training.loop import train
from mos_jax.training.lr_find import find_rate
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


def run_two(data, folder, *flags, own=((), ()), **environment):
    words = command(data, folder, *flags)
    meeting = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--lost_after=20")
    return wait(
        *(
            start(sys.executable, *words, *meeting, f"--process_id={i}", *own[i], **environment)
            for i in range(2)
        )
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
    # Two samples are divided over the rows of the mesh.
    found = run_two(data, tmp_path / "run", "--config.evaluation.samples=2")
    assert [(status, told) for status, _, told in found] == [(0, ""), (0, "")]
    assert_same_run(tmp_path / "run", alone)
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
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


def test_a_killed_first_process_is_told_and_another_number_of_hosts_goes_on(data, alone, tmp_path):
    (killed, _, _), (status, _, told) = run_two(data, tmp_path, KILL="0 4")
    assert (killed, status) == (-signal.SIGKILL, 75)
    # JAX's client has its own words before.
    last = told.splitlines()[-1]
    assert re.match(r"error: process 0 of 2 is lost: .*; process 1 ends with it\. Start all", last)
    said = io.StringIO()
    config = RunConfig.from_mapping(hosts_config.get_config(data).to_dict())
    train(config, tmp_path, Console(file=said, width=200))
    assert "resuming after step 2" in said.getvalue()
    assert_same_run(tmp_path, alone)


def test_a_folder_that_another_host_does_not_see_is_refused_before_anything_is_loaded(
    data, tmp_path
):
    own = tuple([f"--workdir={tmp_path}/{name}/run"] for name in ("first", "second"))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    host = re.escape(socket.gethostname())
    found = run_two(data, tmp_path, "--config.base.name=none", own=own, SEEN_WITHIN="0.5")
    for status, _, told in found:
        assert status == 2
        assert re.fullmatch(
            rf"error: {tmp_path}/first/run of process 0 on host {host} is not there for process 1 "
            rf"on host {host}; all write .* --workdir on a file system that all hosts share\n",
            told,
        )
    # Neither the runs nor the file that was looked for.
    assert not [path for path in tmp_path.rglob("*") if path.parent != tmp_path]


def test_the_range_test_of_the_rate_is_that_of_one_device(data, tmp_path):
    flags = ("--steps=10", "--min_rate=1e-4", "--max_rate=0.1")
    found = run_two(data, tmp_path / "two", *flags, PROGRAM="lr_find")
    told = [(status, errors) for status, _, errors in found]
    config = RunConfig.from_mapping(hosts_config.get_config(data).to_dict())
    quiet = Console(quiet=True)
    alone = find_rate(config, tmp_path / "one", quiet, min_rate=1e-4, max_rate=0.1, steps=10)
    # Ten steps may be too few for a suggestion, with the same words as alone.
    assert told == [(3, f"error: {alone['problem']}\n") if alone["problem"] else (0, "")] * 2
    together = json.loads((tmp_path / "two/lr_find.json").read_text())
    np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-5)
    assert (tmp_path / "two/lr_find.png").exists()
    assert "step 10" in found[0][1]
    assert "step 10" not in found[1][1]


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


def test_a_number_that_is_taken_twice_is_told_after_jax_s_own_words():
    """JAX ends one of the two, whichever comes first; the others go on waiting."""
    port = str(free_port())
    words = (sys.executable, hosts_members.__file__)
    processes = [start(*words, number, port, "taken") for number in ("0", "1", "1")]
    deadline = time.monotonic() + PATIENCE
    while (over := [p for p in processes[1:] if p.poll() is not None]) == []:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for process in set(processes) - set(over):
        process.kill()
    ended = dict(zip(processes, wait(*processes), strict=True))
    status, _, told = ended[over[0]]
    assert status == 75
    last = told.splitlines()[-1]
    assert re.match(
        rf"error: process 1 cannot join the others at 127\.0\.0\.1:{port} \(.*a --process_id of "
        "its own",
        last,
    )


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
