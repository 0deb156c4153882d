"""The files in launch/, as far as no cluster is needed; test_hosts.py runs slurm.sh."""

import ast
import math
import os
import shlex
import subprocess

import pytest
import yaml

from tests.experiments.fixtures_programs import ROOT
from tools.program_flags import flags_of

FLAGS = {
    name for name, _, _ in flags_of(ast.parse((ROOT / "experiments/train.py").read_text("utf-8")))
}


def check_flags(words):
    """Whether train.py has the flags among `words`, and they give it all that it needs."""
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    assert {name for name in names if not name.startswith("config.")} <= FLAGS
    assert {"config", "workdir", "config.mesh.fsdp"} <= set(names)


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_vm.sh"])
def test_the_script_is_one_that_bash_can_read(script):
    done = subprocess.run(["bash", "-n", f"launch/{script}"], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.access(ROOT / "launch" / script, os.X_OK)


def call_with(name, stand_in, folder, *words, **environment):
    """Runs launch/<name> with a program of `folder` in front of all others."""
    program, text = stand_in
    (folder / program).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / program).chmod(0o755)
    found = {"PATH": f"{folder}:{os.environ['PATH']}", "PAUSE": "0", "LOG": str(folder / "log")}
    return subprocess.run(
        ["bash", f"launch/{name}", *words],
        cwd=ROOT,
        env=os.environ | found | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_tpu_script_calls_train_on_all_hosts_and_again_when_one_fails(tmp_path):
    gcloud = 'for word in "$@"; do printf "%q " "$word"; done >>"$LOG"; echo >>"$LOG"; exit 1'
    flags = ["--config=configs/own_data.py", "--config.mesh.fsdp=-1", "--workdir=/mnt/a folder"]
    where = {"TPU": "slice", "ZONE": "zone", "RESTARTS": "2"}
    done = call_with("tpu_vm.sh", ("gcloud", gcloud), tmp_path, *flags, **where)
    assert done.returncode == 1
    calls = [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(calls) == 3
    *words, command = calls[0]
    assert words == "compute tpus tpu-vm ssh slice --zone=zone --worker=all".split()
    # What the shell of each host makes of it.
    _, _, _, _, program, *given = shlex.split(command.removeprefix("--command="))
    assert (program, given) == ("experiments/train.py", ["--coordinator=auto", *flags])
    check_flags(given)
    lacking = call_with("tpu_vm.sh", ("gcloud", gcloud), tmp_path, *flags, TPU="slice", ZONE="")
    assert "its zone" in lacking.stderr


@pytest.mark.parametrize(
    ("status", "calls", "requeued"), [(2, 1, 0), (3, 1, 0), (143, 1, 1), (75, 3, 0), (137, 3, 0)]
)
def test_the_slurm_script_starts_again_what_a_restart_can_mend(tmp_path, status, calls, requeued):
    (tmp_path / "scontrol").write_text('#!/usr/bin/env bash\necho "requeued $2" >>"$LOG"\n')
    (tmp_path / "scontrol").chmod(0o755)
    srun = f'echo called >>"$LOG"; exit {status}'
    done = call_with(
        "slurm.sh", ("srun", srun), tmp_path, "--config=x", SLURM_JOB_ID="7", RESTARTS="2"
    )
    assert done.returncode == status
    told = (tmp_path / "log").read_text().split("\n")
    assert (told.count("called"), told.count("requeued 7")) == (calls, requeued)


def test_the_jobset_has_a_pod_for_each_host_of_its_slice():
    jobset = yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text("utf-8"))
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    hosts = math.prod(map(int, topology.split("x"))) // chips
    assert spec["parallelism"] == spec["completions"] == hosts
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    python, program, *flags = container["command"]
    assert (python, program) == ("python", "experiments/train.py")
    check_flags(flags)
