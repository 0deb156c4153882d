"""Sizes and limits of an engine."""

from __future__ import annotations

import dataclasses

from mos_jax.adapters.adapter import require_integer
from mos_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Sizes and limits of an `Engine`. All that it will ever allocate follows from them.

    Attributes:
      rows: requests that are decoded at a time.
      length: positions of a row's key-value cache, prompt and answer together.
      pieces: sizes in which prompts are computed, ascending. A prompt is cut into pieces of the
        largest size and a rest of the smallest that holds it.
      prefill: tokens of prompts that are computed between two decode steps at most, unless one
        piece has more; 0 is the largest piece, times the rows that wait for each that decodes.
      prefix_bytes: of the prefix cache; 0 for none.
      queue: requests that wait at most, of all tenants together.
      tenant_queue: of one tenant.
    """

    rows: int = 8
    length: int = 1024
    pieces: tuple[int, ...] = (32, 128)
    prefill: int = 0
    prefix_bytes: int = 0
    queue: int = 1024
    tenant_queue: int = 256

    def __post_init__(self) -> None:
        """Checks the values. Raises InputError."""
        for name, least in (
            ("rows", 1),
            ("length", 2),
            ("prefill", 0),
            ("prefix_bytes", 0),
            ("queue", 1),
            ("tenant_queue", 1),
        ):
            require_integer("engine", name, getattr(self, name), least)
        for size in self.pieces:
            require_integer("engine", "pieces", size, 1)
        if not self.pieces or list(self.pieces) != sorted(set(self.pieces)):
            raise InputError(f"engine: pieces must be ascending sizes, got {self.pieces!r}")
