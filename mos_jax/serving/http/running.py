"""Requests to the engine, whose thread speaks, as events that one task awaits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from mos_jax.serving.engine import Engine
from mos_jax.serving.requests import Done, Event, Listener, Request
from mos_jax.serving.tickets import Ticket


class Running:
    """The choices of one answer, each a request of its own.

    What the engine says is queued here without a limit but that of the answers themselves, so a
    reader who is slow, or gone, never holds up the engine.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]):
        """Submits all of them; must be called in the event loop's thread.

        Raises:
          Refused: if one is; the others are then cancelled.
        """
        self.open = len(requests)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        try:
            for index, request in enumerate(requests):
                self._tickets.append(engine.submit(request, self._listener(index)))
        except BaseException:
            self.cancel()
            raise

    def _listener(self, index: int) -> Listener:
        def listen(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return listen

    async def next(self, timeout: float | None = None) -> list[tuple[int, Event]]:
        """All events there are, at least one, each with the index of its request.

        Args:
          timeout: seconds after which to return none.
        """
        try:
            async with asyncio.timeout(timeout):
                found = [await self._events.get()]
        except TimeoutError:
            return []
        while not self._events.empty():
            found.append(self._events.get_nowait())
        self.open -= sum(isinstance(event, Done) for _, event in found)
        return found

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """All events, until each request has had its `Done`."""
        while self.open:
            for entry in await self.next():
                yield entry

    def cancel(self) -> None:
        """Ends what has not ended."""
        for ticket in self._tickets:
            ticket.cancel()
