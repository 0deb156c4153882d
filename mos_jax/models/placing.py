"""From the parts of a weight on the host to arrays on devices, a part at a time.

Neither a whole model nor a whole weight is ever on the host: a part is read, put on its device and
written into the array that stands there. A device that holds a slice of a weight is given that
slice only, and only that slice is read. Quantised weights are encoded part by part on the way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from mos_jax.errors import InputError, suggest
from mos_jax.models.layout import Index, parts
from mos_jax.models.quantized import BLOCK, Scheme, Weight, check_divides

# Says for the name and the shape of a weight where it lies; None: on the default device.
Shardings = Callable[[str, tuple[int, ...]], Sharding | None] | Mapping[str, Sharding]


class Reader(Protocol):
    """What parts of a weight are read from: a `WeightReader`, or an array in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""

    @property
    def long_axis(self) -> int:
        """The axis along which parts are cut."""

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """The part at `index`."""


@dataclasses.dataclass(frozen=True)
class ArrayReader:
    """Reads parts of a weight that is in memory already."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.array.shape

    @property
    def long_axis(self) -> int:
        """The axis along which parts are cut."""
        return self.array.ndim - 1

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """The part at `index`."""
        return self.array[index].astype(dtype)


def choose_sharding(shardings: Shardings | None, name: str, shape: tuple[int, ...]) -> Any:
    """The sharding of one weight, or None for the default device.

    Raises:
      InputError: if a mapping has no entry for the weight, or what is chosen is no sharding.
    """
    if shardings is None:
        return None
    if callable(shardings):
        chosen = shardings(name, shape)
        if chosen is None:
            return None
    else:
        if name not in shardings:
            raise InputError(f"shardings have no entry for weight {name!r} {list(shape)}")
        chosen = shardings[name]
    if not isinstance(chosen, Sharding):
        raise InputError(
            f"shardings give {chosen!r} for {name!r}, which is no jax.sharding.Sharding"
        )
    return chosen


def check_names(shardings: Shardings | None, names: Sequence[str]) -> None:
    """Raises InputError for an entry of a mapping that no weight has the name of."""
    if isinstance(shardings, Mapping):
        for name in shardings:
            if name not in names:
                raise InputError(
                    f"shardings name an unknown weight {name!r}; {suggest(name, names)}"
                )


def place(
    name: str,
    reader: Reader,
    dtype: np.dtype,
    sharding: Sharding | None = None,
    scheme: Scheme | None = None,
    observe: Callable[[Index, np.ndarray], None] | None = None,
) -> Weight:
    """Reads one weight onto its devices.

    Args:
      name: for messages.
      reader: where its parts come from.
      dtype: of the array; a quantised weight has that of its scheme.
      sharding: where it lies; None: on the default device, free to be moved by JAX.
      scheme: how it is stored; None: as it is.
      observe: is shown every part that is read, once, before it is quantised.

    Raises:
      InputError: if the reader does, if the sharding does not divide the shape, or a quantised
        weight is not cut between blocks.
    """
    shape = reader.shape
    if scheme is not None:
        check_divides(name, shape[-2])
    rows_per_entry = (1,) if scheme is None else scheme.entries
    # For every stored array (one, or codes and scales) the piece on each device.
    stored: list[dict[Any, jax.Array]] = [{} for _ in rows_per_entry]
    for index, devices in _slices(name, shape, sharding, scheme).items():
        for device, pieces in _read_slice(
            index, devices, reader, dtype, rows_per_entry, scheme, observe
        ).items():
            for arrays, piece in zip(stored, pieces, strict=True):
                arrays[device] = piece
    joined = [
        arrays[None]
        if sharding is None
        else jax.make_array_from_single_device_arrays(
            _divided_shape(shape, rows), sharding, list(arrays.values())
        )
        for arrays, rows in zip(stored, rows_per_entry, strict=True)
    ]
    return joined[0] if scheme is None else scheme.build(*joined)


def _slices(
    name: str, shape: tuple[int, ...], sharding: Sharding | None, scheme: Scheme | None
) -> dict[tuple[tuple[int, int], ...], list[Any]]:
    """By slice of the weight, as (start, stop) of each axis, the devices of this host with it."""
    if sharding is None:
        return {tuple((0, size) for size in shape): [None]}
    try:
        by_device = sharding.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise InputError(
            f"weight {name!r} of shape {list(shape)} cannot be sharded as {sharding}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    found: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in by_device.items():
        bounds = tuple(
            axis.indices(size)[:2] for axis, size in zip(index or (), shape, strict=True)
        )
        if scheme is not None and any(edge % BLOCK for edge in bounds[-2]):
            raise InputError(
                f"{name} of shape {list(shape)} is cut along d_in at {list(bounds[-2])}: a slice "
                f"of a quantised weight must begin and end at a multiple of {BLOCK}"
            )
        found.setdefault(bounds, []).append(device)
    return found


def _read_slice(
    bounds: tuple[tuple[int, int], ...],
    devices: Sequence[Any],
    reader: Reader,
    dtype: np.dtype,
    rows_per_entry: Sequence[int],
    scheme: Scheme | None,
    observe: Callable[[Index, np.ndarray], None] | None,
) -> dict[Any, list[jax.Array]]:
    """Reads one slice of a weight onto the devices that hold it: its stored arrays by device."""
    size = tuple(stop - start for start, stop in bounds)
    held: dict[Any, list[jax.Array]] = {}
    whole = True
    # Into a bfloat16 array on a CPU, XLA writes a part by going through all of the array. There the
    # bits are written as integers, and called bfloat16 in the end.
    bits = scheme is None and dtype == jnp.bfloat16 and all(map(_is_cpu, devices))
    for local in parts(size, reader.long_axis):
        index = tuple(
            slice(start + axis.start, start + axis.stop)
            for axis, (start, _) in zip(local, bounds, strict=True)
        )
        part = reader.read(index, dtype if scheme is None else np.dtype(np.float32))
        if observe is not None:
            observe(index, part)
        whole = part.shape == size
        if bits and not whole:
            part = part.view(np.uint16)
        for device in devices:
            moved = jnp.asarray(part) if device is None else jax.device_put(part, device)
            pieces = [moved] if scheme is None else scheme.encode(moved)
            if whole:
                held[device] = list(pieces)
                continue
            if device not in held:
                held[device] = [
                    jnp.zeros(_divided_shape(size, rows), piece.dtype, device=device)
                    for piece, rows in zip(pieces, rows_per_entry, strict=True)
                ]
            held[device] = [
                _write(array, piece, _divided(local, rows))
                for array, piece, rows in zip(held[device], pieces, rows_per_entry, strict=True)
            ]
        # Otherwise parts pile up before a device that is slower than the file.
        jax.block_until_ready(list(held.values()))
    if bits and not whole:
        return {device: [_from_bits(array, device)] for device, (array,) in held.items()}
    return held


def _divided(index: Index, rows: int) -> tuple[int, ...]:
    """Where a part begins in an array that stores `rows` rows of the weight as one."""
    start = [axis.start for axis in index]
    if rows > 1:
        start[-2] //= rows
    return tuple(start)


def _divided_shape(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    return shape if rows == 1 else (*shape[:-2], shape[-2] // rows, shape[-1])


def _is_cpu(device: Any) -> bool:
    return (jax.default_backend() if device is None else device.platform) == "cpu"


def _from_bits(array: jax.Array, device: Any) -> jax.Array:
    """The same memory as bfloat16."""
    return jax.device_put(np.asarray(array).view(jnp.bfloat16), device, may_alias=True)


@functools.partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, part: jax.Array, start: tuple[int, ...]) -> jax.Array:
    """Writes `part` into the very memory of `array`."""
    return jax.lax.dynamic_update_slice(array, part, start)
