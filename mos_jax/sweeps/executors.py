"""Where the tasks of a sweep run: here, one after the other, or as jobs of a cluster."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mos_jax.errors import InputError
from mos_jax.sweeps.execute import Task, execute, record_failure, status_of
from mos_jax.training.endings import Stopped, noting_signals
from mos_jax.training.session import Loads

# Seconds between looks at the jobs of a cluster.
POLL = 5.0
OnDone = Callable[[Task], None]
OnStart = Callable[[Task], None]


class Executor(Protocol):
    """Runs tasks; every one has left a summary or an error in its folders when `run` returns."""

    def run(self, tasks: Sequence[Task], started: OnStart, done: OnDone) -> None:
        """Runs `tasks`, calling `started` and `done` for each in this process."""
        ...


@dataclasses.dataclass
class LocalExecutor:
    """One task after the other in this process; base and data are loaded once.

    Attributes:
      compiled: folder of compiled steps, or empty.
      loads: where base and data come from.
    """

    compiled: str = ""
    loads: Loads = dataclasses.field(default_factory=Loads)

    def run(self, tasks: Sequence[Task], started: OnStart, done: OnDone) -> None:
        """See base class."""
        for task in tasks:
            started(task)
            execute(task, self.loads, self.compiled)
            done(task)


@dataclasses.dataclass
class SubmititExecutor:
    """Jobs through `submitit`: on a SLURM cluster, or as processes of this machine.

    Attributes:
      folder: for the jobs' scripts and logs; on a cluster a file system that all nodes see.
      cluster: "slurm", or "local" for processes of this machine.
      parallel: most jobs at once.
      parameters: for `submitit.AutoExecutor.update_parameters` (`timeout_min`, `gpus_per_node`,
        `slurm_partition`, ...).
      compiled: folder of compiled steps, or empty.
    """

    folder: str
    cluster: str = "slurm"
    parallel: int = 16
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    compiled: str = ""

    def __post_init__(self) -> None:
        """Finds out at once whether jobs can be submitted.

        Raises:
          InputError: if submitit is not installed, there is no SLURM here, or a parameter is
            unknown or refused.
        """
        try:
            import submitit
        except ImportError:
            raise InputError(
                "--executor=slurm needs submitit; pip install 'mos_jax[slurm]'"
            ) from None
        try:
            self._executor = submitit.AutoExecutor(self.folder, cluster=self.cluster)
            self._executor.update_parameters(**self.parameters)
        except (RuntimeError, ValueError, NameError, TypeError) as error:
            raise InputError(f"submitit refuses: {' '.join(str(error).split())}") from None

    def run(self, tasks: Sequence[Task], started: OnStart, done: OnDone) -> None:
        """See base class.

        Raises:
          Stopped: after a signal of `STOPPING`, with the jobs under way cancelled.
        """
        jobs: list[tuple[Task, Any]] = []
        try:
            with noting_signals() as caught:
                self._work_off(list(tasks), jobs, started, done, caught)
        except BaseException:
            # Their checkpoints stay; the same command goes on from there.
            for _, job in jobs:
                job.cancel()
            raise

    def _work_off(
        self,
        waiting: list[Task],
        jobs: list[tuple[Task, Any]],
        started: OnStart,
        done: OnDone,
        caught: list[int],
    ) -> None:
        while waiting or jobs:
            if caught:
                name = signal.Signals(caught[0]).name
                raise Stopped(
                    f"{name}: {len(jobs)} jobs cancelled; the same command goes on from there",
                    128 + caught[0],
                )
            while waiting and len(jobs) < self.parallel:
                task = waiting.pop(0)
                jobs.append((task, self._executor.submit(execute, task, None, self.compiled)))
                started(task)
            for task, job in list(jobs):
                if job.done():
                    jobs.remove((task, job))
                    _record_lost(task, job)
                    done(task)
            if jobs:
                time.sleep(POLL if self.cluster == "slurm" else 0.2)


def _record_lost(task: Task, job: Any) -> None:
    """Records what a job that died could not record itself (killed, out of time or memory)."""
    lost = job.exception()
    if lost is None:
        return
    text = (str(lost).strip() or repr(lost)).splitlines()[-1]
    for folder in task.folders:
        if status_of(folder) == "missing":
            record_failure(folder, f"job {job.job_id} left no result: {text}")
