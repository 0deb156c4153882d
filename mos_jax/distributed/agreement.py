"""What the processes of a run must agree on. A single process agrees with itself at no cost."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from mos_jax.distributed.hosts import client
from mos_jax.errors import InputError

_FOLDER = "mos_jax"
# All processes come to the same places in the same order, so the numbers are theirs, too.
_places = itertools.count()
_DAY = 86400 * 1000  # milliseconds: who waits for a lost process is ended by the watch


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
    what was written at step i.

    Args:
      step: that was begun last, with the metrics of the one before known.
      signal: that this process has caught.

    Returns:
      The signal that stops the run after this step; None: it goes on.
    """
    if jax.process_count() == 1:
        return signal
    store, place = client(), f"{_FOLDER}/stop"
    asked = store.key_value_dir_get(f"{place}/")
    if asked:
        at, number = map(int, asked[0][1].split())
        return number if step >= at else None
    if signal is not None:
        try:
            store.key_value_set(f"{place}/first", f"{step + 2} {signal}")
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
    return None


def wait_for_all(name: str) -> None:
    """Returns when all processes have come to the place of this name."""
    if jax.process_count() > 1:
        client().wait_at_barrier(f"{_FOLDER}/{name}/{next(_places)}", _DAY)
