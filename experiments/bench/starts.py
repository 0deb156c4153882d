"""Cold starts: a training program in a fresh process, up to the end of its first step."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.bench.worker import Run, others_share, processor_ticks
from mos_jax.errors import RunEnded

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = "first, with an empty folder", "second"
# Seconds between two looks at the log; and after which a start has failed.
_PAUSE, _PATIENCE = 0.01, 600.0


class Starts:
    """A program that is started anew for each run; see `rounds.Runner`.

    The contestant `FIRST` gets an empty folder for compiled programs, `SECOND` what the last first
    start has left in it. The file system has read all files before. A start ends with the record
    of step 1 in the run's log, which is written once the step's loss has come from the device.
    """

    def __init__(self, program: Sequence[str], folder: Path):
        """Starts `program`, the words behind "python"; `folder` is for its files."""
        self._program = program
        self._work, self._cache = folder / "run", folder / "compiled"

    def run(self, contestant: str) -> Run:
        """One start. Raises RunEnded where the program ends, or takes ten minutes, before that."""
        shutil.rmtree(self._work, ignore_errors=True)
        if contestant == FIRST:
            shutil.rmtree(self._cache, ignore_errors=True)
        command = [
            sys.executable,
            *self._program,
            f"--workdir={self._work}",
            f"--compilation_cache={self._cache}",
            # Each step is logged as soon as it has ended; no part of the step depends on them.
            "--config.logging.every=1",
            "--config.checkpoint.every=1",
        ]
        log, before = self._work / "metrics.jsonl", processor_ticks(None)
        start = time.perf_counter()
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                while not (log.is_file() and log.stat().st_size):
                    if process.poll() is not None or time.perf_counter() - start > _PATIENCE:
                        process.kill()
                        *_, said = (process.communicate()[1] or "").splitlines() or [""]
                        raise RunEnded(f"{self._program[0]} came to no first step: {said}")
                    time.sleep(_PAUSE)
                seconds = time.perf_counter() - start
                after = processor_ticks(process.pid)
            finally:
                process.kill()
        if after is None:
            return Run(seconds, None)
        return Run(seconds, others_share(before, after), after[2] / os.sysconf("SC_CLK_TCK"))
