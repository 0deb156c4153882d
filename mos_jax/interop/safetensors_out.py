"""Writer of safetensors files that holds one piece of a tensor at a time.

The format: 8 bytes with the length of a header, a JSON header with every tensor's dtype, shape and
place, then the tensors' bytes. All places follow from the shapes, so the header can be written
first and each tensor when its turn comes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from mos_jax.errors import InputError, suggest
from mos_jax.files import write_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Name in the file and NumPy's dtype, by our name of it.
DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      name: its name there.
      shape: its shape there.
      dtype: its dtype there, one of `DTYPES`.
      pieces: gives its values in order, along the first axis, in any floating dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype][1].itemsize


def check_dtype(dtype: str) -> str:
    """Returns `dtype`. Raises InputError if files of tensors are not written in it."""
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; {suggest(str(dtype), DTYPES)}")
    return dtype


def split_shards(tensors: Sequence[Tensor], max_bytes: int) -> dict[str, list[Tensor]]:
    """Returns file names with their tensors, in order, none above `max_bytes` unless it must.

    A tensor larger than that has a file of its own. One file is called model.safetensors.

    Raises:
      InputError: if `max_bytes` is not a whole number of at least 1.
    """
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
        raise InputError(f"max_shard_bytes = {max_bytes!r} must be a whole number, 1 or more")
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def write_shards(folder: Path, shards: Mapping[str, list[Tensor]]) -> None:
    """Writes the files of `split_shards`, and their index where there are several.

    Raises:
      InputError: if a value is not finite in the dtype that its tensor is to have.
    """
    for name, tensors in shards.items():
        _write(folder / name, tensors)
    if list(shards) == [SINGLE_FILE]:
        return
    weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.bytes for tensors in shards.values() for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())


def _write(file: Path, tensors: Iterable[Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.bytes
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            before = stream.tell()
            for piece in tensor.pieces():
                stream.write(round_to(piece, tensor.dtype, tensor.name).view(np.uint8).data)
            assert stream.tell() - before == tensor.bytes, tensor.name
        stream.flush()
        os.fsync(stream.fileno())


def round_to(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Returns `values` in `dtype`, row by row in memory.

    Raises:
      InputError: if one of them is not finite, or becomes so by rounding.
    """
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(values, DTYPES[dtype][1])
    if np.isfinite(rounded).all():
        return rounded
    if not np.isfinite(values).all():
        raise InputError(f"tensor {name} holds values that are not finite")
    largest = float(np.max(np.abs(values)))
    wider = "bfloat16 or float32" if dtype == "float16" else "float32"
    raise InputError(
        f"tensor {name} holds {largest:.4g}, which is too large for {dtype}; write {wider}"
    )
