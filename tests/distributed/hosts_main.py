"""experiments/train.py in which one process of a fresh run is killed: KILL="PROCESS STEP"."""

import os
import runpy
import signal
import sys

import jax

from mos_jax.training.loop import _SingleLoop


def main():
    process, last = map(int, os.environ.get("KILL", "-1 0").split())
    next_batch = _SingleLoop.next_batch

    def struck(loop):
        if loop.first == 0 and jax.process_index() == process and loop.drawn + 1 == last:
            loop.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return next_batch(loop)

    _SingleLoop.next_batch = struck
    sys.argv[0] = "experiments/train.py"
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
