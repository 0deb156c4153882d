"""The one mesh of a run, from sizes to devices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from mos_jax.errors import InputError
from mos_jax.models.sharding import AXES, DATA, FSDP, TENSOR


def resolve_sizes(data: int, fsdp: int, tensor: int, devices: int) -> dict[str, int]:
    """The size of each axis on `devices` devices.

    Args:
      data: copies of the base, each with its share of a batch's rows.
      fsdp: devices that divide a base's weights and its rows between them.
      tensor: devices that divide the work on each token.
      devices: how many there are; one of the sizes may be -1, what the others leave of them.

    Returns:
      By name, in the order of `AXES`. All are 1 where all of them were asked for as 1, however
      many devices there are: then one device does everything.

    Raises:
      InputError: for a size that is neither positive nor -1, more than one -1, or sizes whose
        product is not the number of devices.
    """
    sizes = {DATA: data, FSDP: fsdp, TENSOR: tensor}
    for name, size in sizes.items():
        if size == 0 or size < -1:
            raise InputError(f"mesh.{name} must be 1 or more, or -1 for what is left, got {size}")
    asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise InputError(f"only one axis of the mesh may be -1, what is left; got {asked}")
    product = math.prod(size for size in sizes.values() if size > 0)
    if free:
        if devices % product:
            raise InputError(
                f"{asked}: the other axes need a multiple of {product} devices, there are "
                f"{devices}; choose sizes whose product divides {devices}"
            )
        sizes[free[0]] = devices // product
    elif product not in (1, devices):
        raise InputError(
            f"{asked} need {product} devices, there are {devices}; choose sizes whose product is "
            f"{devices}, or make one of them -1"
        )
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh of these sizes, or None for one device, which needs none.

    Args:
      sizes: of `resolve_sizes`.
      devices: as many as the product of the sizes; default: all that JAX has.
    """
    if math.prod(sizes.values()) == 1:
        return None
    shape = tuple(sizes[name] for name in AXES)
    # Auto: specs say where arrays lie, and the compiler what follows for the rest.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
