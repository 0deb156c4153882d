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

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[tuple[Job, Event | None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, cancel: Callable[[Job], None], told: Callable[[Job], None]) -> None:
        """Starts the thread.

        Args:
          cancel: called with a job whose listener raised an exception, or that was abandoned.
          told: called with a job whose listener has had its `Done`.
        """
        self._thread = threading.Thread(
            target=self._run, args=(cancel, told), name="engine answers", daemon=True
        )
        self._thread.start()

    def put(self, job: Job, event: Event) -> None:
        """Has a job's listener told; returns at once."""
        self._events.put((job, event))

    def abandon(self, job: Job) -> None:
        """Has a job cancelled that nobody listens to any more.

        For finalizers, which may run in any thread whatever locks that holds: it takes none.
        """
        self._events.put((job, None))

    @property
    def backlog(self) -> int:
        """How many events wait."""
        return self._events.qsize()

    def finish(self) -> None:
        """Has the thread end when all that was put has been told."""
        self._events.put(None)

    def join(self) -> None:
        """Waits for the end of the thread, but not for ever."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(PATIENCE)

    def _run(self, cancel: Callable[[Job], None], told: Callable[[Job], None]) -> None:
        while (item := self._events.get()) is not None:
            job, event = item
            if event is None:
                cancel(job)
            elif not job.deaf or isinstance(event, Done):
                try:
                    job.listener(event)
                except Exception:
                    LOG.warning("the listener of request %s failed", job.id, exc_info=True)
                    job.deaf = True
                    cancel(job)
            if isinstance(event, Done):
                told(job)
            del item, job, event  # nothing of a request is kept while the thread waits
