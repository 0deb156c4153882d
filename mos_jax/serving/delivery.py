"""Tells listeners what has come, beside the engine's work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from mos_jax.serving.jobs import Job
from mos_jax.serving.observing import LOG
from mos_jax.serving.requests import Done, Event

# Seconds that `join` waits for a listener that does not return.
PATIENCE = 10.0


class Delivery:
    """One thread that calls listeners, in the order in which things came.

    What waits for a listener that blocks is bounded: of each request its tokens and its end.
    """

    def __init__(self, failed: Callable[[Job], None], told: Callable[[Job], None]):
        """Starts no thread yet.

        Args:
          failed: called with a job whose listener raised an exception.
          told: called with a job whose listener has had its `Done`.
        """
        self._failed, self._told = failed, told
        self._events: queue.SimpleQueue[tuple[Job, Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine answers", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def put(self, job: Job, event: Event) -> None:
        """Has a job's listener told; returns at once."""
        self._events.put((job, event))

    @property
    def backlog(self) -> int:
        """How many events wait."""
        return self._events.qsize()

    def finish(self) -> None:
        """Has the thread end when all that was put has been told."""
        self._events.put(None)

    def join(self) -> None:
        """Waits for the end of the thread, but not for ever."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(PATIENCE)

    def _run(self) -> None:
        while (item := self._events.get()) is not None:
            job, event = item
            if not job.deaf or isinstance(event, Done):
                try:
                    job.listener(event)
                except Exception:
                    LOG.warning("the listener of request %s failed", job.id, exc_info=True)
                    job.deaf = True
                    self._failed(job)
            if isinstance(event, Done):
                self._told(job)
            del item, job, event  # nothing of a request is kept while the thread waits
