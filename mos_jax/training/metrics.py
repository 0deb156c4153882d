"""Where a run's numbers go: the terminal, `metrics.jsonl`, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mos_jax.errors import InputError
from mos_jax.training.config import LoggingSection


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, with `step`.

    On resuming, lines of later steps than the checkpoint, and a line torn by a crash, are removed,
    so that the file holds every step once.
    """

    def __init__(self, path: Path, resume_step: int):
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if record["step"] <= resume_step:
                    kept.append(line)
            # Written beside and renamed: a crash here must not lose the history.
            fresh = path.with_suffix(".jsonl.new")
            fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(fresh, path)
        self._stream = open(path, "a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a line and hands it to the operating system."""
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class Log(Protocol):
    """What a `Reporter` writes to."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes the numbers of one step, with `step`."""

    def close(self) -> None:
        """Takes no more."""


class NoLog:
    """A `Log` that keeps nothing, for what another process or another file holds."""

    def write(self, record: Mapping[str, Any]) -> None:
        """See `Log`."""

    def close(self) -> None:
        """See `Log`."""


class RunLog:
    """Where the numbers of one run go: `metrics.jsonl` and what the configuration asks for."""

    def __init__(
        self, workdir: Path, config: LoggingSection, first_step: int, run_config: Mapping[str, Any]
    ):
        self._file = MetricsFile(workdir / "metrics.jsonl", first_step)
        self._tensorboard = _open_tensorboard(workdir, first_step) if config.tensorboard else None
        self._wandb = _open_wandb(workdir, config.wandb_project, run_config)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends the numbers of one step, with `step`."""
        self._file.write(record)
        numbers = {name: value for name, value in record.items() if name != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class Reporter:
    """Shows progress and writes metrics; a context manager around the loop."""

    def __init__(
        self,
        logs: Sequence[Log],
        config: LoggingSection,
        total_steps: int,
        first_step: int,
        console: Console,
        title: str = "training",
    ):
        self._logs = logs
        self._config = config
        self._console = console
        self._total = total_steps
        self._bar = Progress(
            TextColumn(title),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            transient=False,
        )
        self._task = self._bar.add_task(
            title,
            total=total_steps,
            completed=first_step,
            status="compiling the step",
        )
        self._speed = 0.0

    def __enter__(self) -> Self:
        """Starts the live bar."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the bar and closes the logs."""
        self._bar.stop()
        for log in self._logs:
            log.close()

    def step(
        self,
        step: int,
        records: Sequence[Mapping[str, float] | None],
        tokens: Sequence[int],
        seconds: float,
    ) -> None:
        """Reports step number `step` (from 1).

        Args:
          step: the number.
          records: for each log, its run's metrics, with `loss`; None for a run that has ended.
          tokens: of each run in this step.
          seconds: that the step took.
        """
        seconds = max(seconds, 1e-9)
        losses = [record["loss"] for record in records if record is not None]
        total = sum(n for n, record in zip(tokens, records, strict=True) if record is not None)
        speed = total / seconds
        # The first step holds the compilation; it must not colour the average.
        self._speed = speed if self._speed == 0.0 or step <= 2 else 0.9 * self._speed + 0.1 * speed
        several = f" (mean of {len(losses)} runs)" if len(self._logs) > 1 else ""
        loss = sum(losses) / max(len(losses), 1)
        status = f"loss {loss:.4f}{several}  {self._speed:.0f} tokens/s"
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_terminal and (
            step == 1 or step % self._config.every == 0 or step == self._total
        ):
            left = total * (self._total - step) / max(self._speed, 1e-9)
            self.say(f"step {step}/{self._total}  {status}  {left:.0f} s left")
        for log, record, own in zip(self._logs, records, tokens, strict=True):
            if record is not None:
                log.write({"step": step, **record, "tokens_per_second": own / seconds})

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, markup=False)


def _open_tensorboard(workdir: Path, first_step: int) -> Any:
    # tensorboardX imports torch where there is one: seconds at every start, and of no use here.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]

    # purge_step hides what an interrupted run wrote beyond its last checkpoint.
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)


def check_logging(config: LoggingSection) -> None:
    """Raises InputError if a package that the configuration asks for is missing."""
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"logging.wandb_project is {config.wandb_project!r}, but wandb is not installed; "
            "pip install 'mos_jax[wandb]', or leave the field empty"
        )


def _open_wandb(workdir: Path, project: str, run_config: Mapping[str, Any]) -> Any:
    if not project:
        return None
    import wandb

    return wandb.init(
        project=project, dir=str(workdir), config=dict(run_config), id=workdir.name, resume="allow"
    )
