"""Counts what XLA compiles, so that a server can show that it stopped compiling."""

from __future__ import annotations

import collections
import threading
import jax

# JAX reports each program that it compiles, or takes from a cache of compiled ones, once, in the
# thread that asked for it.
_EVENT = "/jax/core/compile/backend_compile_duration"
_counts: collections.Counter[int] = collections.Counter()


def compilations() -> int:
    """Programs compiled in this thread since this module was imported."""
    return _counts[threading.get_ident()]


def _count(event: str, duration: float, **_: str | int) -> None:
    if event == _EVENT:
        _counts[threading.get_ident()] += 1


jax.monitoring.register_event_duration_secs_listener(_count)
