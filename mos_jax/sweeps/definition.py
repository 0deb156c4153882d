"""What a sweep is: arms, learning rates, seeds, and every run they make, checked beforehand."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from mos_jax.adapters.methods import count_parameters
from mos_jax.errors import InputError, suggest
from mos_jax.sweeps.combinators import ARM, Item
from mos_jax.training.config import RunConfig, TrainingSection, default_adapter
from mos_jax.training.section import Section
from mos_jax.training.session import Loads, find_placement

TUNING_METRICS = ("loss", "accuracy")
# Tuning draws its seeds from here on: a rate must not be chosen by the luck of a run that counts.
FIRST_TUNING_SEED = 1000
RATES = "sweep.learning_rates"
UNEQUAL = "sweep.unequal"
# What a sweep sets itself, so an arm must not.
TAKEN = (
    "training.seed", "training.learning_rate", "adapter.routing_seed", "evaluation.compare_base",
    "evaluation.samples", "evaluation.test_at_end",
)  # fmt: skip
# What an arm may say of itself beside fields of the run.
ARM_FIELDS = (RATES, UNEQUAL)

Stage = Literal["tune", "final"]


@dataclasses.dataclass(frozen=True)
class SweepSection(Section):
    """How the arms of a sweep are run and compared; a config's section `sweep`.

    Attributes:
      learning_rates: tried for each arm, with commas; empty = `training.learning_rate` for all.
        An arm's own list is its override "sweep.learning_rates".
      tuning_seeds: runs for each arm and rate, judged on the validation set alone. Their seeds
        count from 1000, so none of them is a run that is reported.
      tuning_metric: "loss" (lowest) or "accuracy" (highest, ties by loss), of the validation set.
      seeds: reported runs of each arm, at its best rate; their seeds count from 0. A seed decides
        initialisation, order of the data, dropout and, for routed methods, the tables.
      baseline: names of the arms that all are compared with, with commas; empty = the first arm.
      margin: accuracy that an arm may lose against the baseline and still be called non-inferior.
        Fix it before the runs. 0 = not asked.
      budget_rank: rank of the LoRA whose trained parameters are the budget; 0 = no budget.
      stack: how many runs that differ only in seeds and rates one compiled step trains together.
    """

    learning_rates: str = ""
    tuning_seeds: int = 1
    tuning_metric: str = "loss"
    seeds: int = 4
    baseline: str = ""
    margin: float = 0.05
    budget_rank: int = 0
    stack: int = 1

    def check(self, name: str) -> None:
        """See base class."""
        for field, minimum in (("tuning_seeds", 1), ("seeds", 1), ("stack", 1), ("budget_rank", 0)):
            if getattr(self, field) < minimum:
                raise InputError(
                    f"config: {name}.{field} must be at least {minimum}, got {getattr(self, field)}"
                )
        if not 0 <= self.margin < 1:
            raise InputError(f"config: {name}.margin must be in [0, 1), got {self.margin!r}")
        if self.tuning_metric not in TUNING_METRICS:
            raise InputError(
                f"config: {name}.tuning_metric {self.tuning_metric!r} is unknown; "
                f"{suggest(self.tuning_metric, TUNING_METRICS)}"
            )
        _rates(f"{name}.learning_rates", self.learning_rates)


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
      arm: name of its arm.
      stage: "tune" or "final".
      seed: of the run.
      learning_rate: peak rate.
      config: all of it.
      folder: where it lies, relative to the sweep's folder.
    """

    arm: str
    stage: Stage
    seed: int
    learning_rate: float
    config: RunConfig
    folder: str


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm: a name, what it changes in the base config, and the rates it is tried at."""

    name: str
    overrides: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    unequal: bool = False


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A whole sweep.

    Attributes:
      section: how it is run.
      base: the config that all arms start from, nested plain values.
      arms: in the order of the config file.
    """

    section: SweepSection
    base: Mapping[str, Any]
    arms: tuple[Arm, ...]

    @classmethod
    def create(cls, config: Mapping[str, Any], items: Iterable[Item]) -> Sweep:
        """Builds a sweep and every config in it.

        Args:
          config: nested values of a config file, with or without a section `sweep`.
          items: dotted overrides, one item an arm; see `combinators`.

        Raises:
          InputError: no items, two arms of one name, an unknown field (with the nearest name), or
            an item whose config is refused; the message names the item.
        """
        base = copy.deepcopy(dict(config))
        section = SweepSection.from_mapping("sweep", base.pop("sweep", {}))
        RunConfig.from_mapping(base)
        arms = tuple(_arm(item, section, base) for item in items)
        if not arms:
            raise InputError("the sweep is empty: its config file yields no items")
        names = [one.name for one in arms]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two arms of the sweep are called {name!r}; name them apart")
        slugs = {slug(name): name for name in names}
        if len(slugs) < len(names):
            lost = next(name for name in names if name not in slugs.values())
            raise InputError(f"the arms {lost!r} and {slugs[slug(lost)]!r} would share a folder")
        sweep = cls(section, base, arms)
        for name in sweep.baselines:
            if name not in names:
                raise InputError(
                    f"config: sweep.baseline {name!r} is no arm; {suggest(name, names)}"
                )
        # Builds every config: what cannot be built is named here, before any run starts.
        list(sweep.every_run())
        return sweep

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the arms that all others are compared with, the main one first."""
        named = tuple(part.strip() for part in self.section.baseline.split(",") if part.strip())
        return named or (self.arms[0].name,)

    @property
    def baseline(self) -> str:
        """The first of `baselines`."""
        return self.baselines[0]

    def arm(self, name: str) -> Arm:
        """The arm called `name`. Raises InputError."""
        for one in self.arms:
            if one.name == name:
                return one
        raise InputError(
            f"the sweep has no arm {name!r}; {suggest(name, [a.name for a in self.arms])}"
        )

    def tuning(self) -> list[SweepRun]:
        """The runs that choose learning rates: of the arms with more than one."""
        return [
            self._run(one, "tune", FIRST_TUNING_SEED + index, rate)
            for one in self.arms
            if len(one.learning_rates) > 1
            for rate in one.learning_rates
            for index in range(self.section.tuning_seeds)
        ]

    def final(self, rates: Mapping[str, float] | None = None) -> list[SweepRun]:
        """The runs that are reported.

        Seeds in the outer loop, so that a sweep that is cut short has all arms at fewer seeds.

        Args:
          rates: by arm, the chosen one; arms left out, or None, stand at the first of their rates.
        """
        rates = rates or {}
        return [
            self._run(one, "final", seed, rates.get(one.name, one.learning_rates[0]))
            for seed in range(self.section.seeds)
            for one in self.arms
        ]

    def every_run(self) -> Iterator[SweepRun]:
        """All runs; those of the final stage at a rate that may not be the chosen one."""
        yield from self.tuning()
        yield from self.final()

    def check_arms(self, loads: Loads) -> dict[str, int]:
        """Builds every arm's adapter from shapes alone, and loads its data.

        Args:
          loads: where bases and data come from.

        Returns:
          Trained parameters by arm.

        Raises:
          InputError: naming the first arm that cannot be built, and why.
        """
        counts = {}
        for one in self.arms:
            config = self._run(one, "final", 0, one.learning_rates[0]).config
            try:
                base = loads.base(config.base, find_placement(config))
                adapted = config.adapted(base.sites)
                counts[one.name] = sum(count_parameters(config.adapter, adapted).values())
                # Or a mistyped path would be found by every run in turn, and recorded each time.
                loads.data(config.data, base)
            except InputError as error:
                raise InputError(f"arm {one.name!r} cannot be built: {error}") from None
        return counts

    def resolved(self) -> dict[str, Any]:
        """The base config and the section `sweep` with every field in its place, as JSON values."""
        fields = {**RunConfig.from_mapping(self.base).to_dict(), "sweep": vars(self.section)}
        return json.loads(json.dumps(fields))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them back."""
        return {
            "config": {**self.base, "sweep": dataclasses.asdict(self.section)},
            "arms": [
                {ARM: one.name, **one.overrides, RATES: _text(one.learning_rates)}
                | ({UNEQUAL: True} if one.unequal else {})
                for one in self.arms
            ],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Sweep:
        """The sweep of `to_dict`'s values. Raises InputError as `create`."""
        return cls.create(stored["config"], stored["arms"])

    def _run(self, one: Arm, stage: Stage, seed: int, rate: float) -> SweepRun:
        try:
            config = RunConfig.from_mapping(self._nested(one, stage, seed, rate))
        except InputError as error:
            raise InputError(f"arm {one.name!r} cannot be built: {error}") from None
        folder = f"runs/{slug(one.name)}/{stage}-lr{rate:g}-seed{seed}"
        return SweepRun(one.name, stage, seed, rate, config, folder)

    def _nested(self, one: Arm, stage: Stage, seed: int, rate: float) -> dict[str, Any]:
        nested = override(self.base, one.overrides)
        own: dict[str, dict[str, Any]] = {
            "training": {"seed": seed, "learning_rate": rate},
            "evaluation": {
                "compare_base": False, "samples": 0, "test_at_end": stage == "final",
            },
        }  # fmt: skip
        if "routing_seed" in default_adapter(nested.get("adapter", {}).get("method", "")):
            own["adapter"] = {"routing_seed": seed}
        for section, fields in own.items():
            nested[section] = {**nested.get(section, {}), **fields}
        return nested


def override(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested `base` with dotted fields set.

    "adapter.method" replaces the whole adapter by that method's defaults, whatever `base` says of
    another method; the item's other fields of the adapter are set on those.

    Raises:
      InputError: for a name without a section, or below a field that has none of its own.
    """
    nested = copy.deepcopy(dict(base))
    if "adapter.method" in overrides:
        method = overrides["adapter.method"]
        nested["adapter"] = {"method": method, **default_adapter(method)}
    for field, value in overrides.items():
        section, _, name = field.partition(".")
        if not name:
            raise InputError(f"{field!r} is no field of a section, such as 'adapter.rank'")
        target = nested.setdefault(section, {})
        *inner, last = name.split(".")
        for part in inner:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise InputError(f"{field!r} is no field: {part!r} of it has no fields of its own")
        target[last] = copy.deepcopy(value)
    return nested


def slug(name: str) -> str:
    """A name for a folder: letters, digits and `.=+_-`, not starting with `-` or `.`."""
    plain = re.sub(r"[^\w.=+-]+", "_", name, flags=re.ASCII).strip("_") or "arm"
    return re.sub(r"^[-.]", "minus-", plain)


def _arm(item: Item, section: SweepSection, base: Mapping[str, Any]) -> Arm:
    fields = dict(item)
    name = str(fields.pop(ARM, "") or ", ".join(f"{k}={v}" for k, v in item.items()) or "base")
    for field in fields:
        if field in TAKEN:
            raise InputError(
                f"arm {name!r} sets {field}, which the sweep sets itself; use sweep.seeds and "
                f"{RATES}"
            )
        if field.startswith("sweep.") and field not in ARM_FIELDS:
            raise InputError(f"arm {name!r} sets {field}; {suggest(field, ARM_FIELDS)}")
    text = fields.pop(RATES, section.learning_rates)
    unequal = bool(fields.pop(UNEQUAL, False))
    try:
        rates = _rates(RATES, text)
    except InputError as error:
        raise InputError(f"arm {name!r}: {error}") from None
    default = base.get("training", {}).get("learning_rate", TrainingSection.learning_rate)
    return Arm(name, fields, rates or (float(default),), unequal)


def _rates(name: str, text: Any) -> tuple[float, ...]:
    if not isinstance(text, str):
        raise InputError(f"config: {name} must be rates with commas, got {text!r}")
    rates = []
    for part in text.split(","):
        if not part.strip():
            continue
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not (math.isfinite(rate) and rate > 0):
            raise InputError(f"config: {name} must be rates above 0 with commas, got {text!r}")
        rates.append(rate)
    if len(set(rates)) < len(rates):
        raise InputError(f"config: {name} holds a rate twice: {text!r}")
    return tuple(rates)


def _text(rates: Iterable[float]) -> str:
    return ",".join(f"{rate:g}" for rate in rates)
