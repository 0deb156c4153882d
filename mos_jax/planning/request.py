"""What is compiled: a run's configuration, the sizes of its base and of its batches, a topology."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mos_jax.models.config import DecoderConfig, LinearScaling, RopeScaling
from mos_jax.training.config import RunConfig

# Sections of a configuration that no compiled step depends on.
_ELSEWHERE = ("data", "evaluation", "logging", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Request:
    """One step to compile, from shapes alone.

    Attributes:
      config: the run, with all four sizes of its mesh resolved.
      model: architecture of the base.
      width: tokens of a row, S.
      targets: room for targets in a row, M.
      topology: name of the chips, such as "v5e:4x4".
    """

    config: RunConfig
    model: DecoderConfig
    width: int
    targets: int
    topology: str

    @property
    def rows(self) -> int:
        """Rows of a batch, B."""
        return self.config.data.batch_size

    @property
    def tokens(self) -> int:
        """Tokens of an optimiser step, accumulated batches included, padding too."""
        return self.rows * self.width * self.config.training.accumulation

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` reads it back."""
        return {
            "config": self.config.to_dict(),
            "model": dataclasses.asdict(self.model),
            "width": self.width,
            "targets": self.targets,
            "topology": self.topology,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """The request that `to_dict` wrote. Raises InputError for a refused configuration."""
        model = dict(values["model"])
        if scaling := model["rope_scaling"]:
            kind = LinearScaling if set(scaling) == {"factor"} else RopeScaling
            model["rope_scaling"] = kind(**scaling)
        if model["windowed_layers"] is not None:
            model["windowed_layers"] = tuple(model["windowed_layers"])
        return cls(
            RunConfig.from_mapping(values["config"]),
            DecoderConfig.create(**model),
            values["width"],
            values["targets"],
            values["topology"],
        )

    def digest(self) -> str:
        """SHA-256 of all that its compiled step can depend on, as hexadecimal digits."""
        values = self.to_dict()
        config = {k: v for k, v in values["config"].items() if k not in _ELSEWHERE}
        # Names are for people.
        config["base"] = {k: v for k, v in config["base"].items() if k != "name"}
        values |= {"config": config, "rows": self.rows, "model": self.model.architecture()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
