"""A section of a run's configuration: from a mapping to a checked, frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from mos_jax.errors import InputError, suggest


class Section:
    """A section of the configuration; subclasses are frozen dataclasses."""

    @classmethod
    def from_mapping(cls, name: str, fields: Mapping[str, Any]) -> Self:
        """Builds the section from a mapping.

        Raises:
          InputError: for an unknown field (with the nearest name), a value of another type than
            the field's, or a value out of range.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key, value in fields.items():
            if key not in known:
                raise InputError(f"config: unknown field {name}.{key}; {suggest(key, known)}")
            default = known[key].default
            wrong = (
                isinstance(value, bool) != isinstance(default, bool)
                or (isinstance(default, int) and not isinstance(value, int))
                or (isinstance(default, float) and not isinstance(value, (int, float)))
                or (isinstance(default, str) and not isinstance(value, str))
            )
            if default is not None and wrong:
                raise InputError(
                    f"config: {name}.{key} must be of type {type(default).__name__}, got {value!r}"
                )
        section = cls(**fields)
        section.check(name)
        return section

    def check(self, name: str) -> None:
        """Raises InputError for values out of range."""


def at_least(name: str, value: float, minimum: float) -> None:
    """Raises InputError unless a value is finite and at least `minimum`."""
    if not (math.isfinite(value) and value >= minimum):
        raise InputError(f"config: {name} must be at least {minimum}, got {value!r}")
