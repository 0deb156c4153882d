"""Several processes that do one run together: how they come together, and how they part.

Each process runs the same program with the same flags, usually one on each host, and sees the
devices of all (`jax.distributed`). A single process goes through none of this.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from mos_jax.distributed.meeting import Meeting
from mos_jax.distributed.watch import LOST, Watch
from mos_jax.errors import InputError, RunEnded

# In the store, so that they meet no keys of others.
_FOLDER = "mos_jax"
# Errors of the runtime that have their reason in this process, not in a lost one.
_OWN_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")
# Seconds: processes that are through may have to wait for one that writes.
_DAY = 86400


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
            "start all of them with the same flags but for --process_id, and see that their hosts "
            "reach that port"
        )

    # JAX would abort the process with a trace, so it is given more time than there is.
    timer = threading.Timer(patience, give_up)
    timer.daemon = True
    timer.start()
    try:
        with _a_line_for_an_abort():
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
        raise InputError(_why_not_joined(_first_line(error))) from error
    except (RuntimeError, OSError) as error:
        # Of JAX's search in an environment. It says the same of a program that has begun too soon,
        # which is none of the user's mistakes.
        if "distributed.initialize" in str(error):
            raise
        raise InputError(
            f"JAX cannot find the other processes ({_first_line(error)}); see that the hosts reach "
            "each other and what tells of them (on a TPU VM its metadata server), or give "
            "--coordinator=host:port, --processes and --process_id"
        ) from error
    finally:
        timer.cancel()


@contextlib.contextmanager
def _a_line_for_an_abort() -> Iterator[None]:
    """Ends the process with a line where JAX's client would abort it, as for a number taken twice.

    It aborts from a thread of its own, where no handler of Python's `signal` runs; one of ctypes
    does, since the main thread waits in JAX and leaves the interpreter to others.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(
        lambda _: _fail(_why_not_joined("JAX's own words are above"))
    )
    before = libc.signal(int(signal.SIGABRT), ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(int(signal.SIGABRT), before)


def _why_not_joined(said: str) -> str:
    """What there is to say of a process that knows where to go and does not get in."""
    state = _state()
    # Process 0 opens the port first, and then goes in like all others.
    if state.process_id == 0 and state.service is None:
        return f"process 0 cannot open {state.coordinator_address} ({said}); choose another port"
    return (
        f"process {state.process_id} cannot join the others at {state.coordinator_address} "
        f"({said}); see that every process has a --process_id of its own, the same --coordinator "
        "and --processes, and the same version of JAX, and that no other run uses that port"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


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
