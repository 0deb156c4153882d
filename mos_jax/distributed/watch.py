"""No process of a run outlives another: who ends, says so, and who falls silent is missed.

A collective with a dead process hangs, or fails with words about sockets, and JAX's own heartbeats
abort the process with a C++ trace. So every process has a thread that looks after the others
through the key-value store of `jax.distributed`, which process 0 holds: it counts up an entry of
its own, and reads what others say of their end. Process 0 notices whose count stands still; the
others notice when process 0 does not answer.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn, Protocol

from mos_jax.errors import one_line

# Of a process whose fellow was lost: a temporary failure (EX_TEMPFAIL), the same command goes on.
LOST = 75
GO_ON = "start all processes again with the same command; the run goes on from its last checkpoint"
# Seconds that a process is given to find the same error as the one that announced it.
_GRACE = 3.0


class Store(Protocol):
    """What all processes can read and write."""

    def put(self, key: str, value: str) -> None:
        """Writes an entry; what it held is gone."""

    def entries(self, folder: str) -> dict[str, str]:
        """The entries below `folder`, by the rest of their keys."""

    def is_gone(self) -> bool:
        """Whether the process that holds it is certainly gone."""


class Lives:
    """Who has given a sign of life when, by the clock of this process."""

    def __init__(self, processes: Iterable[int], silence: float, now: float):
        self._silence = silence
        self._seen = dict.fromkeys(processes, ("", now))

    def observe(self, counts: Mapping[int, str], now: float) -> list[int]:
        """Takes the counts as they are now; returns the processes silent for too long."""
        for process, (count, _) in self._seen.items():
            if counts.get(process, count) != count:
                self._seen[process] = (counts[process], now)
        return [p for p, (_, since) in self._seen.items() if now - since > self._silence]

    def forget(self, process: int) -> None:
        """Expects nothing more of a process."""
        self._seen.pop(process, None)


class Watch:
    """One process among those of a run.

    Attributes:
      process: its number.
      processes: how many there are.
      silence: seconds without a sign of life after which a process is lost.
    """

    def __init__(
        self,
        store: Store,
        process: int,
        processes: int,
        silence: float,
        leave: Callable[[int], NoReturn] = os._exit,
    ):
        self.process, self.processes, self.silence = process, processes, silence
        self._store = store
        self._leave = leave
        self._interval = min(1.0, silence / 8)
        self._answered = time.monotonic()
        self._done = threading.Event()
        self._ending = threading.Lock()

    def start(self) -> None:
        """Begins to look after the others."""
        _pause_before_aborting()
        for work in (self._look, self._mind_the_coordinator):
            threading.Thread(target=work, daemon=True, name=f"watch{work.__name__}").start()

    def stop(self) -> None:
        """Ends the watch: all processes are through."""
        self._done.set()

    def end(self, words: str, status: int, trace: str = "") -> NoReturn:
        """Tells the others why this process ends, and ends it at once.

        There is no orderly shutdown, which would wait for processes that wait for this one.

        Args:
          words: why, a line.
          status: exit status.
          trace: to be printed in place of the line.
        """
        self._ending.acquire()  # never released: whoever comes second waits for the end
        self._done.set()
        self._announce(self.process, words, status)
        self._say(trace or f"error: {words}")
        self._wait_for_readers({self.process})
        self._leave(status)

    def wait_for_verdict(self) -> None:
        """Gives the watch time to end this process, if another one's loss is what went wrong."""
        self._done.wait(self.silence + 4 * self._interval + _GRACE)

    def _look(self) -> None:
        others = [p for p in range(self.processes) if p != self.process]
        lives = Lives(others, self.silence, time.monotonic())
        count = 0
        while not self._done.wait(self._interval):
            try:
                count += 1
                self._store.put(f"alive/{self.process}", str(count))
                ended = self._store.entries("ended")
                counts = self._store.entries("alive") if self.process == 0 else {}
            # Whatever the store's client raises: process 0 holds it, and it is gone.
            except Exception:
                if not self._done.is_set():
                    self._end_with(0, "it does not answer")
                return
            self._answered = time.monotonic()
            for name, text in ended.items():
                if int(name) != self.process:
                    self._follow(int(name), json.loads(text))
            if self.process == 0:
                silent = lives.observe({int(p): n for p, n in counts.items()}, self._answered)
                if silent:
                    self._miss(silent)

    def _mind_the_coordinator(self) -> None:
        # A call may never return: a host without power closes no connection, and when JAX aborts
        # this process (see below), the thread that does so is the one that answers would come by.
        while not self._done.wait(self._interval / 2):
            silent = time.monotonic() - self._answered
            if silent > self.silence:
                self._end_with(0, f"no answer for {self.silence:g} s")
            elif silent > 1.5 * self._interval and self._store.is_gone():
                self._end_with(0, "it does not answer")

    def _miss(self, silent: list[int]) -> None:
        words = f"no sign of life for {self.silence:g} s"
        for process in silent:
            self._announce(process, words, LOST)
        self._end_with(silent[0], words, set(silent) | {0})

    def _follow(self, process: int, said: Mapping[str, str | int]) -> None:
        self._answered = math.inf  # it has, and this process ends
        words, status = str(said["words"]), int(said["status"])
        if status == LOST:
            self._end_with(process, words)
        # An error that all have found is best told by each for itself.
        if not self._done.wait(_GRACE):
            self._end_with(process, words, status=status)

    def _end_with(
        self, process: int, words: str, gone: set[int] | None = None, status: int = LOST
    ) -> None:
        if not self._ending.acquire(blocking=False):
            return  # the main thread is about to end the process
        self._done.set()
        who = f"process {process} of {self.processes}"
        if status == LOST:
            line = f"{who} is lost: {words}; process {self.process} ends with it. {_capital(GO_ON)}"
        else:
            line = f"{who} ended: {words}"
        self._say(f"error: {line}")
        if self.process == 0:
            self._wait_for_readers(gone or {0, process})
        elif process != 0:
            self._try_to_put(f"read/{self.process}", "")
        self._leave(status)

    def _announce(self, process: int, words: str, status: int) -> None:
        said = json.dumps({"words": one_line(words), "status": status})
        self._try_to_put(f"ended/{process}", said)

    def _try_to_put(self, key: str, value: str) -> None:
        # From a thread, since a lost store may not answer.
        def put() -> None:
            try:
                self._store.put(key, value)
            except Exception:  # it is gone, and so is everyone who would read
                pass

        thread = threading.Thread(target=put, daemon=True)
        thread.start()
        thread.join(2 * self._interval + 1)

    def _wait_for_readers(self, gone: set[int]) -> None:
        """Process 0 takes the store with it, so the others must have read first."""
        deadline = time.monotonic() + 4 * self._interval + _GRACE
        while self.process == 0 and time.monotonic() < deadline:
            read = {int(p) for folder in ("read", "ended") for p in self._store.entries(folder)}
            if read | gone >= set(range(self.processes)):
                return
            time.sleep(self._interval / 4)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _pause_before_aborting() -> None:
    """Lets the watch speak before JAX aborts the process.

    When the connection to process 0 breaks, JAX's client aborts the process from a thread of its
    own. The handler of SIGABRT becomes C's `sleep`, which is called with the signal's number, 6:
    for so many seconds the watch may end the process with a line and a status of its own, and then
    the abort goes on. A Python handler would not run there.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
