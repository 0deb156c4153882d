"""Files and folders that are replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mos_jax.errors import InputError


@contextlib.contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which takes the place of `path` when the block ends.

    Whatever the block raises, and whichever rename fails, what stood at `path` stands there again
    and the empty folder is gone. Afterwards all that stood at `path` is deleted, so look first.

    Args:
      path: the place, existing or not; its parents are made. Where it is a link, what it points
        to is replaced.
    """
    path = path.resolve()  # so that a link stays one, and `.` has a name
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    old = fresh.with_name(fresh.name + ".old")
    try:
        fresh.chmod(0o755)
        yield fresh
        try:
            if path.exists():
                path.rename(old)
            fresh.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """Yields the name of a new file beside `path`, which takes its place when the block ends.

    Whatever the block raises, what stood at `path` stands there still and the new file is gone.

    Args:
      path: the place, existing or not; its parents are made. Where it is a link, what it points
        to is replaced.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        yield fresh
        with open(fresh, "rb") as stream:
            os.fsync(stream.fileno())
        fresh.replace(path)
    _sync_folder(path.parent)


def check_space(path: Path, needed: int) -> None:
    """Raises InputError unless `needed` bytes are free where `path` is to be written."""
    path = path.resolve()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{path} needs {needed:,} bytes, and its disk has {free:,} left; free some, or choose "
            "a place on another disk"
        )


def write_file(file: Path, payload: bytes) -> None:
    """Writes `payload` to `file` and waits until it is on the disk."""
    with open(file, "wb") as stream:
        stream.write(payload)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    # Where folders cannot be opened or synced, the renames are as safe as that system makes them.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_folder(path: Path, overwrite: bool, marker: str, kind: str) -> None:
    """Checks that a folder may be written at `path`.

    Args:
      path: where.
      overwrite: whether what stands there may be replaced, with all that is in its folder.
      marker: name of a file that shows it to be of the kind that is written.
      kind: that kind, for messages.

    Raises:
      InputError: if a file stands there, or a folder that holds something and must not be replaced
        or is of another kind.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"{path} is not empty; set overwrite=True (--overwrite) or choose another folder"
        )
    if not (path / marker).is_file():
        # Replacing removes the whole folder, which may be anything.
        raise InputError(
            f"{path} is not empty and not a {kind} (no {marker}), so it is not overwritten; "
            "choose another folder"
        )
