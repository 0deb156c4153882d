"""Keeps compiled programs between starts, so that the second start of a run compiles nothing.

It is JAX's own cache, in a folder of the user's by default. Its settings are put into the
environment, from where JAX takes them and programs that this one starts take them too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

# Of this package: a folder, or "off".
VARIABLE = "MOS_JAX_COMPILATION_CACHE"
OFF = "off"
# What is used least recently gives way beyond this.
MAX_BYTES = 1 << 30
# JAX's names. Where one of the first two is set, the user has decided and nothing is done here.
_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_ENABLED = "JAX_ENABLE_COMPILATION_CACHE"
# Where the environment sets one of these, that holds.
_SETTINGS = {
    # With a limit, JAX locks the folder: processes can share it.
    "JAX_COMPILATION_CACHE_MAX_SIZE": MAX_BYTES,
    # Not everything: for each new entry JAX looks at all there are, with the folder locked.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.1,
}
# After so long a file that is half written has no writer any more.
_ABANDONED_SECONDS = 600.0


def default_folder() -> Path:
    """The folder in the user's cache: `$XDG_CACHE_HOME/mos_jax/compiled`, or in `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mos_jax" / "compiled"


def keep_compiled(folder: str | None = None) -> Path | None:
    """Lets JAX keep what it compiles, before it compiles anything.

    Where the folder cannot be used, a line on standard error says so and nothing is kept. Where
    the environment says what JAX shall do (`JAX_COMPILATION_CACHE_DIR` or
    `JAX_ENABLE_COMPILATION_CACHE`) and no folder is asked for, that holds.

    Args:
      folder: where; "off": nowhere; None: what the environment's `MOS_JAX_COMPILATION_CACHE`
        says, else `default_folder()`.

    Returns:
      The folder, one for each kind of processor inside the one that was asked for; None if
      nothing is kept or JAX's own settings hold.
    """
    if not folder:
        if _FOLDER in os.environ or _ENABLED in os.environ:
            return None
        folder = os.environ.get(VARIABLE)
    if folder == OFF:
        _set({_ENABLED: False})
        return None
    try:
        # Programs for this processor may hold instructions that another one lacks.
        own = Path(folder or default_folder()).expanduser().absolute() / _processor()
        own.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=own):
            pass
        _remove_abandoned(own)
    # Path.home() raises RuntimeError where there is none.
    except (OSError, RuntimeError) as error:
        print(f"warning: compiled programs are not kept: {error}", file=sys.stderr)
        return None
    others = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    _set({_FOLDER: own, _ENABLED: True, **others})
    return own


def _set(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        os.environ[name] = str(value)
        # A JAX that is there already has read the environment.
        if "jax" in sys.modules:
            known = str(value) if isinstance(value, Path) else value
            sys.modules["jax"].config.update(name.lower(), known)


def _remove_abandoned(folder: Path) -> None:
    """Removes entries whose writer was killed: one without its time of use stops all evictions."""
    for entry in folder.glob("*-cache"):
        stamp = entry.with_name(entry.name.removesuffix("cache") + "atime")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if not stamp.exists() and time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS:
                entry.unlink()


def _processor() -> str:
    features = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            wanted = (line for line in lines if line.startswith(("flags", "Features")))
            features = next(wanted, "")
    except OSError:
        pass  # not Linux: the kind of machine alone
    digest = hashlib.blake2b(features.encode(), digest_size=4).hexdigest()
    return f"{platform.machine()}-{digest}"
