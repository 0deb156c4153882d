"""Reads tenants' arrays beside whatever else runs, and keeps the latest in host memory."""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable
from typing import Any

import jax

from mos_jax.errors import InputError

# Read and on the device, but not in their slots yet. The reader waits until one is placed, so that
# what lies beside the slab is bounded.
STAGED = 2


class HostTier:
    """Checked arrays of the tenants read latest, within a number of bytes.

    Attributes:
      limit: bytes; 0 keeps nothing.
      nbytes: bytes held.
    """

    def __init__(self, limit: int):
        self.limit, self.nbytes = limit, 0
        self._entries: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> Any | None:
        """A tenant's arrays, None if they are not held."""
        with self._lock:
            if name in self._entries:
                self._entries.move_to_end(name)
            return self._entries.get(name)

    def put(self, name: str, entry: Any) -> None:
        """Keeps a tenant's arrays, if they fit; those used longest ago give way."""
        size = _bytes_of(entry)
        self.drop(name)
        if size > self.limit:
            return
        with self._lock:
            while self.nbytes + size > self.limit:
                self.nbytes -= _bytes_of(self._entries.popitem(last=False)[1])
            self._entries[name] = entry
            self.nbytes += size

    def drop(self, name: str) -> None:
        """Forgets a tenant's arrays."""
        with self._lock:
            entry = self._entries.pop(name, None)
            self.nbytes -= 0 if entry is None else _bytes_of(entry)


class Loader:
    """One thread that reads tenants, first come first served.

    Attributes:
      read: how many tenants it read from disk.
      tell: called, if set, in the thread after each that `take` can now give.
    """

    def __init__(self, read: Callable[[str, Any], Any], host: HostTier):
        """Starts no thread before the first `ask`.

        Args:
          read: from a name and what it is asked with to the arrays of a slot, on the host; raises
            InputError.
          host: where they are kept, and looked for first.
        """
        self.read = 0
        self.tell: Callable[[], None] | None = None
        self._read, self._host = read, host
        self._asked: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._ready: queue.Queue[tuple[Any, Any, InputError | None]] = queue.Queue(STAGED)
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def check_open(self) -> None:
        """Raises InputError once it is closed."""
        if self._closed.is_set():
            raise InputError("the bank is closed and reads no more tenants")

    def ask(self, name: str, what: Any) -> None:
        """Has a tenant read; `take` gives it back with `what`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tenant loader", daemon=True)
            self._thread.start()
        self._asked.put((name, what))

    def take(self, timeout: float = 0) -> tuple[Any, Any, InputError | None] | None:
        """The next that is ready: `what`, its arrays on the device or None, and its error.

        Args:
          timeout: seconds to wait for it at most.

        Returns:
          None if none is ready.
        """
        try:
            return self._ready.get(block=timeout > 0, timeout=timeout or None)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Ends the thread; what it still had to read is dropped."""
        self._closed.set()
        self._asked.put(None)
        if self._thread is not None:
            while self._thread.is_alive():
                self.take(0.01)  # it may wait for room
            self._thread.join()

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None and not self._closed.is_set():
            name, what = asked
            found: tuple[Any, Any, InputError | None]
            try:
                entry = self._host.get(name)
                if entry is None:
                    entry = self._read(name, what)
                    self.read += 1
                    self._host.put(name, entry)
                found = what, jax.block_until_ready(jax.device_put(entry)), None
            except InputError as error:
                found = what, None, error
            except Exception as error:  # whatever a file does: it is this tenant's alone
                found = what, None, InputError(f"{name!r} cannot be read: {error!r}")
            self._ready.put(found)
            if (tell := self.tell) is not None:
                tell()


def _bytes_of(entry: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(entry))
