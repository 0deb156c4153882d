"""The training loop: resumes by default, and ends with the adapter and its evaluation on disk."""

from __future__ import annotations

import abc
import dataclasses
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
from rich.console import Console

from mos_jax.adapters.adapter import Adapter
from mos_jax.data.batches import Batch
from mos_jax.data.loader import Loader
from mos_jax.distributed.agreement import (
    agree,
    agree_to_stop,
    agree_to_stop_at_the_end,
    check_shared,
    is_first,
)
from mos_jax.errors import InputError
from mos_jax.evaluation.answers import Evaluation
from mos_jax.models.decoder import Decoder
from mos_jax.training.checkpoint import Checkpoints
from mos_jax.training.config import RunConfig
from mos_jax.training.endings import (
    DIVERGED_ADVICE,
    Diverged,
    Stopped,
    disk_errors_in_words,
    noting_signals,
)
from mos_jax.training.finish import (
    Course,
    StepClock,
    describe,
    finish,
    validate,
    validation_record,
    versions,
)
from mos_jax.training.metrics import Log, NoLog, Reporter, RunLog, check_logging
from mos_jax.training.session import Loads, Session
from mos_jax.training.step import AdapterParts, TrainState
from mos_jax.training.workdir import WorkDir


def train(
    config: RunConfig,
    workdir: str | os.PathLike[str],
    console: Console | None = None,
    loads: Loads | None = None,
) -> dict[str, Any]:
    """Trains an adapter in the folder `workdir`, going on where an earlier call stopped.

    A run that was killed at any moment and is started again ends with bitwise the adapter of an
    uninterrupted one.

    Several processes that share JAX's devices (`jax.distributed`) call it alike, with a folder that
    all of them see. The first one writes what is written once and prints; each writes its part of
    the checkpoints.

    Args:
      config: the run.
      workdir: its folder; holds config.json, checkpoints/, metrics.jsonl, tensorboard/, adapter/
        and, when finished, scores.json and summary.json.
      console: where progress goes.
      loads: shared by the runs of one process, so that they load base and data once.

    Returns:
      The summary, as in summary.json. A finished run returns it at once.

    Raises:
      InputError: for a configuration or folder that cannot be used; nothing is written then.
      Diverged: if the loss is no longer finite; the last good checkpoint stays.
      Stopped: after a signal of `STOPPING`, with the state saved.
      RunEnded: if a checkpoint cannot be written, for example on a full disk; the last one stays.
    """
    console = console if console is not None else Console()
    if not is_first():
        console = Console(quiet=True)
    folder = WorkDir(workdir, writes=is_first())
    resolved = config.to_dict()
    agree("the config", lambda: {**resolved, "versions": versions()})
    changes = folder.check_config(resolved)
    summary = folder.read_summary()
    agree(
        "the run's folder, which all must see",
        lambda: {"finished with step": summary and summary["steps"]},
    )
    if summary is not None and summary["steps"] == config.training.steps:
        return summary
    check_logging(config.logging)
    check_shared(folder.path)
    session = Session.create(config, loads)
    with disk_errors_in_words(folder.path), folder.lock():
        say_changes(console, changes, config)
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
        try:
            agree(
                "what is in their files",
                lambda: {"last checkpoint": checkpoints.latest_step, **session.facts()},
            )
            run = _SingleLoop(session, folder, checkpoints, console)
            folder.write_config(resolved)
            folder.remove_outcome()
            try:
                return run.finish()
            finally:
                run.loader.close()
        finally:
            checkpoints.close()


@dataclasses.dataclass
class Pending:
    """A step whose metrics are still on the device.

    Attributes:
      step: its number, from 1.
      metrics: of the step.
      tokens: of each run in it.
    """

    step: int
    metrics: dict[str, jax.Array]
    tokens: list[int]


class Loop(abc.ABC):
    """The steps of a run, or of stacked ones, from the state in a folder to the last.

    Attributes:
      config: of the run; of stacked ones, what they share.
      model: the base.
      folder: where the checkpoints are.
      first: steps done before.
      state: changes with every step.
      parts: of the adapter.
      clock: times the steps.
      compiled: facts of the compiled step.
    """

    state: TrainState
    parts: AdapterParts

    def __init__(
        self,
        config: RunConfig,
        model: Decoder,
        folder: WorkDir,
        checkpoints: Checkpoints,
        console: Console,
    ):
        self.config = config
        self.model = model
        self.folder = folder
        self.checkpoints = checkpoints
        self.console = console
        self.clock = StepClock()
        self.compiled: dict[str, int] = {}
        self.first = checkpoints.latest_step or 0
        if self.first > config.training.steps:
            raise InputError(
                f"{folder.path} is at step {self.first}, beyond training.steps="
                f"{config.training.steps}; raise it or choose another --workdir"
            )
        if self.first:
            console.print(f"resuming after step {self.first}", highlight=False)

    @abc.abstractmethod
    def logs(self) -> Sequence[Log]:
        """Opens the log of each run."""

    @abc.abstractmethod
    def next_batch(self) -> tuple[Batch, list[int]]:
        """The next batch, and the tokens of each run in it."""

    @abc.abstractmethod
    def train_step(self) -> jax.stages.Wrapped:
        """The step, not compiled yet."""

    @abc.abstractmethod
    def report(self, reporter: Reporter, pending: Pending, evaluating: bool = False) -> None:
        """Fetches and reports the metrics of a step, evaluated where asked.

        Raises:
          Diverged: if they are not finite.
        """

    @abc.abstractmethod
    def save(self, reporter: Reporter) -> None:
        """Starts a checkpoint of the state."""

    @property
    def over(self) -> bool:
        """Whether there is nothing more to do, whatever steps are left."""
        return False

    def run(self) -> None:
        """Runs the remaining steps. Raises Diverged or, with the state saved, Stopped."""
        config, total = self.config, self.config.training.steps
        train_step: Any = None
        with (
            noting_signals() as caught,
            Reporter(self.logs(), config.logging, total, self.first, self.console) as reporter,
        ):
            pending: Pending | None = None
            for step in range(self.first + 1, total + 1):
                batch, tokens = self.next_batch()
                if train_step is None:
                    train_step = self._compile(batch)
                self.state, metrics = train_step(self.state, self.parts, self.model, batch)
                # The metrics of the step before are ready by now: fetching them stalls nothing.
                if pending is not None:
                    self.report(reporter, pending)
                pending = Pending(step, metrics, tokens)
                stopping = agree_to_stop(step, caught[0] if caught else None)
                saving = (
                    step % config.checkpoint.every == 0 or step == total or stopping is not None
                )
                evaluating = step == total or (
                    config.evaluation.every > 0 and step % config.evaluation.every == 0
                )
                if saving or evaluating:
                    # Fetched before saving: a state after a bad step must not become the last one.
                    self.report(reporter, pending, evaluating)
                    pending = None
                if saving:
                    self.save(reporter)
                    self.clock.restart()
                if stopping is not None:
                    self._stop(stopping, step)
                if self.over:
                    break
            self.checkpoints.wait()
            # What follows may take long, and needs no step again.
            stopping = agree_to_stop_at_the_end(caught[0] if caught else None)
            if stopping is not None and not self.over:
                self._stop(stopping, total)

    def _stop(self, number: int, step: int) -> NoReturn:
        self.checkpoints.wait()
        raise Stopped(
            f"{signal.Signals(number).name}: saved step {step} of {self.config.training.steps} in "
            f"{self.folder.path}; the same command goes on from there",
            128 + number,
        )

    def _compile(self, batch: Batch) -> Any:
        lowered = self.train_step().lower(self.state, self.parts, self.model, batch)
        compiled = lowered.compile()
        memory: Any = compiled.memory_analysis()
        self.compiled = {
            "temporary_bytes": memory.temp_size_in_bytes,
            # Of the state, which is donated: the new one takes the memory of the old one.
            "reused_bytes": memory.alias_size_in_bytes,
        }
        return compiled


class _SingleLoop(Loop):
    """One call of `train`, from the restored state to the summary."""

    def __init__(
        self, session: Session, folder: WorkDir, checkpoints: Checkpoints, console: Console
    ):
        super().__init__(session.config, session.base.model, folder, checkpoints, console)
        self.session = session
        self.validation: Evaluation | None = None
        self.source = session.source()
        self.loader = Loader(self.source)
        self.drawn = self.first
        self.state, self.parts = session.initial()
        if self.first:
            state, parts, position = checkpoints.restore(self.first, self.state, session.adapter)
            self.state, self.parts = session.place(state, parts)
            self.loader.set_state(position)

    def logs(self) -> Sequence[Log]:
        if not self.folder.writes:
            return [NoLog()]
        return [RunLog(self.folder.path, self.config.logging, self.first, self.config.to_dict())]

    def next_batch(self) -> tuple[Batch, list[int]]:
        batch, step = next(self.loader), self.drawn
        self.drawn += 1
        return self.session.place_batch(batch), [self.source.count_tokens(step)]

    def train_step(self) -> jax.stages.Wrapped:
        return self.session.train_step()

    def report(self, reporter: Reporter, pending: Pending, evaluating: bool = False) -> None:
        record = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        if not all(map(math.isfinite, record.values())):
            latest = self.checkpoints.latest_step
            kept = "there is no checkpoint yet" if latest is None else f"step {latest} is kept"
            raise Diverged(
                f"{not_finite(pending.step, record)}; stopped, {kept} in {self.folder.path}. "
                f"{DIVERGED_ADVICE}"
            )
        seconds = self.clock.step()
        if not evaluating:
            reporter.step(pending.step, [record], pending.tokens, seconds)
            return
        self.validation, samples = validate(self.session, self.adapter())
        record |= validation_record(self.validation)
        reporter.step(pending.step, [record], pending.tokens, seconds)
        reporter.say(f"step {pending.step}: validation {describe(self.validation)}")
        for line in samples:
            reporter.say(line)
        self.clock.restart()

    def save(self, reporter: Reporter) -> None:
        self.checkpoints.save(self.state, self.parts, self.loader.get_state())

    def adapter(self) -> Adapter:
        """As it is now."""
        return self.parts.merge(self.state.trained)

    def finish(self) -> dict[str, Any]:
        """Runs the remaining steps, writes what a finished run leaves, returns the summary."""
        self.run()
        training = time.perf_counter() - self.clock.started
        course = Course(self.clock, training, facts={"compiled": self.compiled})
        return finish(
            self.session, self.folder, self.adapter(), self.validation, course, self.console
        )


def not_finite(step: int, metrics: Mapping[str, float]) -> str:
    """The beginning of what is said of a run that diverged."""
    return f"step {step}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}"


def say_changes(console: Console, changes: Sequence[str], config: RunConfig) -> None:
    """Tells how the configuration differs from that of the run's beginning."""
    for change in changes:
        console.print(f"resuming with a change: {change}", highlight=False, markup=False)
    if any(change.startswith("training.steps") for change in changes):
        console.print(
            f"the {config.training.schedule} schedule and its warm-up span training.steps, so they "
            "change with it from here on",
            highlight=False,
        )


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch, without padding."""
    return int((batch.segments != 0).sum())
