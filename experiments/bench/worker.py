"""Contestants live in processes of their own, which sleep until they are called.

The thread pools of JAX and torch would get in each other's way within one process. Here only one
side works at a time, and what a side has loaded or compiled stays for all rounds.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mos_jax.errors import InputError, RunEnded

Facts = dict[str, Any]


class Side(Protocol):
    """What a process of the benchmark can do."""

    def prepare(self) -> dict[str, Facts]:
        """Loads and compiles everything; returns facts by contestant, JSON-able."""
        ...

    def run(self, contestant: str) -> float:
        """Does the contestant's work once; returns seconds."""
        ...


@dataclass(frozen=True)
class Run:
    """One call of a contestant.

    Attributes:
      seconds: its time.
      others: share of the machine's processor time that other programs took meanwhile, from 0 to
        1; None where the system does not tell.
      processor: processor seconds that the contestant's process took, of all its threads; None
        if they were not measured.
    """

    seconds: float
    others: float | None
    processor: float | None = None


class Worker:
    """A process that holds one side; a context manager, which ends it."""

    def __init__(self, side: str, cpus: int, **arguments: Any):
        """Starts the process.

        Args:
          side: "module:Class" of a `Side`, imported only there.
          cpus: how many of them the process may use.
          **arguments: of the class.
        """
        self._side = side
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, side, cpus, arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        """Nothing more to do."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def prepare(self) -> dict[str, Facts]:
        """Calls `Side.prepare` there."""
        return self._call("prepare")[0]

    def run(self, contestant: str) -> Run:
        """Calls `Side.run` there."""
        before = processor_ticks(self._process.pid)
        seconds, processor = self._call("run", contestant)
        after = processor_ticks(self._process.pid)
        return Run(seconds, others_share(before, after), processor)

    def ask(self, call: str, *words: str) -> Any:
        """Calls another method of the side; what it returns must be picklable."""
        return self._call(call, *words)[0]

    def _call(self, *words: str) -> tuple[Any, float]:
        """The answer, and the processor seconds that it took."""
        try:
            self._pipe.send(words)
            kind, answer, processor = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            raise RunEnded(f"{self._side} died with status {status}; out of memory?") from None
        if kind == "input":
            raise InputError(answer)
        if kind == "defect":
            raise RuntimeError(f"{self._side} failed:\n{answer}")
        return answer, processor


Ticks = tuple[int, int, int]


def processor_ticks(process: int | None) -> Ticks | None:
    """Ticks of all processors, of their idling, and of one process (Linux); None elsewhere.

    Where `process` is None, no process has had any.
    """
    try:
        every = [int(n) for n in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        # Behind the name, which is in brackets and may hold anything.
        own = [0] * 13
        if process is not None:
            stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            own = [int(number) for number in stat[1:14]]
    except OSError:
        return None
    return sum(every), every[3] + every[4], own[10] + own[11]


def others_share(before: Ticks | None, after: Ticks | None) -> float | None:
    """Share of the machine's processor time between two readings that other programs took."""
    if before is None or after is None:
        return None
    total, idle, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (total - idle - own) / max(total, 1))


def _serve(pipe: Connection, name: str, cpus: int, arguments: dict[str, Any]) -> None:
    # Ctrl-C goes to the whole group; the parent ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "sched_setaffinity"):
        # Before any library counts the CPUs.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    module, _, attribute = name.partition(":")
    side: Side | None = None
    while True:
        try:
            call, *words = pipe.recv()
        except EOFError:
            return
        try:
            if side is None:
                side = getattr(importlib.import_module(module), attribute)(**arguments)
            start = time.process_time()
            answer = getattr(side, call)(*words)
            pipe.send(("answer", answer, time.process_time() - start))
        except InputError as error:
            pipe.send(("input", str(error), 0.0))
        except Exception:
            pipe.send(("defect", traceback.format_exc(), 0.0))
