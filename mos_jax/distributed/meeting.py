"""What the environment says of other processes: how many were started, and where they meet.

It needs no JAX, so a program can ask before it starts one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from mos_jax.errors import InputError

AUTO, NONE = "auto", "none"
# Variables by which JAX knows a step of SLURM, and the one that counts a step's tasks alone.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
# How Open MPI says where its processes meet, up to version 4.
_MPI_ADDRESS = "OMPI_MCA_orte_hnp_uri"


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


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Who starts several processes, and the variables by which these know.

    Attributes:
      name: of the launcher.
      size: how many processes there are.
      rank: which of them this one is.
    """

    name: str
    size: str
    rank: str


_OPEN_MPI = Launcher("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_PMI = Launcher("MPICH or Intel MPI", "PMI_SIZE", "PMI_RANK")
_MPI = (_OPEN_MPI, Launcher("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"), _PMI)


def find_meeting(
    coordinator: str, processes: int | None, process: int | None, environ: Mapping[str, str]
) -> Meeting | None:
    """Where this process meets the others; None: it is alone.

    Args:
      coordinator: "host:port"; "auto": whatever JAX finds; "none": alone; "": as the environment
        says, and alone if it does not speak of several processes.
      processes: how many; with an address, unless the environment says it.
      process: the number of this one; likewise.
      environ: the environment: of SLURM's and MPI's steps, and of pods on GKE.

    Raises:
      InputError: for flags that do not belong together, values that cannot be, or, without flags,
        processes of Open MPI 5 or another MPI: it says that they are several, and not where they
        meet.
    """
    method = _method(environ)
    if coordinator in ("", AUTO, NONE):
        for name, value in (("processes", processes), ("process_id", process)):
            if value is not None:
                raise InputError(
                    f"--{name}={value} needs --coordinator=host:port, the address of process 0; "
                    f"got --coordinator={coordinator!r}"
                )
        if coordinator == "" and method is None and (mpi := _mpi(environ)):
            told = f"{mpi.size}={environ[mpi.size]}, as of {mpi.name}"
            if mpi is _OPEN_MPI:
                told = f"{mpi.size}={environ[mpi.size]} without {_MPI_ADDRESS}, as of Open MPI 5"
            raise InputError(
                f"{told}: the processes cannot find each other; give --coordinator=host:port, "
                f"--processes=${mpi.size} and --process_id=${mpi.rank}, or --coordinator=none if "
                "each is to run alone"
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


def started_as_several(environ: Mapping[str, str]) -> str | None:
    """How this process was started as one of several, such as "SLURM_NTASKS=2"; None: it was not.

    The script of a SLURM job and the shell of `salloc` are single, whatever the job's size.
    """
    if mpi := _mpi(environ):
        return f"{mpi.size}={environ[mpi.size]}"
    if _is_slurm(environ):
        name = _SLURM_TASKS if _SLURM_TASKS in environ else "SLURM_NTASKS"
        return f"{name}={environ[name]}"
    return None


def _method(environ: Mapping[str, str]) -> str | None:
    """JAX's name of the environment, where that speaks of several processes."""
    # Before SLURM, whose variables then are those of a daemon that mpirun started with srun.
    if mpi := _mpi(environ):
        return "ompi" if mpi is _OPEN_MPI and _MPI_ADDRESS in environ else None
    if _is_slurm(environ):
        return "slurm"
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or environ.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return "gketpu"
    return None


def _is_slurm(environ: Mapping[str, str]) -> bool:
    """Whether this process is a task of a SLURM step of several."""
    tasks = (environ.get(name, "") for name in ("SLURM_NTASKS", _SLURM_TASKS))
    return all(name in environ for name in _SLURM) and "1" not in tasks


def _mpi(environ: Mapping[str, str]) -> Launcher | None:
    """The MPI whose mpirun started this process as one of several."""
    for mpi in _MPI:
        if environ.get(mpi.size, "1") != "1":
            # With srun --mpi=pmi2 it is SLURM itself that sets these.
            own = ("SLURM_NTASKS", "SLURM_PROCID")
            told = tuple(environ[name] for name in (mpi.size, mpi.rank) if name in environ)
            by_srun = _is_slurm(environ) and told == tuple(environ[name] for name in own)
            return None if mpi is _PMI and by_srun else mpi
    return None
