"""Opening and parsing small files that others wrote, whatever is in them.

A model folder or an adapter may come from anywhere. What is read here is a regular file, of bounded
size, and JSON in which nothing is ambiguous; all else is an `InputError` that names the file.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from mos_jax.errors import InputError

# Bytes. The largest honest ones are tokenizers of some 35 MB; a file may claim any size.
MAX_TEXT_BYTES = 1 << 27
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1
# What transformers writes as `model_max_length` of a tokenizer without one.
_NO_LIMIT = str(int(1e30))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to be read.

    Raises:
        InputError: It is missing, cannot be opened, or is no regular file: reading a pipe or a
            device may never end.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            kind = "a folder" if path.is_dir() else "no regular file"
            raise InputError(f"cannot read {path}: it is {kind}")
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES, what: str = "such a file") -> bytes:
    """Returns the content of a file of at most `limit` bytes.

    Raises:
        InputError: As `open_regular`, or it is larger; `what` says what it should have been.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise InputError(f"{path} has {size} bytes; {what} has at most {limit}")
        try:
            return file.read(size)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error


def read_text(path: Path) -> str:
    """Returns the content of a UTF-8 file; raises InputError as `read_bytes`, or if it is none."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        InputError: As `read_text`; it is not valid JSON, nests too deeply, is no object, has a key
            twice in one object, a whole number beyond 64 bits (transformers' for "no limit" is
            let through), or half of a surrogate pair. Of the last three, readers of JSON make
            different things.
    """
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_bounded)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} occurs twice in one object")
    return found


def _bounded(digits: str) -> int:
    if digits == _NO_LIMIT:
        return int(digits)
    if len(digits) > 20 or not _INT_MIN <= int(digits) <= _INT_MAX:
        raise ValueError(f"the number {digits:.24}... has more than 64 bits")
    return int(digits)


def refuse_pickle(path: Path) -> None:
    """Raises InputError, which says how to convert it, if `path` has the name of a pickle.

    By the name alone: the file is not opened.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(pickle_message(path))


def missing_file(folder: Path, message: str) -> InputError:
    """Returns the error for a file that `folder` lacks; names a pickle that is there instead."""
    entries = folder.iterdir() if folder.is_dir() else ()
    pickles = [entry for entry in entries if entry.suffix.lower() in PICKLE_SUFFIXES]
    return InputError(f"{message}; {pickle_message(min(pickles))}" if pickles else message)


def pickle_message(path: Path) -> str:
    """Returns why a pickle is not read, and how it is converted."""
    return (
        f"{path} is a pickle, which can run code when read: convert it to safetensors, if you "
        "trust it, with save_pretrained of transformers or peft, or with "
        "safetensors.torch.save_file(torch.load(old, weights_only=True), new)"
    )
