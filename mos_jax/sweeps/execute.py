"""One piece of a sweep's work, in this process or another: train, and record what failed."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

from mos_jax.errors import InputError, RunEnded
from mos_jax.sweeps.definition import SweepRun
from mos_jax.training.config import RunConfig
from mos_jax.training.endings import Stopped
from mos_jax.training.loop import train
from mos_jax.training.session import Loads
from mos_jax.training.stacked import train_stacked
from mos_jax.training.workdir import Busy, WorkDir

ERROR_FILE = "error.json"
LOG_FILE = "log.txt"

Status = Literal["finished", "failed", "missing"]


@dataclasses.dataclass(frozen=True)
class Task:
    """Runs that are trained together: one, or several in one compiled step.

    Attributes:
      folders: of the runs.
      configs: resolved, as JSON values, so that a task can travel to another machine.
    """

    folders: tuple[str, ...]
    configs: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, root: Path, runs: Sequence[SweepRun]) -> Task:
        """The task of these runs of the sweep in the folder `root`."""
        folders = tuple(str(root.absolute() / run.folder) for run in runs)
        return cls(folders, tuple(json.loads(json.dumps(r.config.to_dict())) for r in runs))


def status_of(folder: str | Path) -> Status:
    """What became of the run in `folder`."""
    folder = Path(folder)
    if (folder / "summary.json").exists():
        return "finished"
    return "failed" if (folder / ERROR_FILE).exists() else "missing"


def execute(task: Task, loads: Loads | None = None, compiled: str = "") -> list[Status]:
    """Trains the runs of a task; a run that fails leaves its error in its folder.

    What the runs print goes to log.txt in the first folder.

    Args:
      task: the work.
      loads: shared by the tasks of one process.
      compiled: folder that keeps compiled steps, which seeds share; empty = none.

    Returns:
      What became of each run; "missing" when another process is at work on it.

    Raises:
      Stopped: after a signal; what was done is saved, and nothing is recorded as failed.
    """
    if compiled:
        jax.config.update("jax_compilation_cache_dir", compiled)
    configs = [RunConfig.from_mapping(config) for config in task.configs]
    first = Path(task.folders[0])
    first.mkdir(parents=True, exist_ok=True)
    for folder in task.folders:
        (Path(folder) / ERROR_FILE).unlink(missing_ok=True)
    with open(first / LOG_FILE, "a", encoding="utf-8") as stream:
        # In a notebook rich would show what belongs into the file.
        console = Console(file=stream, width=100, force_jupyter=False)
        try:
            if len(configs) == 1:
                train(configs[0], first, console, loads)
            else:
                train_stacked(configs, task.folders, console, loads)
        except (Stopped, KeyboardInterrupt):
            raise
        except Busy as error:
            # A job of an earlier call, say: its result is not this one's to judge.
            console.print(str(error), markup=False, highlight=False)
        except Exception as error:
            # A defect of one arm, or a full device, must not cost the others their results.
            console.print(traceback.format_exc(), markup=False, highlight=False)
            for folder in task.folders:
                if status_of(folder) != "finished":
                    record_failure(folder, error)
    return [status_of(folder) for folder in task.folders]


def record_failure(folder: str | Path, error: Exception | str) -> None:
    """Writes error.json: the run failed, and why."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if isinstance(error, str):
        error = RunEnded(error)
    elif not isinstance(error, (InputError, RunEnded)):
        # What the project raises on purpose says enough; of anything else the kind matters.
        error = RunEnded(f"{type(error).__name__}: {error}")
    WorkDir(folder).write_error(error)
