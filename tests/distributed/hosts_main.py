"""experiments/train.py in which one process of a fresh run is killed: KILL="PROCESS STEP".

PROGRAM: another program, lr_find. SEEN_WITHIN: seconds until a folder must be seen by all.
"""

import os
import runpy
import signal
import sys

import jax

from mos_jax.distributed import agreement
from mos_jax.training.loop import _SingleLoop


def main():
    process, last = map(int, os.environ.get("KILL", "-1 0").split())
    next_batch = _SingleLoop.next_batch
    agreement.SEEN_WITHIN = float(os.environ.get("SEEN_WITHIN", agreement.SEEN_WITHIN))

    def struck(loop):
        if loop.first == 0 and jax.process_index() == process and loop.drawn + 1 == last:
            loop.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return next_batch(loop)

    _SingleLoop.next_batch = struck
    sys.argv[0] = f"experiments/{os.environ.get('PROGRAM', 'train')}.py"
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
