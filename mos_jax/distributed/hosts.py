"""Several processes that do one run together: how they find each other, and how they part.

Each process runs the same program with the same flags, usually one on each host, and sees the
devices of all (`jax.distributed`). A single process goes through none of this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mos_jax.distributed.watch import LOST, Watch
from mos_jax.errors import InputError, RunEnded

AUTO, NONE = "auto", "none"
# In the store, so that they meet no keys of others.
_FOLDER = "mos_jax"
# Variables by which JAX knows a step of SLURM.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# How Open MPI says where its processes meet, up to version 4, and how many there are.
_MPI_ADDRESS, _MPI_SIZE = "OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"
# Errors of the runtime that have their reason in this process, not in a lost one.
_OWN_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")
# Seconds: processes that are through may have to wait for one that writes.
_DAY = 86400


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where the processes of a run find each other.

    Attributes:
      address: "host:port" of process 0; None: JAX finds out.
      processes: how many; None: JAX finds out.
      process: the number of this one; None: JAX finds out.
      method: JAX's name of the environment that says so; None: it tries all that it knows.
    """

    address: str | None = None
    processes: int | None = None
    process: int | None = None
    method: str | None = None


def find_meeting(
    coordinator: str, processes: int | None, process: int | None, environ: Mapping[str, str]
) -> Meeting | None:
    """Where this process meets the others; None: it is alone.

    Args:
      coordinator: "host:port"; "auto": whatever JAX finds; "none": alone; "": as the environment
        says, and alone if it does not speak of several processes.
      processes: how many; with an address, unless the environment says it.
      process: the number of this one; likewise.
      environ: the environment: of SLURM's and Open MPI's steps, and of pods on GKE.

    Raises:
      InputError: for flags that do not belong together, values that cannot be, or processes of
        Open MPI 5 without flags: it says that they are several, and not where they meet.
    """
    method = _method(environ)
    if coordinator in ("", AUTO, NONE):
        for name, value in (("processes", processes), ("process_id", process)):
            if value is not None:
                raise InputError(
                    f"--{name}={value} needs --coordinator=host:port, the address of process 0; "
                    f"got --coordinator={coordinator!r}"
                )
        if coordinator == "" and method is None and _of_several(environ):
            raise InputError(
                f"{_MPI_SIZE}={environ[_MPI_SIZE]} without {_MPI_ADDRESS}, as of Open MPI 5: the "
                "processes cannot find each other; give --coordinator=host:port, "
                f"--processes=${_MPI_SIZE} and --process_id=$OMPI_COMM_WORLD_RANK, or "
                "--coordinator=none if each is to run alone"
            )
        if coordinator == NONE or (coordinator == "" and method is None):
            return None
        return Meeting(method=method)
    if not re.fullmatch(r"\S+:\d{1,5}", coordinator) or int(coordinator.rpartition(":")[2]) > 65535:
        raise InputError(
            f"--coordinator={coordinator!r} must be host:port, such as 10.0.0.1:8476, 'auto' or "
            "'none'"
        )
    if method is not None and processes is process is None:
        return Meeting(coordinator, method=method)
    if processes is None or processes < 2:
        raise InputError(f"--processes={processes} must be 2 or more with --coordinator=host:port")
    if process is None or not 0 <= process < processes:
        raise InputError(
            f"--process_id={process} must be from 0 to {processes - 1} with --processes={processes}"
        )
    return Meeting(coordinator, processes, process, "deactivate")


def _method(environ: Mapping[str, str]) -> str | None:
    """JAX's name of the environment, where that speaks of several processes."""
    # Before SLURM, whose variables then are those of a daemon that mpirun started with srun.
    if _of_several(environ):
        return "ompi" if _MPI_ADDRESS in environ else None
    tasks = (environ.get(name, "") for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"))
    if all(name in environ for name in _SLURM) and "1" not in tasks:
        return "slurm"
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or environ.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return "gketpu"
    return None


def _of_several(environ: Mapping[str, str]) -> bool:
    """Whether mpirun of Open MPI started this process as one of several."""
    return environ.get(_MPI_SIZE, "1") != "1"


@contextlib.contextmanager
def joined(meeting: Meeting, silence: float, patience: float) -> Iterator[None]:
    """Joins the other processes; all leave the block together, or end with the first that ends.

    Errors do not leave the block: the process ends with one line for `InputError` and `RunEnded`,
    with a trace for all else, and tells the others, which end with its line and its status.

    Args:
      meeting: where they find each other.
      silence: seconds without a sign of life after which a process is lost.
      patience: seconds to wait for all to come.

    Raises:
      InputError: before the others are met, if JAX finds none.
    """
    if min(silence, patience) < 1:
        raise InputError(f"processes need at least 1 s to answer, got {min(silence, patience):g} s")
    # It would catch SIGTERM, which stops a run in an orderly way: `agree_to_stop`.
    jax.config.update("jax_enable_preemption_service", False)
    _meet(meeting, silence, patience)
    state = _state()
    watch = Watch(_JaxStore(), state.process_id, state.num_processes, silence)
    watch.start()
    try:
        yield
        client().wait_at_barrier(f"{_FOLDER}/end", _DAY * 1000)
    except InputError as error:
        watch.end(str(error), 2)
    except RunEnded as error:
        watch.end(str(error), error.status)
    except KeyboardInterrupt:
        watch.end("interrupted", 128 + signal.SIGINT)
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            if not str(error).startswith(_OWN_ERRORS):
                watch.wait_for_verdict()
        words = f"{type(error).__name__}: {error}"
        watch.end(f"{words} (its own output has the trace)", 1, traceback.format_exc())
    watch.stop()
    jax.distributed.shutdown()


def _meet(meeting: Meeting, silence: float, patience: float) -> None:
    def give_up() -> None:
        address = _state().coordinator_address or "an address that is not known yet"
        _fail(
            f"waited {patience:g} s for the other processes at {address}, and not all came; "
            "start all of them with the same flags, and see that their hosts reach that port"
        )

    # JAX would abort the process with a trace, so it is given more time than there is.
    timer = threading.Timer(patience, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            meeting.address,
            meeting.processes,
            meeting.process,
            cluster_detection_method=meeting.method,
            initialization_timeout=int(patience) + 60,
            # Behind the watch, should that be stuck itself.
            heartbeat_timeout_seconds=2 * int(silence) + 60,
        )
    except ValueError as error:
        raise InputError(
            f"JAX finds no other processes in this environment ({error}); give "
            "--coordinator=host:port, --processes and --process_id, or --coordinator=none"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"process 0 cannot open {_state().coordinator_address} ({str(error).splitlines()[0]}); "
            "choose another port"
        ) from error
    finally:
        timer.cancel()


def _fail(words: str) -> None:
    print(f"error: {words}", file=sys.stderr, flush=True)
    os._exit(LOST)


def _state() -> Any:
    from jax._src import distributed  # Orbax looks here too: JAX has no public door to the store

    return distributed.global_state


def client() -> Any:
    """The client of the store and the barriers that all processes share.

    Raises:
      InputError: where JAX sees several processes that nobody has joined.
    """
    found = _state().client
    if found is None:
        raise InputError(
            f"JAX sees {jax.process_count()} processes, which have not met; call the program with "
            "--coordinator=auto, or jax.distributed.initialize() first"
        )
    return found


class _JaxStore:
    """The key-value store as the watch sees it."""

    def put(self, key: str, value: str) -> None:
        """See `Store`."""
        client().key_value_set(f"{_FOLDER}/{key}", value, allow_overwrite=True)

    def entries(self, folder: str) -> dict[str, str]:
        """See `Store`."""
        found = client().key_value_dir_get(f"{_FOLDER}/{folder}/")
        return {key.rpartition("/")[2]: value for key, value in found}

    def is_gone(self) -> bool:
        """See `Store`: nobody listens at its address any more."""
        host, _, port = _state().coordinator_address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
                return False
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
