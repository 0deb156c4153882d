"""How a run ends before it is finished: by a signal, by what it computed, by its disk."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mos_jax.errors import RunEnded

# What asks a run to stop: an end, Ctrl-C, and that its time is nearly up (launch/slurm.sh).
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DIVERGED_ADVICE = "Lower training.learning_rate, or raise warm-up or clipping"
# Errors of a disk in files that are open; connections fail with others.
_OF_DISKS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
)


class Diverged(RunEnded):
    """The loss or the gradient is not finite any more."""


class Stopped(RunEnded):
    """A signal asked the run to stop; its state was saved."""


@contextmanager
def noting_signals() -> Iterator[list[int]]:
    """Notes the signals of `STOPPING` instead of dying, so that a loop can stop in an orderly way.

    Yields:
      The numbers of the signals that came so far. A second SIGINT interrupts at once.
    """
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    # Only the main thread may set handlers; elsewhere the caller's stay.
    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, note) for number in STOPPING if main}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def disk_errors_in_words(folder: Path) -> Iterator[None]:
    """What was saved before a disk filled up stays; the user needs no trace to mend it.

    An error of other files than those of `folder`, or of a connection, stays what it is.
    """
    try:
        yield
    except OSError as error:
        if not _is_of(folder, error):
            raise
        raise RunEnded(
            f"files of {folder} cannot be written or read ({error}); what was saved there before "
            "is kept. Mend that and run the same command again"
        ) from error


def _is_of(folder: Path, error: OSError) -> bool:
    # Only what is opened, renamed or made is named; a write is not.
    if not isinstance(error.filename, (str, os.PathLike)):
        return error.errno in _OF_DISKS
    place, found = folder.resolve(), Path(error.filename).resolve()
    # One above it is in the way when the folder is made.
    return place in (found, *found.parents) or found in place.parents
