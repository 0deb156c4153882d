"""Learning-rate range test (Smith, WACV 2017, arXiv 1506.01186).

The rate rises exponentially while an adapter trains. Where the loss falls, the rate is of use;
where it turns, the rate is too high.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax
from rich.console import Console

from mos_jax.distributed.agreement import agree, is_first
from mos_jax.errors import InputError, RunEnded
from mos_jax.files import write_file
from mos_jax.training.config import RunConfig
from mos_jax.training.finish import StepClock, versions
from mos_jax.training.metrics import NoLog, Reporter
from mos_jax.training.optimizer import make_optimizer
from mos_jax.training.session import Session

JSON_FILE = "lr_find.json"

MIN_STEPS = 10
# Width of the smoothing (a Gaussian's standard deviation) as a share of all steps.
SMOOTHING = 1 / 30
# The test is over once the mean of the last losses is this many times the lowest such mean, and
# above the first loss: where the loss has become small, three times as much may be noise.
GIVE_UP, LAST = 3.0, 3
# A fall by less than this share of the first loss is taken for noise.
LEAST_FALL = 0.05
# The bottom of the curve is all that lies above its lowest point by at most this share of the fall.
BOTTOM = 0.1


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """What a range test measured, one entry a step.

    Attributes:
      rates: learning rates, rising.
      losses: of the batch of each step, before its update; nats per target token.
      smoothed: see `smooth`.
      stopped: why it ended before the highest rate; empty when it did not.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    stopped: str


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A rate to begin with; see `suggest_rate`.

    Attributes:
      rate: the suggestion.
      settled: the rate at which the smoothed loss first reached its bottom.
      edge: the highest rate before it first left the bottom again.
      rule: how `rate` follows, in words.
    """

    rate: float
    settled: float
    edge: float
    rule: str


def check_range(min_rate: float, max_rate: float, steps: int) -> None:
    """Raises InputError for a range that cannot be tested."""
    for name, rate in (("min_rate", min_rate), ("max_rate", max_rate)):
        if not (math.isfinite(rate) and rate > 0):
            raise InputError(f"--{name} must be a finite number above 0, got {rate!r}")
    if max_rate < 10 * min_rate:
        raise InputError(
            f"--max_rate={max_rate!r} must be at least 10 times --min_rate={min_rate!r}, or the "
            "loss has no room to fall and rise again"
        )
    if steps < MIN_STEPS:
        raise InputError(f"--steps must be at least {MIN_STEPS}, got {steps!r}")


def rising_schedule(min_rate: float, max_rate: float, steps: int) -> optax.Schedule:
    """From `min_rate` at step 0 to `max_rate` at step `steps` - 1, by equal factors."""
    return optax.exponential_decay(min_rate, steps - 1, max_rate / min_rate)


def smooth(losses: Sequence[float], steps: int) -> list[float]:
    """Means of neighbours under a Gaussian, which does not lag behind the curve.

    Args:
      losses: one a step.
      steps: of the whole test, of which the Gaussian spans the same share, however many they are.
    """
    numbers = np.arange(len(losses))
    away = (numbers[:, None] - numbers[None, :]) / (SMOOTHING * steps)
    weights = np.exp(-0.5 * away**2)
    return (weights @ np.asarray(losses) / weights.sum(axis=1)).tolist()


def suggest_rate(rates: Sequence[float], smoothed: Sequence[float]) -> Suggestion:
    """Reads a rate off the curve of a range test: the middle of its bottom, on the log axis.

    Below the bottom a rate is too low to do its work in the few steps that the test grants it,
    above it a rate does harm. Both ends are more certain than the lowest point, for the bottom is
    flat and noisy, and than the steepest fall, which a few lucky batches can be. A tenth of the
    rate at the lowest point, usual for SGD, is needlessly low for AdamW on low-rank factors.

    Args:
      rates: rising.
      smoothed: the smoothed loss at each.

    Raises:
      RunEnded: if the loss does not fall, so that nothing can be read off.
    """
    curve = np.asarray(smoothed)
    lowest = float(curve.min())
    fall = float(curve[0]) - lowest
    if fall < LEAST_FALL * abs(curve[0]):
        raise RunEnded(
            f"the smoothed loss fell from {curve[0]:.4f} to {lowest:.4f} at most, too little to "
            f"read a rate off; raise --max_rate (the test came to {rates[-1]:.1e}) or --steps"
        )
    inside = curve <= lowest + BOTTOM * fall
    first = int(np.argmax(inside))
    left = np.flatnonzero(~inside[first:])
    last = first + int(left[0]) - 1 if left.size else len(rates) - 1
    settled, edge = float(rates[first]), float(rates[last])
    rule = f"the middle of the bottom of the curve, from {settled:.1e} to {edge:.1e}"
    if not left.size:
        rule += ", the highest tried: the loss had not turned up yet, so a higher one may be right"
    return Suggestion(math.sqrt(settled * edge), settled, edge, rule)


def find_rate(
    config: RunConfig,
    workdir: str | os.PathLike[str],
    console: Console | None = None,
    *,
    min_rate: float = 1e-5,
    max_rate: float = 1.0,
    steps: int = 100,
) -> dict[str, Any]:
    """Runs a range test and writes what it found to lr_find.json in the folder `workdir`.

    Several processes that share JAX's devices (`jax.distributed`) call it alike; the first one
    writes and prints.

    Args:
      config: the run whose rate is asked for; its schedule, warm-up and steps have no part.
      workdir: the folder.
      console: where progress goes.
      min_rate: rate of the first step.
      max_rate: rate of the last.
      steps: how many; the test ends early once the loss is far above its best.

    Returns:
      What lr_find.json holds: the fields of `RangeTest`; `suggestion`, those of `Suggestion`, or
      None with the reason as `problem`; and `config`.

    Raises:
      InputError: for a range, configuration or folder that cannot be used; nothing is written.
    """
    console = console if console is not None else Console()
    if not is_first():
        console = Console(quiet=True)
    check_range(min_rate, max_rate, steps)
    tested = {"min_rate": min_rate, "max_rate": max_rate, "steps": steps}
    agree("the test", lambda: {**config.to_dict(), **tested, "versions": versions()})
    place = Path(workdir)
    if place.exists() and not place.is_dir():
        raise InputError(f"--workdir={place} is a file; give a folder")
    session = Session.create(config)
    agree("what is in their files", session.facts)
    test = run_range_test(session, min_rate, max_rate, steps, console)
    found: dict[str, Any] = {**dataclasses.asdict(test), "suggestion": None, "problem": ""}
    try:
        found["suggestion"] = dataclasses.asdict(suggest_rate(test.rates, test.smoothed))
    except RunEnded as error:
        found["problem"] = str(error)
    found["config"] = config.to_dict()
    if is_first():
        place.mkdir(parents=True, exist_ok=True)
        write_file(place / JSON_FILE, (json.dumps(found, indent=2) + "\n").encode())
    return found


def print_suggestion(found: Mapping[str, Any], console: Console) -> None:
    """Says what `find_rate` found. Raises RunEnded where there is nothing to suggest."""
    if found["stopped"]:
        console.print(f"Stopped early: {found['stopped']}.", highlight=False)
    if found["suggestion"] is None:
        raise RunEnded(found["problem"])
    rate = found["suggestion"]["rate"]
    console.print(f"Suggestion: {rate:.1e}, {found['suggestion']['rule']}.", highlight=False)
    console.print(
        f"It is the centre of a grid, for example {rate / 2:.1e}, {rate:.1e} and {rate * 2:.1e}, "
        "to be judged on validation data after whole runs; one short test cannot choose a rate.",
        highlight=False,
    )


def run_range_test(
    session: Session, min_rate: float, max_rate: float, steps: int, console: Console
) -> RangeTest:
    """Trains the session's adapter for `steps` steps while the rate rises; the session is spent."""
    config = session.config
    section = config.training
    schedule = rising_schedule(min_rate, max_rate, steps)
    optimizer = make_optimizer(section, config.adapter.rate_ratios(), schedule)
    session = dataclasses.replace(session, optimizer=optimizer)
    state, parts = session.initial()
    step_function, model = session.train_step(), session.base.model
    source = session.source()
    losses: list[float] = []
    best, stopped = math.inf, ""
    clock = StepClock()
    with Reporter([NoLog()], config.logging, steps, 0, console, "range test") as reporter:
        for step in range(steps):
            batch = source[step]
            state, metrics = step_function(state, parts, model, session.place_batch(batch))
            loss = float(metrics["loss"])
            if not math.isfinite(loss):
                stopped = f"the loss was {loss} at step {step + 1}"
                break
            losses.append(loss)
            reporter.step(step + 1, [{"loss": loss}], [source.count_tokens(step)], clock.step())
            recent = float(np.mean(losses[-LAST:]))
            best = min(best, recent)
            if recent > max(GIVE_UP * best, losses[0]):
                stopped = f"the loss was {recent / best:.1f} times its best at step {step + 1}"
                break
    if not losses:
        raise RunEnded(f"{stopped}, before any update: no learning rate is to blame")
    rates = [float(schedule(step)) for step in range(len(losses))]
    return RangeTest(rates, losses, smooth(losses, steps), stopped)
