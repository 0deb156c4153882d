"""Counts what XLA compiles in a thread, so that an engine can show that its own has stopped.

Loading an adapter of a kind new to the bank may compile small programs in the thread that loads it.
"""

from __future__ import annotations

import collections
import threading

import jax

# JAX reports each program that it compiles, or takes from a cache of compiled ones, once, in the
# thread that asked for it.
_EVENT = "/jax/core/compile/backend_compile_duration"
_counts: collections.Counter[int] = collections.Counter()


class Compilations:
    """Programs compiled in one thread, the one that called `watch`, from then on."""

    def __init__(self) -> None:
        self._thread: int | None = None
        self._before = 0

    def watch(self) -> None:
        """Begins to count this thread's."""
        self._thread = threading.get_ident()
        self._before = _counts[self._thread]

    @property
    def count(self) -> int:
        """How many so far; any thread may ask."""
        return 0 if self._thread is None else _counts[self._thread] - self._before


def _count(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == _EVENT:
        _counts[threading.get_ident()] += 1


jax.monitoring.register_event_duration_secs_listener(_count)
