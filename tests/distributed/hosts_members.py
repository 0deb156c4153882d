"""A program of several processes that does nothing but meet: `PROCESS PORT WHAT_THEN`."""

import sys
import time

from mos_jax import InputError
from mos_jax.distributed.agreement import wait_for_all
from mos_jax.distributed.hosts import joined
from mos_jax.distributed.meeting import Meeting


def act(process, then):
    wait_for_all("begin")
    if then == "refused" and process == 1:
        raise InputError("--workdir is a file")
    time.sleep(600)  # as in a collective that never ends


def main():
    process, port, then = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    count = 3 if then == "taken" else 2
    meeting = Meeting(f"127.0.0.1:{port}", count, process, "deactivate")
    with joined(meeting, silence=20.0, patience=3.0 if then == "late" else 200.0):
        act(process, then)


if __name__ == "__main__":
    main()
