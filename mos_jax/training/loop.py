"""The training loop: resumes by default, and ends with the adapter and its evaluation on disk."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
from rich.console import Console

import mos_jax
from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.storage import ARRAYS_FILE, CARD_FILE, save_adapter
from mos_jax.data.batches import Batch
from mos_jax.errors import InputError, RunEnded
from mos_jax.evaluation.answers import Evaluation, evaluate, generate_answers
from mos_jax.evaluation.compare import compare
from mos_jax.training.checkpoint import Checkpoints
from mos_jax.training.config import RunConfig
from mos_jax.training.metrics import Reporter, check_logging
from mos_jax.training.session import Loads, Session
from mos_jax.training.workdir import WorkDir


class Diverged(RunEnded):
    """The loss or the gradient is not finite any more."""


class Stopped(RunEnded):
    """A signal asked the run to stop; its state was saved."""


def train(
    config: RunConfig,
    workdir: str | os.PathLike[str],
    console: Console | None = None,
    loads: Loads | None = None,
) -> dict[str, Any]:
    """Trains an adapter in the folder `workdir`, going on where an earlier call stopped.

    A run that was killed at any moment and is started again ends with bitwise the adapter of an
    uninterrupted one.

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
      Stopped: after SIGTERM or SIGINT, with the state saved.
      RunEnded: if a checkpoint cannot be written, for example on a full disk; the last one stays.
    """
    console = console if console is not None else Console()
    folder = WorkDir(workdir)
    resolved = config.to_dict()
    changes = folder.check_config(resolved)
    summary = folder.read_summary()
    if summary is not None and summary["steps"] == config.training.steps:
        return summary
    check_logging(config.logging)
    session = Session.create(config, loads)
    with _disk_errors_in_words(folder), folder.lock():
        for change in changes:
            console.print(f"resuming with a change: {change}", highlight=False, markup=False)
        if any(change.startswith("training.steps") for change in changes):
            schedule = config.training.schedule
            console.print(
                f"the {schedule} schedule and its warm-up span training.steps, so they change "
                "with it from here on",
                highlight=False,
            )
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
        try:
            run = _Run(session, folder, checkpoints, console)
            folder.write_config(resolved)
            folder.remove_summary()
            try:
                return run.finish(run.loop())
            finally:
                run.loader.close()
        finally:
            checkpoints.close()


@dataclasses.dataclass
class _Pending:
    """A step whose metrics are still on the device."""

    step: int
    metrics: dict[str, jax.Array]
    tokens: int


class _Run:
    """One call of `train`, from the restored state to the summary."""

    def __init__(
        self, session: Session, folder: WorkDir, checkpoints: Checkpoints, console: Console
    ):
        self.session = session
        self.config = session.config
        self.folder = folder
        self.checkpoints = checkpoints
        self.console = console
        self.started = time.perf_counter()
        self.first_step_seconds: float | None = None
        self.clock = self.started
        self.step_seconds: list[float] = []
        self.compiled: dict[str, int] = {}
        self.validation: Evaluation | None = None
        self.loader = session.data.loader(
            self.config.training.seed, self.config.training.accumulation
        )
        self.state, self.parts = session.initial()
        latest = checkpoints.latest_step
        if latest is not None:
            if latest > self.config.training.steps:
                raise InputError(
                    f"{folder.path} is at step {latest}, beyond training.steps="
                    f"{self.config.training.steps}; raise it or choose another --workdir"
                )
            self.state, self.parts, position = checkpoints.restore(
                latest, self.state, session.adapter
            )
            self.loader.set_state(position)
            console.print(f"resuming after step {latest}", highlight=False)
        self.first = latest or 0

    def loop(self) -> Adapter:
        """Runs the remaining steps and returns the trained adapter."""
        config = self.config
        total = config.training.steps
        train_step: Any = None
        model = self.session.base.model
        with (
            _signals() as caught,
            Reporter(
                self.folder.path, config.logging, total, self.first, self.console, config.to_dict()
            ) as reporter,
        ):
            pending: _Pending | None = None
            for step in range(self.first + 1, total + 1):
                batch = next(self.loader)
                if train_step is None:
                    train_step = self._compile(model, batch)
                self.state, metrics = train_step(self.state, self.parts, model, batch)
                # The metrics of the step before are ready by now: fetching them stalls nothing.
                if pending is not None:
                    self._report(reporter, pending)
                pending = _Pending(step, metrics, _count_tokens(batch))
                saving = step % config.checkpoint.every == 0 or step == total or bool(caught)
                evaluating = step == total or (
                    config.evaluation.every > 0 and step % config.evaluation.every == 0
                )
                if saving or evaluating:
                    # Fetched before saving: a state after a bad step must not become the last one.
                    self._report(reporter, pending, evaluating)
                    pending = None
                if saving:
                    self._save()
                    self.clock = time.perf_counter()
                if caught:
                    self.checkpoints.wait()
                    name = signal.Signals(caught[0]).name
                    raise Stopped(
                        f"{name}: saved step {step} of {total} in {self.folder.path}; the same "
                        "command goes on from there",
                        128 + caught[0],
                    )
        return self.parts.merge(self.state.trained)

    def _compile(self, model: Any, batch: Batch) -> Any:
        lowered = self.session.train_step().lower(self.state, self.parts, model, batch)
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        self.compiled = {"temporary_bytes": memory.temp_size_in_bytes}
        return compiled

    def _report(self, reporter: Reporter, pending: _Pending, evaluating: bool = False) -> None:
        metrics = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        if not all(map(math.isfinite, metrics.values())):
            latest = self.checkpoints.latest_step
            kept = "there is no checkpoint yet" if latest is None else f"step {latest} is kept"
            raise Diverged(
                f"step {pending.step}: loss {metrics['loss']}, gradient norm "
                f"{metrics['gradient_norm']}; stopped, {kept} in {self.folder.path}. Lower "
                "training.learning_rate, or raise warm-up or clipping"
            )
        now = time.perf_counter()
        seconds = now - self.clock
        if self.first_step_seconds is None:
            # It holds the compilation.
            self.first_step_seconds = now - self.started
        else:
            self.step_seconds.append(seconds)
        record = dict(metrics)
        if evaluating:
            found, samples = self._validate()
            record |= {f"validation_{k}": v for k, v in found.to_dict().items()}
            reporter.step(pending.step, record, pending.tokens, seconds)
            reporter.say(f"step {pending.step}: validation {describe(found)}")
            for line in samples:
                reporter.say(line)
        else:
            reporter.step(pending.step, record, pending.tokens, seconds)
        # What was evaluated since is no part of the next step.
        self.clock = time.perf_counter() if evaluating else now

    def _validate(self) -> tuple[Evaluation, list[str]]:
        section, data = self.config.evaluation, self.session.data
        factors = self._factors(self.parts.merge(self.state.trained))
        found = evaluate(self.session.base, factors, data, "validation", section.max_new_tokens)
        self.validation = found
        examples = data.validation[: section.samples]
        answers = generate_answers(self.session.base, factors, examples, section.max_new_tokens)
        return found, [
            f"    {e.question.splitlines()[-1]} -> {a!r} (right: {e.answer!r})"
            for e, a in zip(examples, answers, strict=True)
        ]

    def _factors(self, adapter: Adapter) -> Any:
        return jax.jit(lambda adapter: adapter.factors())(adapter)

    def _save(self) -> None:
        self.checkpoints.save(self.state, self.parts, self.loader.get_state())

    def finish(self, adapter: Adapter) -> dict[str, Any]:
        """Waits for the last checkpoint, evaluates on the test set, writes adapter and summary."""
        self.checkpoints.wait()
        session, config = self.session, self.config
        trained_seconds = time.perf_counter() - self.started
        summary: dict[str, Any] = {
            "steps": config.training.steps,
            "base": session.base.name,
            "base_fingerprint": session.base.fingerprint,
            "task": session.data.task.name,
            "adapter": adapter.summary(),
            "budget": session.budget(),
            "compiled": self.compiled,
            "data": session.data.report(),
            "versions": {"mos_jax": mos_jax.__version__, "jax": jax.__version__},
        }
        section, factors = config.evaluation, self._factors(adapter)
        if self.validation is None:
            # Killed after the last checkpoint: what the loop found then is only in metrics.jsonl.
            self.validation = evaluate(
                session.base, factors, session.data, "validation", section.max_new_tokens
            )
        summary["validation"] = self.validation.to_dict()
        scores = {"validation": self.validation.scores.tolist()}
        if section.test_at_end:
            self.console.print("evaluating on the test set", highlight=False)
            found = evaluate(session.base, factors, session.data, "test", section.max_new_tokens)
            scores["test"] = found.scores.tolist()
            summary["test"] = compare(
                session.base,
                factors,
                session.data,
                "test",
                section.max_new_tokens,
                found=found,
                with_base=section.compare_base,
            )
        self.folder.write_scores(scores)
        save_adapter(
            self.folder.adapter,
            adapter,
            base_fingerprint=session.base.fingerprint,
            metadata={
                "base": session.base.name,
                "task": session.data.task.name,
                "steps": config.training.steps,
                "config": config.to_dict(),
                "mos_jax_version": mos_jax.__version__,
            },
        )
        summary["adapter_bytes"] = sum(
            (self.folder.adapter / name).stat().st_size for name in (ARRAYS_FILE, CARD_FILE)
        )
        summary["seconds"] = {
            "to_first_step": self.first_step_seconds,
            "median_step": statistics.median(self.step_seconds) if self.step_seconds else None,
            "training": trained_seconds,
            "total": time.perf_counter() - self.started,
        }
        self.folder.write_summary(summary)
        return summary


def describe(found: Evaluation) -> str:
    """An evaluation in one line."""
    low, high = found.interval
    return (
        f"accuracy {found.accuracy:.3f} (95% {low:.3f} to {high:.3f}, n={len(found.scores)}), "
        f"loss {found.loss:.4f}"
    )


def _count_tokens(batch: Batch) -> int:
    return int((batch.segments != 0).sum())


@contextmanager
def _disk_errors_in_words(folder: WorkDir) -> Iterator[None]:
    """What was saved before a disk filled up stays; the user needs no trace to mend it."""
    try:
        yield
    except OSError as error:
        raise RunEnded(
            f"{folder.path} cannot be written ({error}); what was saved there before is kept. "
            "Mend that and run the same command again"
        ) from error


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Notes SIGTERM and SIGINT instead of dying; the loop stops after the step under way."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    # Only the main thread may set handlers; elsewhere the caller's stay.
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
