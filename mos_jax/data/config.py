"""The data section of a run's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, get_args

from mos_jax.data.tokens import TOO_LONG, TooLong
from mos_jax.errors import InputError, suggest

GENERATED_SIZES: Mapping[str, int] = MappingProxyType(
    {"train": 2000, "validation": 128, "test": 256}
)
"""Examples per set of a generated task where the configuration names no number."""

JSONL = "jsonl"
MEMORY = "memory"


@dataclass(frozen=True)
class DataConfig:
    """What to train and evaluate on, and in what shape.

    Make one with `create`, which checks names and values.

    Attributes:
        task: `jsonl`, `memory` (see `memory.MemoryTask`), or the name of a reasoning_gym task, with
            or without `reasoning_gym/`.
        train_examples: size of the training set. None: 2000 of a generated task, or all of a file,
            or all pairs of `memory`, whose number is an option of the task.
        validation_examples: likewise; None: 128, or all of a file, or all pairs.
        test_examples: likewise; None: 256, or all of a file, or all pairs.
        seed: chooses the examples of a generated task and how a file is split. It has nothing to
            do with the order of training.
        sequence_length: tokens in a row. None: chosen from the data, and nothing is too long.
        batch_size: rows in a batch.
        packing: put several examples in a row; otherwise one.
        share_prefix: with packing, hold the tokens that all examples begin with once a row.
        too_long: what becomes of an example longer than `sequence_length`: `error` refuses it,
            `skip` leaves it out, `truncate` cuts the start of its prompt.
        task_options: passed to the generated task.
        train_path: JSONL file of the task `jsonl`.
        validation_path: likewise; None splits the set off the training file.
        test_path: likewise; None splits the set off the training file.
    """

    task: str = "family_relationships"
    train_examples: int | None = None
    validation_examples: int | None = None
    test_examples: int | None = None
    seed: int = 0
    sequence_length: int | None = None
    batch_size: int = 8
    packing: bool = True
    share_prefix: bool = True
    too_long: TooLong = "error"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    train_path: str | None = None
    validation_path: str | None = None
    test_path: str | None = None

    @classmethod
    def create(cls, **section: Any) -> DataConfig:
        """Returns the checked configuration of the given fields; the others keep their defaults.

        Raises:
            InputError: an unknown field, or a value of the wrong type or range.
        """
        known = [f.name for f in fields(cls)]
        for name in section:
            if name not in known:
                raise InputError(f"data.{name} is not a setting; {suggest(name, known)}")
        config = cls(**section)
        config._check()
        return config

    @property
    def sizes(self) -> dict[str, int | None]:
        """The number of examples asked for, by set."""
        return {
            "train": self.train_examples,
            "validation": self.validation_examples,
            "test": self.test_examples,
        }

    def _check(self) -> None:
        _check_text("task", self.task)
        for split, size in self.sizes.items():
            if size is not None:
                _check_integer(f"{split}_examples", size, 1)
        _check_integer("seed", self.seed, 0)
        if self.sequence_length is not None:
            _check_integer("sequence_length", self.sequence_length, 2)
        _check_integer("batch_size", self.batch_size, 1)
        for name, switch in (("packing", self.packing), ("share_prefix", self.share_prefix)):
            if not isinstance(switch, bool):
                raise InputError(f"data.{name} is {switch!r}; it must be true or false")
        if self.too_long not in get_args(TooLong):
            raise InputError(
                f"data.too_long is {self.too_long!r}; {suggest(str(self.too_long), TOO_LONG)}"
            )
        if not isinstance(self.task_options, Mapping) or not all(
            isinstance(key, str) for key in self.task_options
        ):
            raise InputError(
                f"data.task_options is {self.task_options!r}; it must map names of options to "
                "their values"
            )
        self._check_paths()

    def _check_paths(self) -> None:
        paths = {
            "train_path": self.train_path,
            "validation_path": self.validation_path,
            "test_path": self.test_path,
        }
        for name, path in paths.items():
            if path is None:
                continue
            _check_text(name, path)
            if self.task != JSONL:
                raise InputError(
                    f"data.{name} is {path!r}, but data.task is {self.task!r}, which reads no "
                    f"file; set data.task to {JSONL!r} or leave the path out"
                )
        if self.task == JSONL:
            if self.train_path is None:
                raise InputError(
                    f"data.task is {JSONL!r}, but data.train_path is not set; give it a JSONL file"
                )
            if self.task_options:
                raise InputError(
                    f"data.task_options is {dict(self.task_options)!r}, but the task {JSONL!r} "
                    "has no options; leave them out"
                )


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise InputError(f"data.{name} is {value!r}; it must be text and not empty")


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"data.{name} is {value!r}; it must be an integer of at least {least}")
