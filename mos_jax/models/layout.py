"""Where the tensors of a model file go: names, shapes, and reading weights part by part.

What the readers of all formats share.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mos_jax.errors import InputError
from mos_jax.models.config import DecoderConfig

# Entries handled at a time: bounds the working memory whatever the size of a tensor.
CHUNK = 1 << 19

# A slice with start and stop for each axis.
Index = tuple[slice, ...]
# Returns rows and columns (both with start and stop) of a tensor as any floating type, [rows,
# columns]; a tensor of one axis has no columns and gives [rows].
TensorReader = Callable[[slice, slice], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor of a file goes.

    Attributes:
        source: Name of the tensor in the file.
        shape: Its shape in the file: [d_out, d_in] for a projection.
        target: Name of the weight it fills.
        layer: Index into the leading axis of that weight, or None when it is not stacked.
        transposed: Whether the file's rows are the weight's columns.
    """

    source: str
    shape: tuple[int, ...]
    target: str
    layer: int | None
    transposed: bool


def match_tensors(
    path: os.PathLike[str] | str,
    config: DecoderConfig,
    names: Mapping[str, str],
    found: Mapping[str, tuple[int, ...]],
) -> list[Slot]:
    """Returns where each tensor of a file goes, having checked that they are those of the model.

    Args:
        path: The file, for messages.
        config: The model.
        names: The file's name of each weight, with `{}` where the layer's number goes.
        found: Shape of each tensor in the file.

    Raises:
        InputError: A tensor is missing, of another shape, or not part of the model.
    """
    result: dict[str, Slot] = {}
    for target, shape in config.weight_shapes().items():
        stacked = target.startswith("blocks/")
        shape = shape[1:] if stacked else shape
        transposed = len(shape) == 2 and target != "embed"
        in_file = shape[::-1] if transposed else shape
        for layer in range(config.num_layers) if stacked else (None,):
            source = names[target].format(layer)
            if source not in found:
                raise InputError(f"{path}: tensor {source} is missing")
            if found[source] != in_file:
                raise InputError(
                    f"{path}: tensor {source} has shape {list(found[source])}; "
                    f"the config asks for {list(in_file)}"
                )
            result[source] = Slot(source, in_file, target, layer, transposed)
    for name in (name for name in found if name not in result):
        raise InputError(f"{path}: tensor {name} is no part of this model and would be ignored")
    return list(result.values())


@dataclasses.dataclass(frozen=True)
class WeightReader:
    """One weight of a model as its file holds it, to be read in parts.

    Attributes:
        path: The file, for messages.
        shape: Of the weight, as `DecoderConfig.weight_shapes` has it.
        slots: The tensors it comes from: one for each layer, or one if it is not stacked.
        tensors: The readers of those tensors.
    """

    path: os.PathLike[str] | str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    tensors: tuple[TensorReader, ...]

    @property
    def long_axis(self) -> int:
        """The axis of the weight along which the file's rows follow each other."""
        return len(self.shape) - (1 if self.slots[0].transposed else len(self.slots[0].shape))

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """Returns a part of the weight, and reads no more of the file than that part.

        Args:
            index: A slice with start and stop for each axis of the weight.
            dtype: float32 or bfloat16.

        Raises:
            InputError: The part has an infinity or a NaN, or the file ends before it.
        """
        part = np.empty([axis.stop - axis.start for axis in index], dtype)
        stacked = self.slots[0].layer is not None
        layers = range(index[0].start, index[0].stop) if stacked else (0,)
        for place, layer in enumerate(layers):
            slot, axes = self.slots[layer], index[1:] if stacked else index
            rows, columns = axes[::-1] if slot.transposed else (*axes, slice(0, 1))[:2]
            values = self.tensors[layer](rows, columns)
            if not np.isfinite(values).all():
                raise InputError(
                    f"{self.path}: tensor {slot.source} has values that are not finite"
                )
            # Rounding to bfloat16 may reach infinity only above 3.39e38, which no weight does.
            (part[place] if stacked else part)[...] = values.T if slot.transposed else values
        return part


def weight_readers(
    path: os.PathLike[str] | str,
    slots: Sequence[Slot],
    shapes: Mapping[str, tuple[int, ...]],
    open_tensor: Callable[[Slot], TensorReader],
) -> dict[str, WeightReader]:
    """Groups the tensors of a file by the weight that they fill, in the order of `shapes`."""
    by_target: dict[str, list[Slot]] = {name: [] for name in shapes}
    for slot in slots:
        by_target[slot.target].append(slot)
    return {
        name: WeightReader(path, shapes[name], tuple(own), tuple(map(open_tensor, own)))
        for name, own in by_target.items()
    }


def parts(shape: Sequence[int], long_axis: int) -> Iterator[Index]:
    """Cuts an array into parts of at most `CHUNK` entries, or of one slice across `long_axis`.

    Several entries of the first axis make a part where they fit, such as the layers of a narrow
    projection; otherwise each is cut along `long_axis`, the axis of the file's rows.

    Yields:
        A slice with start and stop for each axis; together they cover the array once.
    """
    by_layer = long_axis > 0 and math.prod(shape[1:]) > CHUNK
    axis, layers = (long_axis, shape[0]) if by_layer else (0, 1)
    step = _even_step(shape[axis], CHUNK // (math.prod(shape) // layers // shape[axis]))
    whole = [slice(0, size) for size in shape]
    for layer in range(layers):
        for start in range(0, shape[axis], step):
            cut = list(whole)
            if by_layer:
                cut[0] = slice(layer, layer + 1)
            cut[axis] = slice(start, min(start + step, shape[axis]))
            yield tuple(cut)


def _even_step(size: int, limit: int) -> int:
    """A step of at most `limit` that divides `size`, unless that would be far smaller.

    Parts of one shape need one compiled program to be written, a smaller last one a second.
    """
    limit = max(1, min(limit, size))
    dividing = (step for step in range(limit, limit // 2, -1) if size % step == 0)
    return next(dividing, limit)


def weight_dtype(name: str, dtype: Any) -> np.dtype:
    """Returns the dtype of the weight `name`: float32 for norms, `dtype` for all others.

    Raises:
        InputError: `dtype` is neither float32 nor bfloat16.
    """
    try:
        kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    except TypeError:
        kind = None
    if kind not in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        raise InputError(f"dtype = {dtype!r} is not supported; use 'float32' or 'bfloat16'")
    return np.dtype(np.float32) if name.endswith("norm") else kind


def allocate_weights(config: DecoderConfig, dtype: Any) -> dict[str, np.ndarray]:
    """Returns uninitialised weights: norms in float32, all others in `dtype`. Raises InputError."""
    return {
        name: np.empty(shape, weight_dtype(name, dtype))
        for name, shape in config.weight_shapes().items()
    }


def read_all(readers: Mapping[str, WeightReader], dtype: Any) -> dict[str, np.ndarray]:
    """Returns the weights of a file, whole and on the host. Raises InputError."""
    weights = {}
    for name, reader in readers.items():
        weight = np.empty(reader.shape, weight_dtype(name, dtype))
        for index in parts(reader.shape, reader.long_axis):
            weight[index] = reader.read(index, weight.dtype)
        weights[name] = weight
    return weights


class ByteFile:
    """A file read in blocks of bytes, unbuffered.

    Not mapped into memory: pages of a mapped file count as the process's own until the system
    wants them back, so that loading would seem to take (and under a limit does take) the size of
    the file besides that of the model.
    """

    def __init__(self, path: os.PathLike[str] | str):
        self.path = path
        self._file = open(path, "rb", buffering=0)

    def __enter__(self) -> ByteFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, offset: int, row_bytes: int, rows: slice, columns: slice) -> np.ndarray:
        """Returns a block of a table of bytes.

        Args:
            offset: Where the table begins in the file.
            row_bytes: Length of its rows.
            rows: Which rows, start to stop.
            columns: Which bytes of each, start to stop.

        Returns:
            uint8 [rows, columns].

        Raises:
            InputError: The file ends before that.
        """
        block = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
        whole = block.shape[1] == row_bytes
        for place, part in enumerate((block,) if whole else block):
            row = rows.start + (0 if whole else place)
            self._file.seek(offset + row * row_bytes + columns.start)
            view = memoryview(part).cast("B") if part.size else memoryview(b"")
            while view.nbytes:
                count = self._file.readinto(view)
                if not count:
                    raise InputError(f"{self.path} was cut short while it was read")
                view = view[count:]
        return block
