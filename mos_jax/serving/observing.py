"""Who is told what an engine does, for metrics and logs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from mos_jax.serving.requests import Done, Request

LOG = logging.getLogger("mos_jax.serving")


class Observer(Protocol):
    """Is called in the threads that do the work: a call must be quick, and never block.

    What it raises is logged and changes nothing. All times are seconds.
    """

    def accepted(self, request: Request) -> None:
        """A request was accepted, and will be `done` once."""

    def refused(self, code: str) -> None:
        """A request was refused: the code of `Refused`, or "invalid" for any other InputError."""

    def first_token(self, request: Request, seconds: float) -> None:
        """The first token has come, so long after the request was accepted."""

    def tokens(self, request: Request, n: int, seconds: float) -> None:
        """After the first, `n` more tokens have come, so long after the ones before."""

    def done(self, request: Request, done: Done, seconds: float) -> None:
        """An answer has ended, so long after the request was accepted."""


class Observers:
    """Several observers, told one after the other."""

    def __init__(self) -> None:
        self._all: tuple[Observer, ...] = ()

    def add(self, observer: Observer) -> None:
        """One more."""
        self._all = (*self._all, observer)

    def tell(self, call: Callable[[Observer], None]) -> None:
        """Makes a call of each; an exception is its own."""
        for observer in self._all:
            try:
                call(observer)
            except Exception:
                LOG.exception("an observer of the engine failed")
