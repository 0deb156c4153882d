"""Where every array of a run lies on its mesh, by rule from its name and its shape.

* Weights of the base: `mos_jax/models/sharding.py`.
* What an adapter trains, its optimiser's state, its index tables and frozen arrays: on every
device, since they are small; an array above a threshold is divided over `fsdp` along its
largest dimension that divides.
* A batch: its rows over `data` and `fsdp`.

Where several processes share a mesh (`hosts.py`), each gives its own devices their parts; no whole
array is sent from one to another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mos_jax.errors import InputError
from mos_jax.models.config import SITES
from mos_jax.models.sharding import DATA, FSDP, ROWS, Wanted, fit_spec, weight_spec


def array_spec(
    shape: Sequence[int], itemsize: int, sizes: Mapping[str, int], shard_above: int
) -> PartitionSpec:
    """The spec of an array that belongs to an adapter or its optimiser.

    Args:
      shape: of the array.
      itemsize: bytes of an entry.
      sizes: of the mesh's axes.
      shard_above: bytes up to which an array is on every device.
    """
    wanted: list[str | None] = [None] * len(shape)
    if math.prod(shape) * itemsize > shard_above:
        dividing = [axis for axis, size in enumerate(shape) if size % sizes[FSDP] == 0]
        if dividing:
            wanted[max(dividing, key=lambda axis: shape[axis])] = FSDP
    return fit_spec(shape, tuple(wanted), sizes)


def batch_axes(ndim: int) -> Wanted:
    """What divides an array of a batch, [B, ...] of two or, with accumulation, three axes."""
    return (*(None,) * (ndim - 2), ROWS, None)


def check_rows(rows: int, sizes: Mapping[str, int]) -> None:
    """Raises InputError unless the devices can share the rows of a batch evenly."""
    shares = sizes[DATA] * sizes[FSDP]
    if rows % shares:
        raise InputError(
            f"data.batch_size={rows} rows cannot be divided among mesh.data * mesh.fsdp = "
            f"{sizes[DATA]} * {sizes[FSDP]} = {shares}; make it a multiple of {shares}"
        )


@dataclasses.dataclass(frozen=True)
class Placement:
    """The rules applied to one mesh.

    Attributes:
      mesh: of `make_mesh`.
      shard_above: bytes up to which an array of the adapter or its optimiser is on every device.
    """

    mesh: Mesh
    shard_above: int

    def weights(self, quantize: str | None = None) -> WeightShardings:
        """Where a base's weights lie, for `load_base`."""
        return WeightShardings(self.mesh, quantize is not None)

    def shardings(self, tree: Any) -> Any:
        """Where the arrays of an adapter or an optimiser lie: a tree of shardings."""

        def of(leaf: Any) -> NamedSharding:
            # Keys of JAX's own dtype have the shape of one entry each.
            itemsize = leaf.dtype.itemsize
            spec = array_spec(leaf.shape, itemsize, self.mesh.shape, self.shard_above)
            return NamedSharding(self.mesh, spec)

        return jax.tree.map(of, tree)

    def place(self, tree: Any) -> Any:
        """Moves the arrays of an adapter or an optimiser, whole in every process, onto the mesh."""
        shardings = self.shardings(tree)
        if jax.process_count() == 1:
            return jax.device_put(tree, shardings)
        return jax.tree.map(_take_part, tree, shardings)

    def whole(self, tree: Any) -> Any:
        """The arrays on every device, so that each process can read them; all call it together."""
        if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
            return tree
        return jax.jit(lambda x: x, out_shardings=self.everywhere)(tree)

    def batch_shardings(self, batch: Any) -> Any:
        """Where a batch lies: a tree of shardings."""
        return jax.tree.map(
            lambda array: NamedSharding(
                self.mesh, fit_spec(array.shape, batch_axes(array.ndim), self.mesh.shape)
            ),
            batch,
        )

    def own_rows(self, rows: int) -> np.ndarray:
        """Which of the `rows` rows of a batch the devices of this process hold, in order."""
        spec = fit_spec((rows,), (ROWS,), self.mesh.shape)
        parts = NamedSharding(self.mesh, spec).addressable_devices_indices_map((rows,))
        return np.unique([np.arange(rows)[index] for index in parts.values()])

    def place_batch(self, batch: Any, rows: int | None = None) -> Any:
        """Gives every device its rows of a batch of host arrays.

        Args:
          batch: arrays [..., B, n].
          rows: B, where `batch` holds only `own_rows` of them; None: it holds all.
        """
        if rows is None:
            if jax.process_count() == 1:
                return jax.device_put(batch, self.batch_shardings(batch))
            return jax.tree.map(_take_part, batch, self.batch_shardings(batch))
        own = self.own_rows(rows)

        def joined(array: np.ndarray) -> jax.Array:
            shape = (*array.shape[:-2], rows, array.shape[-1])
            spec = fit_spec(shape, batch_axes(array.ndim), self.mesh.shape)

            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # only of arrays without axes
                start, stop, _ = index[-2].indices(rows)
                first = np.searchsorted(own, start)
                here = slice(first, first + stop - start)
                return array[(*index[:-2], here, index[-1])]

            return jax.make_array_from_callback(shape, NamedSharding(self.mesh, spec), part)

        return jax.tree.map(joined, batch)

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())


def _take_part(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """The array of which this process gives its devices their parts of `leaf`, whole here."""
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        data = _take_part(jax.random.key_data(leaf), everywhere)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    held = np.asarray(leaf)
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])


@dataclasses.dataclass(frozen=True)
class WeightShardings:
    """Says for the name and the shape of a weight where it lies; see `weight_spec`.

    Attributes:
      mesh: of devices.
      quantized: whether the weights of the sites are.
    """

    mesh: Mesh
    quantized: bool

    def __call__(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of one weight."""
        quantized = self.quantized and name.removeprefix("blocks/") in SITES
        return NamedSharding(self.mesh, weight_spec(name, shape, self.mesh.shape, quantized))
