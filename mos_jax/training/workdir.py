"""The folder of a run: its configuration, its lock, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mos_jax.errors import InputError
from mos_jax.training.config import RunConfig
from mos_jax.training.resuming import check_resumable


class Busy(InputError):
    """Another process is at work in a run's folder."""


class WorkDir:
    """Paths and small files of a run's folder.

    Attributes:
      path: the folder.
      writes: whether this process writes: of several that share a run, the first one.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool = True):
        self.path = Path(path)
        self.writes = writes
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--workdir={self.path} is a file; give a folder")

    @property
    def checkpoints(self) -> Path:
        """Folder of the training states."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Folder of the finished adapter."""
        return self.path / "adapter"

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Compares with the configuration stored here, if any; see `check_resumable`."""
        stored = self.read_config()
        if stored is None:
            if self.path.exists() and any(self.checkpoints.glob("*")):
                raise InputError(f"{self.path} has checkpoints but no config.json; choose another")
            return []
        # A field that is newer than the stored configuration had its default then.
        with contextlib.suppress(InputError):
            stored = RunConfig.from_mapping(stored).to_dict()
        # Compared as JSON: a tuple and the list it was written as are the same value.
        old, new = (json.loads(json.dumps(side)) for side in (stored, config))
        return check_resumable(old, new, str(self.path))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Stores the resolved configuration."""
        self._write("config.json", config)

    def read_config(self) -> dict[str, Any] | None:
        """The stored configuration, or None."""
        return self._read("config.json")

    def read_summary(self) -> dict[str, Any] | None:
        """What a finished run wrote, or None."""
        return self._read("summary.json")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Stores the result; its presence marks the run as finished."""
        self._write("summary.json", summary)

    def write_scores(self, scores: Mapping[str, Sequence[float]]) -> None:
        """Stores the score of every example by split, in the order of the data's sets."""
        self._write("scores.json", scores)

    def write_error(self, error: Exception) -> None:
        """Stores why a run ended that is not going on."""
        self._write("error.json", {"error": str(error), "type": type(error).__name__})

    def remove_outcome(self) -> None:
        """Marks the run as neither finished nor failed."""
        for name in ("summary.json", "error.json") if self.writes else ():
            (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder and keeps other runs out of it; freed even by a kill.

        A process that does not write takes no lock: the first one holds it for all.

        Raises:
          Busy: if another process holds it.
        """
        if not self.writes:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"another run is at work in {self.path}") from None
            yield

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(f"{self.path / name} is not JSON ({error}); remove it") from None

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        fresh = self.path / f".{name}.new"
        with open(fresh, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(value, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, self.path / name)
