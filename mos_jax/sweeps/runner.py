"""Running a sweep: first the learning rates, then the runs that count, resuming by default."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mos_jax.errors import InputError
from mos_jax.sweeps.definition import Sweep, SweepRun
from mos_jax.sweeps.execute import Status, Task, record_failure, status_of
from mos_jax.sweeps.executors import Executor
from mos_jax.sweeps.tuning import Choice, choose_rates
from mos_jax.training.resuming import differences
from mos_jax.training.workdir import WorkDir

FORMAT = "mos_jax.sweep"
SWEEP_FILE, CHOICES_FILE = "sweep.json", "learning_rates.json"
# What may stand in a folder before its sweep has begun.
OWN = {".lock", "compiled", "jobs"}
# May change between calls: more seeds only add runs, stacking decides nothing of a run. Baseline
# and margin may not: they are fixed before the runs. The report takes other baselines, and says so.
MAY_CHANGE = ("sweep.seeds", "sweep.stack")


def run_sweep(
    sweep: Sweep,
    workdir: str | os.PathLike[str],
    executor: Executor,
    console: Console,
    retry_failed: bool = False,
) -> dict[Status, int]:
    """Runs what is not finished yet.

    Args:
      sweep: what to run, checked against the base's sites by the caller.
      workdir: its folder.
      executor: where the runs happen.
      console: where progress goes.
      retry_failed: run what failed once more instead of leaving it recorded.

    Returns:
      The number of runs of the final stage by what became of them.

    Raises:
      InputError: for the folder of another sweep, or one in which a sweep is at work.
      Stopped: after a signal; the same call goes on from there.
    """
    folder = WorkDir(workdir)
    check_same(sweep, folder.path)
    with folder.lock():
        _write(folder.path / SWEEP_FILE, {"format": FORMAT, **sweep.to_dict()})
        progress = _Progress(console, len(sweep.tuning()) + len(sweep.final()))
        with progress:
            _run_stage(sweep, sweep.tuning(), folder.path, executor, progress, retry_failed)
            choices = choose_rates(sweep, folder.path)
            _check_choices(folder.path, sweep, choices)
            _write(folder.path / CHOICES_FILE, {n: c.to_dict() for n, c in choices.items()})
            final = final_runs(sweep, choices)
            ready = []
            for run in final:
                if choices[run.arm].learning_rate is None:
                    record_failure(folder.path / run.folder, "no learning rate of this arm worked")
                    progress.skip("failed")
                else:
                    ready.append(run)
            _run_stage(sweep, ready, folder.path, executor, progress, retry_failed)
    found = [status_of(folder.path / run.folder) for run in final]
    counts: dict[Status, int] = {"finished": 0, "failed": 0, "missing": 0}
    for status in found:
        counts[status] += 1
    return counts


def final_runs(sweep: Sweep, choices: dict[str, Choice]) -> list[SweepRun]:
    """The runs of the final stage at the chosen rates."""
    return sweep.final(
        {n: c.learning_rate for n, c in choices.items() if c.learning_rate is not None}
    )


def load_sweep(workdir: str | os.PathLike[str]) -> Sweep:
    """The sweep whose folder this is. Raises InputError if it is none."""
    stored = _read_sweep(Path(workdir))
    if stored is None:
        raise InputError(f"{workdir} holds no sweep: {SWEEP_FILE} is missing")
    return Sweep.from_dict(stored)


def check_same(sweep: Sweep, path: str | os.PathLike[str]) -> None:
    """Raises InputError, naming what differs, if `path` holds another sweep than this one."""
    path = WorkDir(path).path
    stored = _read_sweep(path)
    if stored is None:
        held = {entry.name for entry in path.iterdir()} - OWN if path.exists() else set()
        if held:
            names = ", ".join(sorted(held)[:5])
            raise InputError(f"{path} holds no sweep but {names}; choose another --workdir")
        return
    listed = _differences(Sweep.from_dict(stored), sweep)
    if listed:
        raise InputError(
            f"{path} holds another sweep: {'; '.join(listed)}. Choose another --workdir, or "
            "restore these"
        )


def _differences(old: Sweep, new: Sweep) -> list[str]:
    """What makes `new` another sweep than `old`, in words; empty when it may go on."""
    # Resolved, so that a field that an older version did not know has its default there.
    changed = differences(old.resolved(), new.resolved())
    listed = [
        f"{name} was {a!r}, now {b!r}" for name, (a, b) in changed.items() if name not in MAY_CHANGE
    ]
    firsts = (side.final()[: len(side.arms)] for side in (old, new))
    before, now = ({run.arm: run for run in runs} for runs in firsts)
    if not listed:
        for name in {**before, **now}:
            if name not in before or name not in now:
                listed.append(f"arm {name!r} is {'new' if name in now else 'gone'}")
                continue
            pairs = differences(before[name].config.to_dict(), now[name].config.to_dict())
            listed += [f"arm {name!r}: {n} was {a!r}, now {b!r}" for n, (a, b) in pairs.items()]
            if dataclasses.replace(old.arm(name), overrides={}) != dataclasses.replace(
                new.arm(name), overrides={}
            ):
                listed.append(f"arm {name!r}: its learning rates or its budget")
    if old.section.seeds > new.section.seeds:
        listed.append("sweep.seeds shrinks, which would leave runs out")
    return listed


def _check_choices(path: Path, sweep: Sweep, choices: Mapping[str, Choice]) -> None:
    """Raises InputError if a rate changes after the test set was used with another."""
    try:
        stored = json.loads((path / CHOICES_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    for name, choice in choices.items():
        old = stored.get(name, {}).get("learning_rate")
        if old is None or old == choice.learning_rate:
            continue
        used = [
            run
            for run in sweep.final({name: old})
            if run.arm == name and status_of(path / run.folder) == "finished"
        ]
        if used:
            raise InputError(
                f"the tuning runs of arm {name!r} now speak for the rate "
                f"{choice.learning_rate:g}, but {len(used)} reported runs at {old:g} have used "
                "the test set. To start that arm anew all the same, delete "
                f"{path / used[0].folder} and its like"
            )


def _read_sweep(path: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads((path / SWEEP_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"{path / SWEEP_FILE} is not JSON ({error})") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise InputError(f"{path / SWEEP_FILE} is not the file of a sweep")
    return stored


def group(runs: Sequence[SweepRun], stack: int) -> list[list[SweepRun]]:
    """Puts runs that differ only in seeds and rates together, at most `stack` of them."""
    if stack == 1:
        return [[run] for run in runs]
    alike: dict[tuple[str, str], list[SweepRun]] = {}
    for run in runs:
        alike.setdefault((run.arm, run.stage), []).append(run)
    return [
        same[start : start + stack]
        for same in alike.values()
        for start in range(0, len(same), stack)
    ]


def _run_stage(
    sweep: Sweep,
    runs: Sequence[SweepRun],
    root: Path,
    executor: Executor,
    progress: _Progress,
    retry_failed: bool,
) -> None:
    tasks = []
    # Grouped before the finished ones are left out: a group that was cut short must find itself.
    for part in group(runs, sweep.section.stack):
        found = [status_of(root / run.folder) for run in part]
        if "missing" in found or (retry_failed and "failed" in found):
            tasks.append(Task.of(root, part))
        else:
            for status in found:
                progress.skip(status)
    if tasks:
        executor.run(tasks, progress.started, progress.done)


class _Progress:
    """Runs done, running and failed, and the time left, on a terminal or as lines."""

    def __init__(self, console: Console, total: int):
        self._console = console
        self._counts: dict[Status, int] = {"finished": 0, "failed": 0, "missing": 0}
        self._running: dict[tuple[str, ...], float] = {}
        self._ran = 0
        self._total = total
        self._began = time.perf_counter()
        self._bar = Progress(
            TextColumn("runs"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("runs", total=total, status="starting")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def skip(self, status: Status) -> None:
        """Counts a run that needs no work."""
        self._counts[status] += 1
        self._show()

    def started(self, task: Task) -> None:
        """A task begins."""
        self._running[task.folders] = time.perf_counter()
        self._show()

    def done(self, task: Task) -> None:
        """A task has ended."""
        seconds = time.perf_counter() - self._running.pop(task.folders)
        for folder in task.folders:
            status = status_of(folder)
            self._counts[status] += 1
            self._ran += 1
            name = "/".join(Path(folder).parts[-2:])
            self._console.print(
                f"{self._ended}/{self._total} {name}: {_outcome(Path(folder))}, {seconds:.0f} s; "
                f"{self._left()}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        self._show()

    @property
    def _ended(self) -> int:
        return sum(self._counts.values())

    def _left(self) -> str:
        if not self._ran:
            return "time left unknown"
        pace = (time.perf_counter() - self._began) / self._ran
        return f"about {(self._total - self._ended) * pace / 60:.0f} min left"

    def _show(self) -> None:
        status = (
            f"{self._counts['finished']} done, {len(self._running)} running, "
            f"{self._counts['failed']} failed, {self._left()}"
        )
        self._bar.update(self._task, completed=self._ended, status=status)


def _outcome(folder: Path) -> str:
    status = status_of(folder)
    if status == "missing":
        return "at work in another process"
    if status == "failed":
        return f"failed ({json.loads((folder / 'error.json').read_text())['error'][:120]})"
    summary = json.loads((folder / "summary.json").read_text())
    split = "test" if "test" in summary else "validation"
    found = summary["test"]["adapter"] if split == "test" else summary["validation"]
    return f"{split} accuracy {found['accuracy']:.3f}, loss {found['loss']:.3f}"


def _write(path: Path, value: dict[str, Any]) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, path)
