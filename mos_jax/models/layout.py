"""Where the tensors of a model file go: names, shapes and the filling of weights.

What the readers of all formats share.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mos_jax.errors import InputError
from mos_jax.models.config import DecoderConfig

# Elements handled at a time: bounds the working memory whatever the size of a tensor.
CHUNK = 1 << 22


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


def allocate_weights(config: DecoderConfig, dtype: Any) -> dict[str, np.ndarray]:
    """Returns uninitialised weights: norms in float32, all others in `dtype`.

    Raises:
        InputError: `dtype` is neither float32 nor bfloat16.
    """
    try:
        kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    except TypeError:
        kind = None
    if kind not in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        raise InputError(f"dtype = {dtype!r} is not supported; use 'float32' or 'bfloat16'")
    return {
        name: np.empty(shape, np.float32 if name.endswith("norm") else kind)
        for name, shape in config.weight_shapes().items()
    }


def fill(
    weights: dict[str, np.ndarray],
    slot: Slot,
    read_rows: Callable[[int, int], np.ndarray],
    path: os.PathLike[str] | str,
) -> None:
    """Writes one tensor of a file into `weights`, a bounded number of rows at a time.

    Args:
        weights: From `allocate_weights`.
        slot: Which tensor, and where it goes.
        read_rows: Returns rows start..stop of the tensor, as any floating type.
        path: The file, for messages.

    Raises:
        InputError: The tensor has an infinity or a NaN.
    """
    target = weights[slot.target] if slot.layer is None else weights[slot.target][slot.layer]
    rows, width = slot.shape[0], slot.shape[1] if len(slot.shape) == 2 else 1
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = read_rows(start, stop)
        if not np.isfinite(values).all():
            raise InputError(f"{path}: tensor {slot.source} has values that are not finite")
        # Rounding to bfloat16 may reach infinity only above 3.39e38, which no weight does.
        if slot.transposed:
            target[:, start:stop] = values.T
        else:
            target[start:stop] = values


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises InputError if there is no such file or object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
