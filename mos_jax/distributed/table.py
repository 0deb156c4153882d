"""The table of a dry run: what lies where, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from rich import box
from rich.console import Console
from rich.table import Table

from mos_jax.distributed.partition import array_spec, batch_axes
from mos_jax.models.config import SITES, DecoderConfig
from mos_jax.models.layout import weight_dtype
from mos_jax.models.quantized import find_scheme
from mos_jax.models.sharding import Wanted, fit_spec, weight_axes, weight_spec


@dataclasses.dataclass(frozen=True)
class Line:
    """One array.

    Attributes:
      group: what it belongs to.
      name: of the array.
      shape: of the whole.
      dtype: how it is stored: a dtype, or a scheme of quantisation.
      spec: what divides each dimension.
      total: bytes of the whole.
      held: bytes on each device.
      whole: axes of the mesh that the rule asks for and that do not divide the shape.
    """

    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    total: int
    held: int
    whole: tuple[str, ...] = ()

    def spec_in_words(self) -> str:
        """The spec, and which axes could not be used."""
        parts = ["-" if e is None else e if isinstance(e, str) else "*".join(e) for e in self.spec]
        words = ", ".join(parts) if any(self.spec) else "whole"
        return words + "".join(f"; {axis} does not divide it" for axis in self.whole)


def base_lines(
    config: DecoderConfig, dtype: str, quantize: str | None, sizes: Mapping[str, int]
) -> list[Line]:
    """The weights of a base.

    Args:
      config: its architecture.
      dtype: of its weights.
      quantize: how the weights of the sites are stored; None: in `dtype`.
      sizes: of the mesh's axes.
    """
    scheme, lines = find_scheme(quantize), []
    for name, shape in config.weight_shapes().items():
        codes = scheme if name.removeprefix("blocks/") in SITES else None
        spec = weight_spec(name, shape, sizes, codes is not None)
        plain = weight_dtype(name, dtype)
        bits = 8 * plain.itemsize if codes is None else codes.bits
        stored = plain.name if codes is None else codes.name
        total = round(math.prod(shape) * bits / 8)
        wanted = weight_axes(name, len(shape))
        lines.append(_line("base", name, shape, stored, spec, total, sizes, wanted))
    return lines


def array_lines(group: str, tree: Any, sizes: Mapping[str, int], shard_above: int) -> list[Line]:
    """The arrays, or shape structs, of an adapter or an optimiser."""

    def rule(array: Any) -> PartitionSpec:
        return array_spec(array.shape, array.dtype.itemsize, sizes, shard_above)

    return [
        _array_line(group, path, array, rule(array), sizes)
        for path, array in jax.tree.leaves_with_path(tree)
    ]


def batch_lines(batch: Any, sizes: Mapping[str, int]) -> list[Line]:
    """The arrays of a batch."""
    return [
        _array_line(
            "batch", path, array, fit_spec(array.shape, batch_axes(array.ndim), sizes), sizes
        )
        for path, array in jax.tree.leaves_with_path(batch)
    ]


def _array_line(
    group: str, path: Any, array: Any, spec: PartitionSpec, sizes: Mapping[str, int]
) -> Line:
    # An nnx.Variable adds its field to the path of its array.
    name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
    total = math.prod(array.shape) * array.dtype.itemsize
    stored = str(jnp.dtype(array.dtype)) if hasattr(array.dtype, "kind") else str(array.dtype)
    return _line(group, name, array.shape, stored, spec, total, sizes)


def _line(
    group: str,
    name: str,
    shape: tuple[int, ...],
    stored: str,
    spec: PartitionSpec,
    total: int,
    sizes: Mapping[str, int],
    wanted: Wanted = (),
) -> Line:
    used = _axes(spec)
    held = total // math.prod(sizes[axis] for axis in used)
    whole = tuple(axis for axis in _axes(wanted) if sizes[axis] > 1 and axis not in used)
    return Line(group, name, tuple(shape), stored, spec, total, held, whole)


def _axes(entries: Iterable[Any]) -> list[str]:
    named = [(e,) if isinstance(e, str) else e for e in entries if e is not None]
    return [axis for axes in named for axis in axes]


def print_lines(lines: list[Line], sizes: Mapping[str, int], console: Console) -> None:
    """Prints the lines with the totals of each group."""
    mesh = ", ".join(f"{name} {size}" for name, size in sizes.items())
    # Narrow, and names folded rather than cut: they are what one looks for.
    table = Table(title=f"mesh: {mesh}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("array", "shape", "stored as", "divided by", "MiB", "a device"):
        table.add_column(heading, overflow="fold")
    for column in table.columns[-2:]:
        column.justify = "right"
    for group in dict.fromkeys(line.group for line in lines):
        members = [line for line in lines if line.group == group]
        table.add_row(f"{group}:")
        for line in members:
            table.add_row(
                f" {line.name}",
                " x ".join(map(str, line.shape)) or "1",
                line.dtype,
                line.spec_in_words(),
                _mib(line.total),
                _mib(line.held),
            )
        table.add_section()
        table.add_row(f"all of {group}", "", "", "", *_totals(members))
        table.add_section()
    table.add_row("all", "", "", "", *_totals(lines))
    console.print(table)


def _totals(lines: list[Line]) -> tuple[str, str]:
    return _mib(sum(line.total for line in lines)), _mib(sum(line.held for line in lines))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.3f}"
