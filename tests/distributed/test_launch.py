"""The files in launch/ and the commands of docs/ for them, as far as no cluster is needed.

test_hosts.py runs slurm.sh.
"""

import ast
import math
import os
import re
import shlex
import signal
import subprocess
import warnings

import pytest
import yaml
from absl import flags as absl_flags
from ml_collections import config_flags

from mos_jax.distributed.meeting import Meeting, find_meeting
from mos_jax.distributed.mesh import resolve_sizes
from mos_jax.distributed.partition import check_rows
from mos_jax.errors import InputError
from mos_jax.training.config import RunConfig
from mos_jax.training.endings import STOPPING
from tests.docs.fixtures_pages import Page, without_settings
from tests.experiments.fixtures_programs import ROOT
from tools.program_flags import flags_of

FLAGS = {
    flag.name for flag in flags_of(ast.parse((ROOT / "experiments/train.py").read_text("utf-8")))
}


def check_flags(words):
    """Whether train.py has the flags among `words`, and they give it all that it needs."""
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    assert {name for name in names if not name.startswith("config.")} <= FLAGS
    assert {"config", "workdir", "config.mesh.fsdp"} <= set(names)


def config_of(words):
    """The config that train.py makes of these flags."""
    values = absl_flags.FlagValues()
    argv = ["train.py", *(word for word in words if word.startswith("--config"))]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # ml_collections loads the file in a way that Python has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        patch.chdir(ROOT)
        values(argv)
        return RunConfig.from_mapping(holder.value.lock().to_dict())


def check_fit(words, devices):
    """Whether a run with these flags uses all of the devices, and they can share its rows."""
    config = config_of(words)
    sizes = resolve_sizes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    assert math.prod(sizes.values()) == devices
    check_rows(config.data.batch_size, sizes)


def command_in(script):
    """The words of the command in the comment on top of launch/<script>."""
    text = (ROOT / "launch" / script).read_text(encoding="utf-8")
    lines = re.search(rf"^#   (.*launch/{script} (?:.*\\\n)*.*)$", text, re.MULTILINE)[1]
    return shlex.split(lines.replace("\\\n#", ""))


def commands_with(word):
    """The commands of docs/many_hosts.md with this word."""
    found = [words for words in Page("many_hosts").commands(run=False) if word in words]
    assert found
    return found


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
    ("status", "calls", "requeued"),
    [
        (2, 1, 0),
        (3, 1, 0),
        (130, 1, 0),
        (143, 1, 0),  # scancel sends SIGTERM
        (128 + signal.SIGUSR1, 1, 1),  # what --signal asks SLURM to send when time is nearly up
        (75, 3, 0),
        (137, 3, 0),
    ],
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


def test_the_slurm_script_asks_for_a_signal_that_runs_take_and_nobody_else_sends():
    script = (ROOT / "launch/slurm.sh").read_text(encoding="utf-8")
    asked = getattr(signal, "SIG" + re.search(r"^#SBATCH --signal=(\w+)@\d+$", script, re.M)[1])
    assert asked in STOPPING
    assert asked not in (signal.SIGTERM, signal.SIGINT)


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
    check_fit(flags, hosts * chips)


def test_the_rows_of_the_slurm_recipes_fit_the_gpus_that_the_script_asks_for():
    script = (ROOT / "launch/slurm.sh").read_text(encoding="utf-8")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", script, re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    gpus = int(asked["nodes"]) * int(asked["gpus-per-node"])
    for words in (command_in("slurm.sh"), *commands_with("launch/slurm.sh")):
        check_flags(words)
        check_fit(words, gpus)
    with pytest.raises(InputError, match=r"rows cannot be divided among .* = 1 \* 16"):
        check_fit([word for word in words if "batch_size" not in word], gpus)


@pytest.mark.parametrize("devices", [2, 4, 8, 16])
def test_the_rows_of_the_other_recipes_fit_the_devices_that_the_page_names(devices):
    recipes = [*commands_with("launch/tpu_vm.sh"), *commands_with("experiments/train.py")]
    assert len(recipes) >= 3
    for words in (command_in("tpu_vm.sh"), *recipes):
        check_flags(words[[word.startswith("--config=") for word in words].index(True) :])
        check_fit(words, devices)


def test_the_meshes_of_the_page_and_of_the_readme_fit_the_devices_that_they_make():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (JAX_PLATFORMS(?:.*\\\n)*.*)$", readme, re.MULTILINE)
    commands = [shlex.split(line) for line in lines]
    assert commands
    for words in (*commands, *Page("meshes").commands(run=False)):
        command = without_settings(words)
        settings = dict(word.split("=") for word in words[: -len(command)])
        assert settings["JAX_PLATFORMS"] == "cpu"
        check_fit(command, int(settings["JAX_NUM_CPU_DEVICES"]))


def test_the_command_for_open_mpi_5_gives_each_process_its_number(tmp_path):
    """With stand-ins: mpirun starts what follows its own options with the variables of rank 1."""
    stand_ins = {
        "mpirun": 'shift 2; OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1 exec "$@"',
        "python": "printf '%s\\n' \"$@\"",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    [words] = commands_with("mpirun")
    path = f"{tmp_path}:{os.environ['PATH']}"
    told = subprocess.check_output(words, env=os.environ | {"PATH": path}, text=True)
    program, *flags = told.splitlines()
    assert program == "experiments/train.py"
    check_flags(flags)
    given = dict(flag[2:].split("=", 1) for flag in flags)
    address = given["coordinator"]
    found = find_meeting(address, int(given["processes"]), int(given["process_id"]), {})
    assert found == Meeting(address, 2, 1, "deactivate")
