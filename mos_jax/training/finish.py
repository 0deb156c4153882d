"""What is measured of a trained adapter, and the files that a finished run leaves."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console

import mos_jax
from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.storage import ARRAYS_FILE, CARD_FILE, save_adapter
from mos_jax.distributed.agreement import wait_for_all
from mos_jax.evaluation.answers import Evaluation, evaluate, generate_answers
from mos_jax.evaluation.compare import compare
from mos_jax.training.session import Session
from mos_jax.training.workdir import WorkDir

# One function, so that what it compiled for an adapter serves all its evaluations.
_factors = jax.jit(lambda adapter: adapter.factors())


class StepClock:
    """Times the steps of a run.

    Attributes:
      started: when it was made, as `time.perf_counter` tells it.
      to_first_step: seconds until the first step was done, which hold the compilation.
      steps: seconds of the steps after it.
    """

    def __init__(self) -> None:
        self.started = self._last = time.perf_counter()
        self.to_first_step: float | None = None
        self.steps: list[float] = []

    def step(self) -> float:
        """Notes that a step is done; returns its seconds."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self.to_first_step is None:
            self.to_first_step = now - self.started
        else:
            self.steps.append(seconds)
        return seconds

    def restart(self) -> None:
        """Leaves the time since the last step out of the next one's."""
        self._last = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Course:
    """How a run went.

    Attributes:
      clock: of its steps.
      training_seconds: from the start to the last checkpoint.
      runs: how many shared its steps; the run's time is its share.
      facts: for the summary: of the compiled step, of stacking.
    """

    clock: StepClock
    training_seconds: float
    runs: int = 1
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def seconds(self, finishing_since: float) -> dict[str, float | None]:
        """The summary's `seconds`; finishing began at `finishing_since`."""
        steps = self.clock.steps
        training = self.training_seconds / self.runs
        return {
            "to_first_step": self.clock.to_first_step,
            "median_step": statistics.median(steps) / self.runs if steps else None,
            "training": training,
            "total": training + time.perf_counter() - finishing_since,
        }


def validate(session: Session, adapter: Adapter) -> tuple[Evaluation, list[str]]:
    """Evaluates on the validation set; returns also the sample answers, a line each."""
    section, data, base = session.config.evaluation, session.data, session.base
    factors = _factors(adapter)
    found = evaluate(base, factors, data, "validation", section.max_new_tokens)
    examples = data.validation[: section.samples]
    answers = generate_answers(base, factors, examples, section.max_new_tokens)
    return found, [
        f"    {e.question.splitlines()[-1]} -> {a!r} (right: {e.answer!r})"
        for e, a in zip(examples, answers, strict=True)
    ]


def validation_record(found: Evaluation) -> dict[str, float | int]:
    """An evaluation as fields of a line of metrics.jsonl."""
    return {f"validation_{name}": value for name, value in found.to_dict().items()}


def describe(found: Evaluation) -> str:
    """An evaluation in one line."""
    low, high = found.interval
    return (
        f"accuracy {found.accuracy:.3f} (95% {low:.3f} to {high:.3f}, n={len(found.scores)}), "
        f"loss {found.loss:.4f}"
    )


def finish(
    session: Session,
    folder: WorkDir,
    adapter: Adapter,
    validation: Evaluation | None,
    course: Course,
    console: Console,
) -> dict[str, Any]:
    """Evaluates on the test set where asked; writes scores, adapter and, last, the summary.

    Args:
      session: of the run.
      folder: of the run.
      adapter: trained.
      validation: of this adapter. None when the steps were done by an earlier process, which
        left what it found in metrics.jsonl only: it is evaluated again.
      course: how the run went.
      console: where progress goes.

    Returns:
      The summary.
    """
    began = time.perf_counter()
    config, base, data = session.config, session.base, session.data
    adapter = session.whole(adapter)
    section, factors = config.evaluation, _factors(adapter)
    if validation is None:
        validation = evaluate(base, factors, data, "validation", section.max_new_tokens)
    summary: dict[str, Any] = {
        "steps": config.training.steps,
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "base_quantization": base.quantization,
        "task": data.task.name,
        "adapter": adapter.summary(),
        "budget": session.budget(),
        **course.facts,
        "data": data.report(),
        "versions": versions(),
        "validation": validation.to_dict(),
    }
    scores = {"validation": validation.scores.tolist()}
    if section.test_at_end:
        console.print("evaluating on the test set", highlight=False)
        found = evaluate(base, factors, data, "test", section.max_new_tokens)
        scores["test"] = found.scores.tolist()
        summary["test"] = compare(
            base,
            factors,
            data,
            "test",
            section.max_new_tokens,
            found=found,
            with_base=section.compare_base,
        )
    folder.write_scores(scores)
    if folder.writes:
        save_adapter(
            folder.adapter,
            adapter,
            base_fingerprint=base.fingerprint,
            metadata={
                "base": base.name,
                "task": data.task.name,
                "steps": config.training.steps,
                "config": config.to_dict(),
                "mos_jax_version": mos_jax.__version__,
            },
        )
    wait_for_all("adapter written")
    summary["adapter_bytes"] = sum(
        (folder.adapter / name).stat().st_size for name in (ARRAYS_FILE, CARD_FILE)
    )
    summary["seconds"] = course.seconds(began)
    folder.write_summary(summary)
    return summary


def versions() -> dict[str, str]:
    """Of this package and of JAX."""
    return {"mos_jax": mos_jax.__version__, "jax": jax.__version__}
