"""Choosing each arm's learning rate on validation data."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from mos_jax.sweeps.definition import Arm, Sweep
from mos_jax.sweeps.execute import status_of


@dataclasses.dataclass(frozen=True)
class Choice:
    """The learning rate of one arm and what it was chosen from.

    Attributes:
      arm: its name.
      learning_rate: the chosen one; None when no run of the arm finished.
      tried: by rate, the mean validation `loss` and `accuracy` over the tuning seeds that
        finished, and how many those are (`runs`).
    """

    arm: str
    learning_rate: float | None
    tried: dict[float, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        tried = {f"{rate:g}": found for rate, found in self.tried.items()}
        return {"learning_rate": self.learning_rate, "tried": tried}


def choose_rates(sweep: Sweep, root: Path) -> dict[str, Choice]:
    """Chooses by `sweep.tuning_metric` among the rates whose tuning runs all finished.

    A rate with a run that failed, because it diverged for example, is not chosen while another is
    left. An arm with one rate has nothing to choose.
    """
    choices = {}
    for one in sweep.arms:
        if len(one.learning_rates) == 1:
            choices[one.name] = Choice(one.name, one.learning_rates[0], {})
        else:
            choices[one.name] = _choose(sweep, one, root)
    return choices


def _choose(sweep: Sweep, one: Arm, root: Path) -> Choice:
    tried: dict[float, dict[str, float]] = {}
    for rate in one.learning_rates:
        found = [
            json.loads((root / run.folder / "summary.json").read_text())["validation"]
            for run in sweep.tuning()
            if run.arm == one.name
            and run.learning_rate == rate
            and status_of(root / run.folder) == "finished"
        ]
        if found:
            tried[rate] = {
                name: math.fsum(f[name] for f in found) / len(found)
                for name in ("loss", "accuracy")
            } | {"runs": len(found)}

    def rank(rate: float) -> tuple[float, ...]:
        seen = tried[rate]
        failed = sweep.section.tuning_seeds - seen["runs"]
        # Comparisons with nan are false, so a rate that stands first would win by it.
        loss = seen["loss"] if math.isfinite(seen["loss"]) else math.inf
        if sweep.section.tuning_metric == "accuracy":
            return failed, -seen["accuracy"], loss
        return failed, loss

    return Choice(one.name, min(tried, key=rank) if tried else None, tried)
