"""Facts by key in a JSON file that is written after each, every one with what it was made by.

What a file holds of other code, another configuration, other versions or another processor is
found again when it is asked for; so no date or configuration ever stands over older numbers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mos_jax
from experiments.bench.rounds import machine_facts
from experiments.bench.worker import Facts
from mos_jax.files import write_file
from mos_jax.planning.compiling import code_digest

Say = Callable[[str], None]
# By an identity of a few digits, all that facts were made with.
MAKERS = "makers"
# Of the packages that a number can depend on.
_COMPILERS = ("jax", "jaxlib", "flax", "optax")
_COUNTERS = ("planning/costs.py", "planning/counting.py", "planning/hlo.py")


def maker(config: Mapping[str, Any], threads: int) -> Facts:
    """All that a number depends on: `config`, this package's code, versions and the processor."""
    package = Path(mos_jax.__file__).resolve().parent
    code = hashlib.sha256(code_digest(package).encode())
    for name in _COUNTERS:
        code.update((package / name).read_bytes())
    machine = machine_facts(threads)
    return {
        "config": json.loads(json.dumps(config)),
        "code": code.hexdigest(),
        "versions": {name: machine["versions"][name] for name in _COMPILERS},
        **{name: machine[name] for name in ("processor", "cores", "threads", "python")},
    }


class Notes:
    """Facts by key, in a file that is written after each.

    Attributes:
      found: what the file holds: facts by key, each with `maker` and `date`; and `makers`.
    """

    def __init__(self, path: Path, made_by: Facts):
        """Opens `path`, or will write it; `made_by` is what facts are made with from now on."""
        self._path = path
        self._maker = made_by
        canonical = json.dumps(made_by, sort_keys=True).encode()
        self._identity = hashlib.sha256(canonical).hexdigest()[:12]
        self.found: dict[str, Any] = {}
        if path.is_file():
            held = json.loads(path.read_text(encoding="utf-8"))
            # What does not say what it was made with is nobody's.
            self.found = {k: v for k, v in held.items() if k == MAKERS or "maker" in v}

    def known(self, key: str) -> bool:
        """Whether the facts of `key` were made with what is used now."""
        return self.found.get(key, {}).get("maker") == self._identity

    def get(self, key: str, find: Callable[[], Facts], say: Say) -> Facts:
        """The facts of `key`, found now unless they were found before with the same."""
        if not self.known(key):
            start = time.process_time()
            self.put(key, find())
            say(f"{key}: {time.process_time() - start:.1f} processor seconds")
        return self.found[key]

    def put(self, key: str, facts: Facts) -> None:
        """Sets the facts of `key` and writes the file."""
        date = machine_facts(1)["date"]
        self.found[key] = {**facts, "maker": self._identity, "date": date}
        makers = {**self.found.pop(MAKERS, {}), self._identity: self._maker}
        used = {facts["maker"] for facts in self.found.values()}
        self.found[MAKERS] = {name: made for name, made in makers.items() if name in used}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        write_file(part, (json.dumps(self.found, indent=1, sort_keys=True) + "\n").encode())
        part.replace(self._path)
