"""Readers with one fault each, which the harness must find: the test of the test.

The mutation names the fault in the only file, and the reader then commits it.
"""

import ctypes
import json
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mos_jax.errors import InputError
from tests.fuzz.mutations import OUTSIDE, Mutation, a_pickle
from tests.fuzz.target import Target

_NAME = "what.json"
_GOOD = "nothing"


def _raises(folder: Path) -> None:
    raise KeyError("dtype")


def _names_no_file(folder: Path) -> None:
    raise InputError("something is wrong")


def _allocates(folder: Path) -> None:
    np.empty(64 << 20, np.uint8)  # never touched: only what was asked for shows it


def _uses_memory(folder: Path) -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    place = libc.malloc(ctypes.c_size_t(128 << 20))  # beside Python's allocators
    ctypes.memset(place, 1, 128 << 20)
    libc.free(ctypes.c_void_p(place))


def _asks_for_gigabytes(folder: Path) -> None:
    np.empty(1 << 40, np.uint8)


def _opens_outside(folder: Path) -> None:
    (folder / ".." / ".." / OUTSIDE / "secret").read_bytes()


def _opens_in_c(folder: Path) -> None:
    libc = ctypes.CDLL(None)
    libc.close(libc.open(os.fsencode(folder.parent.parent / OUTSIDE / "secret"), 0))


def _writes(folder: Path) -> None:
    descriptor = ctypes.CDLL(None).creat(os.fsencode(folder / "left behind"), 0o600)
    os.close(descriptor)


def _unpickles(folder: Path) -> None:
    pickle.loads(a_pickle(folder))


def _opens_a_pickle(folder: Path) -> None:
    (folder / "m.bin").open("rb").close()


def _hangs(folder: Path) -> None:
    time.sleep(600)


def _crashes(folder: Path) -> None:
    os.abort()


# The reader, and what the harness must say.
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "raises": (_raises, "raised KeyError"),
    "names no file": (_names_no_file, "names no file"),
    "reads wrongly": (lambda folder: None, "wrong: AssertionError"),
    "allocates": (_allocates, "memory: 67"),
    "uses memory": (_uses_memory, "memory: "),
    "asks for gigabytes": (_asks_for_gigabytes, "raised MemoryError"),
    "opens outside": (_opens_outside, "opened "),
    "opens in C": (_opens_in_c, "seen by the kernel"),
    "writes": (_writes, "something was written"),
    "unpickles": (_unpickles, "pickle.find_class"),
    "opens a pickle": (_opens_a_pickle, "m.bin"),
}
FATAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "hangs": (_hangs, "Timeout"),
    "crashes": (_crashes, "Aborted"),
}


def _commit(folder: Path) -> str:
    fault = json.loads((folder / _NAME).read_text())
    if fault in FAULTS | FATAL:
        (FAULTS | FATAL)[fault][0](folder)
    return fault


def _check(folder: Path, reading: Any) -> None:
    assert reading == _GOOD or reading != "reads wrongly"


def _mutation(fault: str) -> Mutation:
    def mutate(rng: random.Random, folder: Path) -> str:
        (folder / _NAME).write_text(json.dumps(fault))
        return fault

    return mutate


def _write(folder: Path) -> None:
    (folder / _NAME).write_text(json.dumps(_GOOD))
    (folder / "m.bin").write_bytes(b"\x80\x04.")


TARGETS = {
    "faulty": Target({"only": _write}, _commit, _check, tuple(map(_mutation, FAULTS))),
    "fatal": Target({"only": _write}, _commit, _check, tuple(map(_mutation, FATAL))),
    "sound": Target({"only": _write}, _commit, _check, (_mutation("sound"),)),
}
