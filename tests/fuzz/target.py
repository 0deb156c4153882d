"""What the harness needs to know of a reader."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import Mutation


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader and what it is tried on.

    Attributes:
        variants: By name, what writes good files into an empty folder.
        read: Reads the folder; InputError is a refusal.
        check: Asserts that what was read is what the files say.
        mutations: What is done to the files, those named more often more often.
        seal: Mends a checksum after the mutations, as a forger would.
    """

    variants: Mapping[str, Callable[[Path], Any]]
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], None]
    mutations: tuple[Mutation, ...]
    seal: Callable[[Path], None] | None = None
