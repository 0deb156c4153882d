"""Runs a training that kills itself with SIGKILL at a chosen moment, as a power cut would.

python die_at.py TRAIN_PATH WORKDIR MOMENT [DELAY_MS]

MOMENT is `never`, `step:N` (when the metrics of step N are reported), `saving:N` (DELAY_MS after
the save of step N began), `adapter` (when the adapter's files are written but not yet in place)
or `summary` (before the summary is in place).
"""

import os
import signal
import sys
import threading
from pathlib import Path

from rich.console import Console

from mos_jax.adapters import storage
from mos_jax.training import loop
from mos_jax.training.checkpoint import Checkpoints
from mos_jax.training.metrics import Reporter
from mos_jax.training.workdir import WorkDir
from tests.training.fixtures_training import tiny_run


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, when, action):
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if when(*args):
            action()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def main(train_path, workdir, moment, delay_ms="0"):
    kind, _, number = moment.partition(":")
    if kind == "step":
        before(Reporter, "step", lambda _, step, *__: step == int(number), die)
    elif kind == "saving":
        timer = threading.Timer(int(delay_ms) / 1000, die)
        before(
            Checkpoints, "save", lambda _, state, *__: int(state.step) == int(number), timer.start
        )
    elif kind == "adapter":
        before(storage, "write_file", lambda file, _: Path(file).name == storage.CARD_FILE, die)
    elif kind == "summary":
        before(WorkDir, "write_summary", lambda *_: True, die)
    run = tiny_run(train_path, dropout=0.1)
    loop.train(run, workdir, Console(file=sys.stderr))


if __name__ == "__main__":
    main(*sys.argv[1:])
