"""What a sweep found, arranged by arm, with its gaps kept in sight."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mos_jax.data.config import MEMORY
from mos_jax.errors import InputError, suggest
from mos_jax.reporting.curves import Curve, RateTrial
from mos_jax.sweeps.definition import SweepSection
from mos_jax.sweeps.records import Record, read_curve, read_records
from mos_jax.sweeps.runner import load_sweep


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
      name: as the report shows it.
      folder: of its sweep.
      learning_rates: those it was tried at.
      unequal: whether it does not meet the budget that the others meet.
      tuning: records of the runs that chose the rate.
      final: records of the runs that count, by seed; missing and failed ones too.
    """

    name: str
    folder: Path
    learning_rates: tuple[float, ...]
    unequal: bool
    tuning: tuple[Record, ...]
    final: tuple[Record, ...]

    @property
    def finished(self) -> list[Record]:
        """The finished runs of the final stage."""
        return [record for record in self.final if record["status"] == "finished"]

    @property
    def scores(self) -> dict[int, np.ndarray]:
        """Test scores [items] by seed, of the finished runs."""
        return {
            record["seed"]: np.asarray(record["test_scores"], np.float64)
            for record in self.finished
            if record["test_scores"] is not None
        }

    @property
    def data(self) -> str | None:
        """Names the items that the arm was tested on; arms that differ here cannot be paired."""
        report = self.fact("data_report")
        return None if report is None else report.get("fingerprint")

    @property
    def seeds(self) -> str:
        """How many seeds the arm's numbers are from: "4", or "2 of 4" when some are lacking."""
        have, planned = len(self.scores), len(self.final)
        return str(have) if have == planned else f"{have} of {planned}"

    @property
    def learning_rate(self) -> float:
        """The rate of the final runs."""
        return float(self.final[0]["learning_rate"])

    def fact(self, name: str) -> Any:
        """A fact that is the same in all runs, such as the trained parameters; None if unknown."""
        for record in (*self.final, *self.tuning):
            if record.get(name) is not None:
                return record[name]
        return None

    def median(self, name: str) -> float | None:
        """The median of a measured quantity over the finished runs; None if there is none."""
        values = [record[name] for record in self.finished if record.get(name) is not None]
        return float(statistics.median(values)) if values else None

    def trials(self, metric: str) -> list[RateTrial]:
        """What the tuning runs reached; runs that were never started are left out."""
        return [
            RateTrial(record["learning_rate"], record[metric])
            for record in self.tuning
            if record["status"] != "missing"
        ]

    def curve(self, metric: str) -> Curve | None:
        """A metric over steps: of the finished final runs, at the steps that all of them have."""
        runs = []
        for record in self.finished:
            lines = read_curve(self.folder, record)
            points = {line["step"]: line[metric] for line in lines if line.get(metric) is not None}
            if points:
                runs.append(points)
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        if not steps:
            return None
        return Curve(np.array(steps), np.array([[run[step] for step in steps] for run in runs]))


@dataclasses.dataclass(frozen=True)
class Results:
    """All arms of a report.

    Attributes:
      title: names it.
      folders: of the sweeps.
      section: how the (first) sweep was run and is compared; without a budget where the sweeps
        have different ones.
      arms: in the order of the config file.
      baselines: names of the arms that all others are compared with, at least one.
      planned: the baselines that the (first) sweep's config names.
    """

    title: str
    folders: tuple[Path, ...]
    section: SweepSection
    arms: tuple[Arm, ...]
    baselines: tuple[str, ...]
    planned: tuple[str, ...]

    def arm(self, name: str) -> Arm:
        """The arm called `name`, which exists."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def records(self) -> list[Record]:
        """All records, arm by arm, tuning first."""
        return [record for arm in self.arms for record in (*arm.tuning, *arm.final)]

    def fact(self, name: str) -> Any:
        """A fact of the first run that has it; None if none has."""
        return next((f for arm in self.arms if (f := arm.fact(name)) is not None), None)

    def common(self, name: str) -> list[Any]:
        """The different values of a field over all records, in order of appearance."""
        return list(dict.fromkeys(record[name] for record in self.records))

    @property
    def is_memory(self) -> bool:
        """Whether this is the memory probe."""
        return self.common("task") == [MEMORY]

    @property
    def lora(self) -> Arm | None:
        """The LoRA arm that step times are compared with: the one nearest to the budget."""
        arms = [arm for arm in self.arms if arm.fact("method") == "lora" and arm.finished]
        return min(arms, key=lambda arm: abs((arm.fact("budget_ratio") or 1) - 1), default=None)

    @property
    def guess(self) -> tuple[float, str] | None:
        """What always giving the commonest answer reaches, and words for it."""
        rate = self.fact("commonest_answer_rate")
        return None if rate is None or self.is_memory else (rate, "always the commonest answer")

    @property
    def lacking(self) -> list[Record]:
        """The records of runs that are missing or failed."""
        return [record for record in self.records if record["status"] != "finished"]


def load_results(
    workdirs: Sequence[str | os.PathLike[str]], baselines: Sequence[str] = ()
) -> Results:
    """Reads one sweep, or several that are reported together.

    Where two arms have one name, the folder's name is added to both.

    Args:
      workdirs: folders of sweeps, at least one.
      baselines: names of arms to compare with; none = those that the first sweep's config names.

    Raises:
      InputError: for a folder that holds no sweep, no finished run anywhere, a baseline that is no
        arm, or folders whose arms cannot be told apart.
    """
    folders = tuple(Path(workdir) for workdir in workdirs)
    sweeps = [load_sweep(folder) for folder in folders]
    names = [arm.name for sweep in sweeps for arm in sweep.arms]
    arms: list[Arm] = []
    for folder, sweep in zip(folders, sweeps, strict=True):
        records = [{**record} for record in read_records(folder)]
        for one in sweep.arms:
            own = [record for record in records if record["arm"] == one.name]
            twice = names.count(one.name) > 1
            name = f"{one.name} [{folder.resolve().name}]" if twice else one.name
            for record in own:
                record["arm"] = name
            stages: Mapping[str, tuple[Record, ...]] = {
                stage: tuple(record for record in own if record["stage"] == stage)
                for stage in ("tune", "final")
            }
            arms.append(
                Arm(
                    name,
                    folder,
                    one.learning_rates,
                    one.unequal,
                    stages["tune"],
                    stages["final"],
                )
            )
    order = [one.name for one in sweeps[0].arms]
    planned = tuple(arms[order.index(name)].name for name in sweeps[0].baselines)
    title = " and ".join(folder.resolve().name for folder in folders)
    known = [arm.name for arm in arms]
    if len(set(known)) < len(known):
        raise InputError(
            f"two of {', '.join(map(str, folders))} have the same last name and arms of the same "
            "names, which could not be told apart; rename a folder"
        )
    for name in baselines:
        if name not in known:
            raise InputError(f"--baseline={name} is no arm; {suggest(name, known)}")
    section = sweeps[0].section
    if len({sweep.section.budget_rank for sweep in sweeps}) > 1:
        # Arms of different budgets meet no common one.
        section = dataclasses.replace(section, budget_rank=0)
    results = Results(title, folders, section, tuple(arms), tuple(baselines) or planned, planned)
    if not any(record["status"] == "finished" for record in results.records):
        raise InputError(
            f"{', '.join(map(str, folders))}: none of {len(results.records)} runs is finished, so "
            "there is nothing to report; run experiments/sweep.py first"
        )
    return results
