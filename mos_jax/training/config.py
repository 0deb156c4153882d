"""Typed, frozen sections of a run's configuration.

`experiments/` build an `ml_collections.ConfigDict`; `RunConfig.from_mapping` turns it at once into
these dataclasses, checking every value, before anything is loaded, compiled or written.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from mos_jax.adapters.adapter import AdapterConfig
from mos_jax.adapters.methods import METHODS, make_config
from mos_jax.adapters.sites import Sites, SiteShape, select_sites
from mos_jax.adapters.storage import read_card
from mos_jax.data.config import DataConfig
from mos_jax.errors import InputError, suggest
from mos_jax.models.attention import IMPLEMENTATIONS
from mos_jax.models.head import LOGITS_MIB
from mos_jax.models.quantized import SCHEMES
from mos_jax.models.remat import REMAT_POLICIES
from mos_jax.training.section import Section, at_least

SCHEDULES = ("linear", "cosine", "constant")
ASSEMBLIES = ("before", "inside")


# Fields of an adapter that map names to values.
PATTERNS = {"rank_pattern", "alpha_pattern"}


@dataclasses.dataclass(frozen=True)
class BaseSection(Section):
    """Which base: see `mos_jax.load_base`.

    Attributes:
      name: a name or a path.
      dtype: "float32" or "bfloat16", of the weights and of the computation.
      remat: what the backward pass computes again, "none", "products", "attention" or "full": see
        docs/fastest_step.md.
      quantize: how the weights of the sites are stored: "int8", "nf4", or None for `dtype`.
      attention: the implementation: "auto", "grouped", "xla" or "cudnn".
      logits_mib: MiB of logits that a device may hold at one time for a loss; 0 = any.
    """

    name: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    remat: str = "products"
    quantize: str | None = None
    attention: str = "auto"
    logits_mib: float = LOGITS_MIB

    def check(self, name: str) -> None:
        """See base class."""
        for field, known in (("remat", REMAT_POLICIES), ("attention", IMPLEMENTATIONS)):
            value = getattr(self, field)
            if value not in known:
                raise InputError(
                    f"config: {name}.{field} {value!r} is unknown; {suggest(value, known)}"
                )
        at_least(f"{name}.logits_mib", self.logits_mib, 0)
        if self.quantize is not None and self.quantize not in SCHEMES:
            raise InputError(
                f"config: {name}.quantize {self.quantize!r} is unknown; "
                f"{suggest(str(self.quantize), SCHEMES)}, or None"
            )


@dataclasses.dataclass(frozen=True)
class SitesSection(Section):
    """Which sites are adapted: see `select_sites`.

    Lists are written with commas, so that a flag can set them.

    Attributes:
      include: "all-linear", or names and regular expressions of site types or modules.
      exclude: names and regular expressions to leave out.
      layers: indices of blocks; empty = all.
    """

    include: str = "all-linear"
    exclude: str = ""
    layers: str = ""

    def select(self, sites: Sites) -> dict[str, SiteShape]:
        """Applies the selection. Raises InputError."""
        include = "all-linear" if self.include == "all-linear" else _split(self.include)
        try:
            layers = [int(index) for index in _split(self.layers)] or None
        except ValueError:
            raise InputError(
                f"config: sites.layers must be block indices with commas, got {self.layers!r}"
            ) from None
        return select_sites(sites, include, _split(self.exclude), layers)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@dataclasses.dataclass(frozen=True)
class TrainingSection(Section):
    """The optimisation.

    Attributes:
      steps: optimiser steps.
      learning_rate: its peak, after the warm-up.
      schedule: after the warm-up: "linear" or "cosine" to 0 at `steps`, or "constant".
      warmup_share: share of `steps` in which the rate rises linearly from 0.
      weight_decay: AdamW's, decoupled.
      clip_norm: global norm of the gradient; 0 = no clipping.
      b1: AdamW's first decay rate.
      b2: AdamW's second decay rate.
      eps: AdamW's, beside the root of the second moment.
      accumulation: batches whose gradients are summed to one step; the loss is the mean over all
        their target tokens, as if they were one batch.
      assembly: where a step assembles the adapter's factors: "before" the scan over the blocks, of
        all of them; or "inside" it, of one at a time, which keeps no copy of them. The results
        are those of rounding apart; docs/costs.md has what each costs.
      dropout: of the input of the adapter's branch.
      seed: of the adapter's initialisation, of the order of the data and of dropout.
      start: folder of an adapter to train on, such as one that `convert.py` imported; its method,
        its settings and its sites take the place of the sections `adapter` and `sites`.
    """

    steps: int = 200
    learning_rate: float = 3e-3
    schedule: str = "linear"
    warmup_share: float = 0.03
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    accumulation: int = 1
    assembly: str = "before"
    dropout: float = 0.0
    seed: int = 0
    start: str = ""

    def check(self, name: str) -> None:
        """See base class."""
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"config: {name}.schedule {self.schedule!r} is unknown; "
                f"{suggest(self.schedule, SCHEDULES)}"
            )
        if self.assembly not in ASSEMBLIES:
            raise InputError(
                f"config: {name}.assembly {self.assembly!r} is unknown; "
                f"{suggest(self.assembly, ASSEMBLIES)}"
            )
        for field, minimum in (
            ("steps", 1), ("learning_rate", 0), ("weight_decay", 0), ("clip_norm", 0),
            ("eps", 0), ("accumulation", 1), ("seed", 0),
        ):  # fmt: skip
            at_least(f"{name}.{field}", getattr(self, field), minimum)
        for field in ("dropout", "warmup_share", "b1", "b2"):
            value = getattr(self, field)
            if not 0 <= value < 1:
                raise InputError(f"config: {name}.{field} must be in [0, 1), got {value!r}")


@dataclasses.dataclass(frozen=True)
class EvaluationSection(Section):
    """What is evaluated when.

    Attributes:
      every: steps between evaluations on the validation set; 0 = only at the end.
      samples: questions whose generated answers are shown at each evaluation.
      max_new_tokens: longest generated answer.
      test_at_end: evaluate on the test set when training is done.
      compare_base: then evaluate the base beside the adapter too, and answer sample questions.
    """

    every: int = 50
    samples: int = 3
    max_new_tokens: int = 32
    test_at_end: bool = True
    compare_base: bool = True

    def check(self, name: str) -> None:
        """See base class."""
        for field, minimum in (("every", 0), ("samples", 0), ("max_new_tokens", 1)):
            at_least(f"{name}.{field}", getattr(self, field), minimum)


@dataclasses.dataclass(frozen=True)
class LoggingSection(Section):
    """Where metrics go, beside the terminal and `metrics.jsonl`.

    Attributes:
      every: steps between lines on a terminal that shows no live bar.
      tensorboard: write TensorBoard files.
      wandb_project: name of a Weights & Biases project; empty = none.
    """

    every: int = 10
    tensorboard: bool = True
    wandb_project: str = ""

    def check(self, name: str) -> None:
        """See base class."""
        at_least(f"{name}.every", self.every, 1)


@dataclasses.dataclass(frozen=True)
class CheckpointSection(Section):
    """When training state is saved.

    Attributes:
      every: steps between checkpoints.
      keep: how many of the newest are kept.
    """

    every: int = 50
    keep: int = 2

    def check(self, name: str) -> None:
        """See base class."""
        at_least(f"{name}.every", self.every, 1)
        at_least(f"{name}.keep", self.keep, 1)


@dataclasses.dataclass(frozen=True)
class MeshSection(Section):
    """Which devices do the work: see docs/meshes.md. All sizes 1: one device does.

    Attributes:
      data: copies of the base, each with its share of a batch's rows; -1 = what is left.
      fsdp: devices that divide a base's weights and its rows between them; -1 = what is left.
      tensor: devices that divide the work on each token; -1 = what is left.
      shard_above_mib: size of an array of the adapter or its optimiser up to which every device
        holds it whole; a larger one is divided over `fsdp`.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    shard_above_mib: float = 16.0

    def check(self, name: str) -> None:
        """See base class."""
        at_least(f"{name}.shard_above_mib", self.shard_above_mib, 0)


SECTIONS: dict[str, type[Section]] = {
    "base": BaseSection,
    "sites": SitesSection,
    "training": TrainingSection,
    "evaluation": EvaluationSection,
    "logging": LoggingSection,
    "checkpoint": CheckpointSection,
    "mesh": MeshSection,
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    base: BaseSection
    sites: SitesSection
    adapter: AdapterConfig
    data: DataConfig
    training: TrainingSection
    evaluation: EvaluationSection
    logging: LoggingSection
    checkpoint: CheckpointSection
    mesh: MeshSection

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> RunConfig:
        """Builds the configuration from nested mappings; absent sections take their defaults.

        `config["adapter"]` holds `method` and the fields of that method. A section `sweep` says
        how runs are multiplied and nothing of one run, so it is passed over.

        Raises:
          InputError: for an unknown section or field, or a refused value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in config:
            if name not in known and name != "sweep":
                raise InputError(f"config: unknown section {name!r}; {suggest(name, known)}")
        sections: dict[str, Any] = {
            name: section.from_mapping(name, config.get(name, {}))
            for name, section in SECTIONS.items()
        }
        adapter = dict(config.get("adapter", {}))
        if start := sections["training"].start:
            card = read_card(start)
            adapter = {"method": card.method, **card.config}
        method = adapter.pop("method", None)
        if method is None:
            raise InputError("config: adapter.method is missing; for example 'mos' or 'lora'")
        for name in PATTERNS & set(adapter):
            adapter[name] = _pattern(f"config: adapter.{name}", adapter[name])
        sections["adapter"] = make_config(method, adapter)
        sections["data"] = DataConfig.create(**config.get("data", {}))
        return cls(**sections)

    def adapted(self, sites: Sites) -> dict[str, SiteShape]:
        """Which of `sites`, the base's, are adapted. Raises InputError."""
        start = self.training.start
        return read_card(start).sites if start else self.sites.select(sites)

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as JSON values; `from_mapping` reads it back."""
        resolved = dataclasses.asdict(self)
        resolved["adapter"] = {"method": self.adapter.method, **self.adapter.to_dict()}
        return resolved


def default_config(method: str = "mos", **adapter: Any) -> ConfigDict:
    """All sections with their defaults as a `ConfigDict`, for the files in `configs/`.

    Fields that are None by default become placeholders, so that flags can set them. Patterns of
    ranks and alphas are JSON objects as text, since their keys may hold dots.

    Args:
      method: name of the method.
      **adapter: fields of its configuration.

    Raises:
      InputError: for an unknown method or field.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; {suggest(method, METHODS)}")
    config = ConfigDict({name: _fields(section) for name, section in SECTIONS.items()})
    config.data = _fields(DataConfig)
    config.adapter = {"method": method, **_fields(METHODS[method])}
    for name, value in adapter.items():
        if name not in config.adapter:
            raise InputError(f"{method}: unknown field {name!r}; {suggest(name, config.adapter)}")
        config.adapter[name] = json.dumps(dict(value)) if name in PATTERNS else value
    return config


def _pattern(where: str, value: Any) -> Any:
    """A pattern that may be written as JSON, with empty text for none; its values unchecked."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else {}
    except ValueError as error:
        raise InputError(
            f"{where} must be a JSON object, such as '{{\"q_proj\": 4}}' ({error}), got {value!r}"
        ) from None


def default_adapter(method: str) -> dict[str, Any]:
    """The fields of a method's configuration with their defaults, as plain values.

    Raises:
      InputError: for an unknown method.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; {suggest(method, METHODS)}")
    return {field.name: field.default for field in dataclasses.fields(METHODS[method])}


def _fields(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is None:
            kinds = [kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)]
            simple = kinds[0] if isinstance(kinds[0], type) else str
            default = config_dict.placeholder(simple)
        elif field.name in PATTERNS:
            default = ""
        found[field.name] = default
    return found
