"""What those who ask an engine hold of their requests."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mos_jax.serving.jobs import Job
from mos_jax.serving.requests import Done, Event, Piece, TokenInfo


class Ticket:
    """A request that was accepted.

    Attributes:
      id: unlike that of any other.
      seed: of its sampling noise; asking again with it gives the same tokens.
    """

    def __init__(self, job: Job, cancel: Callable[[Job], None], abandon: Callable[[Job], None]):
        """Of a job; both calls have it cancelled, and the second one takes no lock."""
        self.id, self.seed = job.id, job.seed
        self._job, self._cancel, self._abandon = job, cancel, abandon

    def cancel(self) -> None:
        """Ends the request, whatever it is at, with `Done("cancelled")`; nothing if it has ended.

        From any thread, at once; a piece or two may still come before the end.
        """
        self._cancel(self._job)

    def abandon(self) -> None:
        """As `cancel`, soon, for finalizers: it takes no lock."""
        self._abandon(self._job)


class Answer(NamedTuple):
    """A whole answer.

    Attributes:
      text: of all pieces.
      tokens: of all pieces.
      done: how it ended; its reason may be "error".
    """

    text: str
    tokens: tuple[TokenInfo, ...]
    done: Done


class Stream(Iterator[Event]):
    """The pieces of an answer as they come, and last its `Done`.

    Attributes:
      ticket: of the request; None until it is accepted.
    """

    def __init__(self) -> None:
        self.ticket: Ticket | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.listen = self._events.put
        self._ended = False

    def __next__(self) -> Event:
        """Waits for the next event."""
        if self._ended:
            raise StopIteration
        event = self._events.get()
        self._ended = isinstance(event, Done)
        return event

    def close(self) -> None:
        """Cancels the request, if it has not ended; what still comes of it can be read."""
        if self.ticket is not None:
            self.ticket.cancel()

    def __del__(self) -> None:
        """Cancels the request: nobody reads it any more."""
        if self.ticket is not None and not self._ended:
            self.ticket.abandon()

    def answer(self) -> Answer:
        """Waits for all of it. If that is interrupted, the request is cancelled."""
        pieces: list[Piece] = []
        try:
            for event in self:
                if isinstance(event, Piece):
                    pieces.append(event)
                else:
                    tokens = tuple(token for piece in pieces for token in piece.tokens)
                    return Answer("".join(piece.text for piece in pieces), tokens, event)
        except BaseException:
            self.close()
            raise
        raise RuntimeError("the answer has been read already")
