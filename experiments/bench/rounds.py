"""Interleaved rounds, and what is made of their times."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from experiments.bench.worker import Run
from mos_jax.errors import RunEnded

LOSS_TOLERANCE = 1e-3
PACKAGES = (
    "mos_jax", "jax", "jaxlib", "flax", "optax", "numpy",
    "torch", "transformers", "peft", "accelerate",
)  # fmt: skip

# A run in which other programs took more than this share of the processors is made again, as often
# as this, and the least disturbed one counts. Seconds have no part in the choice.
DISTURBED = 0.05
TRIES = 3

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Played:
    """What was measured of each contestant, one entry a round.

    Attributes:
      seconds: by the clock.
      others: share of the processors that other programs took meanwhile.
      processor: processor seconds of all threads of the contestant's process. They say more than
        the clock where other programs run, but count a thread that waits in a spin, as torch's do,
        as work.
    """

    seconds: Times = field(default_factory=dict)
    others: Times = field(default_factory=dict)
    processor: Times = field(default_factory=dict)


class Runner(Protocol):
    """What `play` needs of a `Worker`."""

    def run(self, contestant: str) -> Run:
        """Does the contestant's work once."""
        ...


def play(
    contestants: Sequence[tuple[str, Runner]],
    rounds: int,
    say: Callable[[str], None],
    tries: int = TRIES,
) -> Played:
    """Runs every contestant once per round, after a warm-up round that does not count.

    The order rotates, so that nobody always follows the same neighbour or the same noise.
    """
    names = [name for name, _ in contestants]
    played = Played()
    for times in (played.seconds, played.others, played.processor):
        times.update({name: [] for name in names})
    for number in range(rounds + 1):
        turn = number % len(contestants)
        for name, runner in [*contestants[turn:], *contestants[:turn]]:
            run = _undisturbed(name, runner, say, tries) if number else runner.run(name)
            if number:
                played.seconds[name].append(run.seconds)
                played.others[name].append(run.others or 0.0)
                played.processor[name].append(run.processor or 0.0)
        if number:
            shown = ", ".join(f"{name} {played.seconds[name][-1]:.3f} s" for name in names)
            say(f"round {number}/{rounds}: {shown}")
    return played


def _undisturbed(name: str, runner: Runner, say: Callable[[str], None], tries: int) -> Run:
    runs: list[Run] = []
    while len(runs) < tries:
        runs.append(runner.run(name))
        others = runs[-1].others or 0.0
        if others <= DISTURBED:
            break
        seconds = runs[-1].seconds
        say(f"{name}: {seconds:.1f} s, with {others:.0%} of the processors busy for others")
    return min(runs, key=lambda run: run.others or 0.0)


@dataclass(frozen=True)
class Rounds:
    """How something is measured.

    Attributes:
      count: rounds that count; one more warms up.
      threads: processors that a contestant may use.
      tries: how often a disturbed run is made at most.
    """

    count: int
    threads: int
    tries: int = TRIES


def play_facts(
    contestants: Sequence[tuple[str, Runner]], how: Rounds, say: Callable[[str], None]
) -> dict[str, Any]:
    """`play`, as JSON values by contestant.

    Returns:
      By contestant `seconds`, `processor_seconds` and `others` by round; and the spread over the
      rounds of its processor seconds (`ratio`) and seconds (`clock_ratio`) to those of the first.
    """
    played = play(contestants, how.count, say, how.tries)
    first = contestants[0][0]
    return {
        name: {
            "seconds": played.seconds[name],
            "processor_seconds": played.processor[name],
            "others": played.others[name],
            "ratio": _ratios(played.processor[name], played.processor[first]),
            "clock_ratio": _ratios(played.seconds[name], played.seconds[first]),
        }
        for name, _ in contestants
    }


def _ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(
    above: Sequence[float],
    below: Sequence[float],
    at_most: float | None = None,
    at_least: float | None = None,
) -> dict[str, Any]:
    """The spread of the ratios of each round, beside the bound it is held to."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {**spread(each), "rounds": each, "at_most": at_most, "at_least": at_least}


def spread_words(spread: Mapping[str, float]) -> str:
    """A spread in words: the median (smallest to largest)."""
    return f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"


def check_losses(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises RunEnded if the contestants do not compute the same loss before any step."""
    losses = {name: facts["loss"] for name, facts in found.items()}
    apart = max(losses.values()) - min(losses.values())
    if not all(map(math.isfinite, losses.values())) or apart > LOSS_TOLERANCE:
        raise RunEnded(f"losses on the same batch differ by over {LOSS_TOLERANCE}: {losses}")


def machine_facts(threads: int) -> dict[str, Any]:
    """What the times depend on: processor, cores, load, versions, date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": list(os.getloadavg()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
