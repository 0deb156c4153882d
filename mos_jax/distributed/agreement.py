"""What the processes of a run must agree on. A single process agrees with itself at no cost."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from mos_jax.distributed.hosts import client
from mos_jax.errors import InputError

_FOLDER = "mos_jax"
# All processes come to the same places in the same order, so the numbers are theirs, too.
_places = itertools.count()
_DAY = 86400 * 1000  # milliseconds: who waits for a lost process is ended by the watch
# Seconds until what one host has written must be seen by all: some file systems take their time.
SEEN_WITHIN = 10.0


def is_first() -> bool:
    """Whether this process writes what is written once: files, metrics, the console."""
    return jax.process_index() == 0


def agree(what: str, state: Callable[[], Mapping[str, Any]]) -> None:
    """Compares facts between all processes; every process of a run calls this in the same order.

    Args:
      what: they are about, for the message.
      state: returns the facts, JSON values, nested or not; not called in a single process.

    Raises:
      InputError: in all processes alike, naming every fact that differs, its values, and the
        processes that have them.
    """
    count = jax.process_count()
    if count == 1:
        return
    store, place = client(), f"{_FOLDER}/agree/{next(_places)}"
    text = json.dumps(state(), sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    mine = f"{jax.process_index()}"
    store.key_value_set(f"{place}/facts/{mine}", text)
    store.key_value_set(f"{place}/digest/{mine}", digest)
    store.wait_at_barrier(f"{place}/told", _DAY)
    digests = dict(store.key_value_dir_get(f"{place}/digest/"))
    if len(set(digests.values())) > 1:
        told = {
            int(key.rpartition("/")[2]): json.loads(value)
            for key, value in store.key_value_dir_get(f"{place}/facts/")
        }
        raise InputError(f"the processes disagree on {what}: {describe_differences(told)}")


def check_shared(folder: str | os.PathLike[str]) -> None:
    """Finds out whether all processes see the same folder; all of them call it together.

    The first one writes a file there, or into the nearest folder above that exists, the others look
    for it, and it is gone again.

    Args:
      folder: existing or not; each process has its own path to it.

    Raises:
      InputError: in all processes alike, naming the folder, and the hosts that do not see it; in
        the first process, if it cannot write there.
    """
    if jax.process_count() == 1:
        return
    store, place = client(), f"{_FOLDER}/shared/{next(_places)}"
    process, path = jax.process_index(), Path(folder).absolute()
    levels = [path, *path.parents]
    written: Path | None = None
    try:
        if process == 0:
            up = next(number for number, level in enumerate(levels) if os.path.isdir(level))
            name = f".seen-by-all-{secrets.token_hex(8)}"
            written = levels[up] / name
            try:
                written.touch()
            except OSError as error:
                raise InputError(f"{path} cannot be written: {error}") from error
            store.key_value_set(f"{place}/written/0", f"{up} {name} {socket.gethostname()} {path}")
        store.wait_at_barrier(f"{place}/told", _DAY)
        [(_, text)] = store.key_value_dir_get(f"{place}/written/")
        above, name, first_host, first_path = text.split(maxsplit=3)
        # A relative path may have fewer folders above it on another host.
        found = _appears(levels[min(int(above), len(levels) - 1)] / name)
        store.key_value_set(f"{place}/seen/{process}", "" if found else socket.gethostname())
        store.wait_at_barrier(f"{place}/looked", _DAY)
    finally:
        if written is not None:
            with contextlib.suppress(OSError):
                written.unlink()
    seen = store.key_value_dir_get(f"{place}/seen/")
    blind = sorted((int(key.rpartition("/")[2]), host) for key, host in seen if host)
    if blind:
        who = ", ".join(f"process {number} on host {host}" for number, host in blind[:8])
        raise InputError(
            f"{first_path} of process 0 on host {first_host} is not there for {who}"
            f"{', ...' if len(blind) > 8 else ''}; all write the checkpoints together, so give a "
            "--workdir on a file system that all hosts share"
        )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN
    while not os.path.exists(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def describe_differences(told: Mapping[int, Mapping[str, Any]]) -> str:
    """Names every fact that differs: "training.seed is 0 in processes 0, 2 and 1 in process 1".

    Args:
      told: by process, what it holds for true.
    """
    flat = {process: dict(_flatten(facts)) for process, facts in sorted(told.items())}
    found = []
    for name in sorted({name for facts in flat.values() for name in facts}):
        holders: dict[str, list[int]] = {}
        for process, facts in flat.items():
            value = repr(facts[name]) if name in facts else "missing"
            holders.setdefault(value, []).append(process)
        if len(holders) > 1:
            values = (f"{value} in {_processes(who)}" for value, who in holders.items())
            found.append(f"{name} is {' and '.join(values)}")
    return "; ".join(found)


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _processes(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown}"


def agree_to_stop(step: int, signal: int | None) -> int | None:
    """Whether all processes stop after this step, because one of them was asked to.

    They are asked at different moments, and who stopped alone would leave the others in a
    collective. So the first one that is asked names a step that nobody has passed: where the
    metrics of step i are known, every process has begun step i, so whoever is at step i + 2 sees
    what was written at step i. There may be no such step: `agree_to_stop_at_the_end`.

    Args:
      step: that was begun last, with the metrics of the one before known.
      signal: that this process has caught.

    Returns:
      The signal that stops the run after this step; None: it goes on.
    """
    if jax.process_count() == 1:
        return signal
    if asked := _asked_to_stop():
        at, number = asked
        return number if step >= at else None
    if signal is not None:
        _ask_to_stop(step + 2, signal)
    return None


def agree_to_stop_at_the_end(signal: int | None) -> int | None:
    """Whether a process was asked to stop when no step was left; all call it after the last one.

    Args:
      signal: that this process has caught.

    Returns:
      A signal that one of them has caught, the same in all; None: there is none.
    """
    if jax.process_count() == 1:
        return signal
    if signal is not None:
        _ask_to_stop(0, signal)
    wait_for_all("steps done")
    asked = _asked_to_stop()
    return asked and asked[1]


def _asked_to_stop() -> tuple[int, int] | None:
    """The step after which all stop, and the signal."""
    asked = client().key_value_dir_get(f"{_FOLDER}/stop/")
    if not asked:
        return None
    at, number = map(int, asked[0][1].split())
    return at, number


def _ask_to_stop(step: int, signal: int) -> None:
    try:
        client().key_value_set(f"{_FOLDER}/stop/first", f"{step} {signal}")
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def wait_for_all(name: str) -> None:
    """Returns when all processes have come to the place of this name."""
    if jax.process_count() > 1:
        client().wait_at_barrier(f"{_FOLDER}/{name}/{next(_places)}", _DAY)
