r"""Runs a sweep: every arm of a config, its learning rate chosen on validation data, several seeds.

python experiments/sweep.py --config=configs/ablations/strategies.py --dry_run
python experiments/sweep.py --config=configs/ablations/strategies.py --workdir=runs/strategies
python experiments/sweep.py --config=configs/ablations/strategies.py --workdir=runs/strategies \
  --executor=slurm --slurm=slurm_partition=gpu --slurm=gpus_per_node=1 --slurm=timeout_min=60
python experiments/report.py --workdir=runs/strategies

The same command goes on where it stopped: what is finished is skipped, what failed stays recorded
(--retry_failed runs it again), and --config.sweep.seeds may grow. A config file of a sweep has
get_config() with a section `sweep`, and get_arms(config), which yields dotted overrides.
--config.sweep.stack=4 trains up to 4 runs of an arm in one compiled step. An arm that names its
method takes that method's defaults, whatever --config.adapter says.
"""

import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from mos_jax import app

CONFIG = app.define_config("configs/ablations/strategies.py")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep; made when missing.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "List runs, parameters and time, then stop.")
EXECUTOR = flags.DEFINE_enum(
    "executor",
    "local",
    ["local", "slurm", "processes"],
    "local: one after the other in this process; slurm: jobs through submitit; processes: the "
    "same jobs as processes of this machine.",
)
PARALLEL = flags.DEFINE_integer("parallel", 16, "Most jobs at once (not local).", lower_bound=1)
SLURM = flags.DEFINE_multi_string("slurm", [], "name=value for submitit, such as timeout_min=60.")
RETRY_FAILED = flags.DEFINE_bool("retry_failed", False, "Run what failed once more.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from rich.console import Console

    from mos_jax.errors import InputError, RunEnded
    from mos_jax.sweeps.definition import Sweep
    from mos_jax.sweeps.estimate import print_costs
    from mos_jax.sweeps.executors import Executor, LocalExecutor, SubmititExecutor
    from mos_jax.sweeps.runner import check_same, run_sweep
    from mos_jax.training.session import Loads

    get_arms, workdir = app.load_from_config("get_arms"), WORKDIR.value or ""
    if not (workdir or DRY_RUN.value):
        raise InputError("--workdir is missing; for example --workdir=runs/strategies")
    items = get_arms(CONFIG.value)
    sweep, loads, console = Sweep.create(CONFIG.value.to_dict(), items), Loads(), Console()
    if workdir:
        check_same(sweep, workdir)
    sweep.check_arms(loads)
    if DRY_RUN.value:
        print_costs(sweep, loads, console)
        return
    compiled = os.path.abspath(os.path.join(workdir, "compiled"))
    executor: Executor = LocalExecutor(compiled, loads)
    if EXECUTOR.value != "local":
        cluster = "slurm" if EXECUTOR.value == "slurm" else "local"
        jobs = os.path.abspath(os.path.join(workdir, "jobs"))
        executor = SubmititExecutor(jobs, cluster, PARALLEL.value, _parameters(), compiled)
    counts = run_sweep(sweep, workdir, executor, console, RETRY_FAILED.value)
    console.print(
        f"{counts['finished']} reported runs are finished. Next:\n"
        f"  .venv/bin/python experiments/report.py --workdir={workdir}",
        highlight=False,
        soft_wrap=True,
    )
    if counts["failed"] or counts["missing"]:
        raise RunEnded(
            f"{counts['failed']} runs failed and {counts['missing']} are missing; why is in "
            f"{workdir}/runs/*/*/error.json and log.txt. --retry_failed runs them again"
        )


def _parameters() -> dict[str, Any]:
    from mos_jax.errors import InputError

    found: dict[str, Any] = {}
    for pair in SLURM.value:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--slurm={pair} must be name=value, such as timeout_min=60")
        found[name] = int(value) if value.isdigit() else value
    return found


if __name__ == "__main__":
    app.run(main)
