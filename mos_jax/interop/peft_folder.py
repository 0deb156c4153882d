"""A PEFT adapter's folder: its files, written as one and read with every tensor checked.

No pickle is ever opened: a folder that has only `adapter_model.bin` is refused with how to convert
it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as format_safetensors

from mos_jax.errors import InputError
from mos_jax.files import check_folder, fresh_folder, write_file
from mos_jax.interop.peft_config import CONFIG_FILE
from mos_jax.reading import missing_file

ARRAYS_FILE = "adapter_model.safetensors"
README_FILE = "README.md"
_FLOATS = ("float32", "float16", "bfloat16")


def write_folder(
    path: Path, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], readme: str
) -> None:
    """Writes the three files beside `path` and puts them in its place; see `check_destination`."""
    # Sorted as PEFT does it, but not within patterns, whose first match counts.
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    payload = format_safetensors(dict(arrays), metadata={"format": "pt"})
    with fresh_folder(path) as fresh:
        write_file(fresh / ARRAYS_FILE, payload)
        write_file(fresh / CONFIG_FILE, text.encode())
        write_file(fresh / README_FILE, readme.encode())


def check_destination(path: Path, overwrite: bool) -> None:
    """Raises InputError if `path` holds what must not be replaced."""
    check_folder(path, overwrite, CONFIG_FILE, "PEFT adapter")


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the folder, in their own dtypes.

    Raises:
      InputError: if there is no whole safetensors file of dtypes that NumPy has.
    """
    file = folder / ARRAYS_FILE
    if not file.is_file():
        raise missing_file(folder, f"no PEFT adapter at {folder}: {ARRAYS_FILE} is missing")
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} holds tensors of dtype {error}, which are not read") from None


def check_names(folder: Path, arrays: Mapping[str, np.ndarray], wanted: Iterable[str]) -> None:
    """Raises InputError unless the folder's tensors are exactly those `wanted`."""
    wanted = set(wanted)
    for word, names in (("lacks", wanted - set(arrays)), ("has the extra", set(arrays) - wanted)):
        if names:
            some = sorted(names)[:3]
            more = f" and {len(names) - len(some)} more" if len(names) > len(some) else ""
            raise InputError(
                f"{folder / ARRAYS_FILE} {word} tensor {', '.join(some)}{more}; {CONFIG_FILE} "
                f"and the base's sites ask for {len(wanted)} others"
            )


def take(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of floats, checked, in fp32.

    Raises:
      InputError: for another shape, another dtype than fp32, fp16 or bf16, or values that are not
        finite.
    """
    array = arrays[name]
    if array.shape != shape:
        raise InputError(f"tensor {name} must be {list(shape)}, got {list(array.shape)}")
    if array.dtype.name not in _FLOATS:
        raise InputError(f"tensor {name} must be float32, float16 or bfloat16, got {array.dtype}")
    array = array.astype(np.float32)
    if not np.all(np.isfinite(array)):
        raise InputError(f"tensor {name} holds values that are not finite")
    return array


def take_index(
    arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], length: int
) -> np.ndarray:
    """A tensor of indices below `length`, checked, as int32.

    Raises:
      InputError: for another shape, a dtype that is no integer, or an index out of range.
    """
    array = arrays[name]
    if array.shape != shape:
        raise InputError(f"tensor {name} must be {list(shape)}, got {list(array.shape)}")
    if array.dtype.kind not in "iu":
        raise InputError(f"tensor {name} must hold integers, got {array.dtype}")
    if array.size and (array.min() < 0 or array.max() >= length):
        raise InputError(
            f"tensor {name} must hold indices from 0 to {length - 1}, got {array.min()} to "
            f"{array.max()}"
        )
    return array.astype(np.int32)
