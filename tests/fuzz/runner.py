"""Runs cases in worker processes and counts what came of them."""

import collections
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Longer than a case may take in the worker, which then ends with a trace.
PATIENCE = 120


@dataclasses.dataclass
class Summary:
    """What came of the cases of one format.

    Attributes:
        counts: Cases by outcome: "read", "refused", "raised", "died".
        findings: A text for every case that is not as it must be, with how to run it again.
        traced: Largest peak of what Python and NumPy allocated, in bytes beyond the files' size.
        resident: The same of the whole process.
        messages: How many different refusals there were, numbers left out.
        results: All that the worker said of each case.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    findings: list[str] = dataclasses.field(default_factory=list)
    traced: int = 0
    resident: int = 0
    messages: set[str] = dataclasses.field(default_factory=set)
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, name: str, seed: str, result: dict[str, Any]) -> None:
        self.counts[result["outcome"]] += 1
        self.traced = max(self.traced, result.get("traced", 0) - result.get("size", 0))
        self.resident = max(self.resident, result.get("resident", 0) - result.get("size", 0))
        words = [w for w in result.get("message", "").split() if w.isalpha()]
        self.messages.add(" ".join(words[:12]))
        self.results.append(result)
        if result["findings"]:
            case = result["case"]
            lines = [
                f"{name} case {case}: variant {result.get('variant')}, "
                f"{'; then '.join(result.get('mutations', ['?']))}",
                *(f"  {finding}" for finding in result["findings"]),
                f"  again: python -m tests.fuzz --format={name} --seed={seed} --case={case}",
            ]
            self.findings.append("\n".join(lines))


def _environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": "2",
    }


def _results(name: str, seed: str, first: int, last: int, root: Path) -> Iterator[dict[str, Any]]:
    """Every case's result; one in which the worker ended is a result too."""
    while first <= last:
        arguments = [str(root), name, seed, str(first), str(last)]
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(),
                cwd=ROOT,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            running = None
            for line in process.stdout:
                message = json.loads(line)
                if "start" in message:
                    running = message
                else:
                    running, first = None, message["case"] + 1
                    yield message
            status = process.wait()
            errors.seek(0)
            trace = errors.read().decode(errors="replace")[-3000:]
        if status == 0:
            return
        if running is None:
            raise RuntimeError(f"the worker of {name} ended with status {status}:\n{trace}")
        text = f"the process ended with status {status} (a crash, or out of time):\n{trace}"
        yield {**running, "case": running["start"], "outcome": "died", "findings": [text]}
        first = running["start"] + 1


def run(name: str, seed: str, first: int, last: int, show: bool = False) -> Summary:
    """Runs the cases `first` to `last` of a format.

    Args:
        name: In `TARGETS`.
        seed: Any text; the same one gives the same files.
        first: Number of the first case.
        last: Of the last one.
        show: Print every result, and keep nothing back.
    """
    summary = Summary()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for result in _results(name, seed, first, last, Path(folder)):
            summary.add(name, seed, result)
            if show:
                print(json.dumps(result, indent=2), flush=True)
    return summary
