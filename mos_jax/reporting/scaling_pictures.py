"""Pictures of what a training step costs as one of its sizes grows: `experiments/scaling.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mos_jax.errors import InputError
from mos_jax.files import write_file
from mos_jax.reporting.style import FAINT, PALETTE, arm_styles, new_figure, png_bytes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
LABELS = {
    "rank": "active rank r",
    "equivalent_rank": "equivalent rank e",
    "shards_per_vector": "shards per vector l",
    "num_layers": "blocks L",
    "width": "tokens of a row",
    "rows": "rows of a batch",
}
Points = dict[str, dict[int, Mapping[str, Any]]]


def points_of(found: Mapping[str, Any], part: str) -> dict[str, Points]:
    """The entries of a part: by axis, by place of assembly, by value, the costs in rising order."""
    by_axis: dict[str, Points] = {}
    for key, facts in found.items():
        head, *rest = key.split("/")
        if head == part:
            axis, value, where = rest
            by_axis.setdefault(axis, {}).setdefault(where, {})[int(value)] = facts
    return {
        axis: {where: dict(sorted(values.items())) for where, values in places.items()}
        for axis, places in by_axis.items()
    }


@styled
def scaling_picture(found: Mapping[str, Any]) -> Figure:
    """Time, memory and operations of a step against each of its sizes, the others held.

    Raises:
      InputError: if nothing was counted.
    """
    counts = points_of(found, "counts")
    axes_names = [name for name in LABELS if name in counts]
    if not axes_names:
        raise InputError("nothing was counted; run experiments/scaling.py with --parts=counts")
    styles = arm_styles(("before", "inside"))
    # Times lead, where any were measured.
    timed = any(f"seconds/{name}" in found for name in axes_names)
    figure = new_figure(2.35 * len(axes_names) + 0.4, 7.2 if timed else 4.8)
    panels = figure.subplots(2 + timed, len(axes_names), squeeze=False)
    memories, operations = panels[-2:]
    for column, name in enumerate(axes_names):
        if timed:
            _seconds(panels[0][column], found.get(f"seconds/{name}"))
        for where, points in counts[name].items():
            style = styles[where]
            look = {"color": style.colour, "marker": style.marker, "linestyle": style.dash}
            values = list(points)
            memory = [facts["temporaries"] / MIB for facts in points.values()]
            memories[column].plot(values, memory, label=where, ms=4.5, **look)
            flops = [facts["flops"] / 1e9 for facts in points.values()]
            operations[column].plot(values, flops, ms=4.5, **look)
        for row in panels:
            _from_zero(row[column], list(next(iter(counts[name].values()))))
        operations[column].set_xlabel(LABELS[name])
    if timed:
        panels[0][0].set_ylabel("processor time of a step,\nin units of the first point")
    memories[0].set_ylabel("temporaries, MiB")
    operations[0].set_ylabel("GFLOP of a step")
    memories[0].legend(frameon=False, fontsize=8, title="factors assembled", title_fontsize=8)
    return figure


def _seconds(axes: Axes, facts: Mapping[str, Any] | None) -> None:
    """Ratios within a round to the first value of the axis: median, and all rounds as dots."""
    if facts is None:
        axes.text(0.5, 0.5, "not measured", ha="center", color=FAINT, transform=axes.transAxes)
        return
    by_value = {int(v): run["processor_seconds"] for v, run in facts.items() if v.isdigit()}
    first = by_value[min(by_value)]
    medians = {}
    for value, seconds in sorted(by_value.items()):
        ratios = [a / b for a, b in zip(seconds, first, strict=True)]
        axes.plot([value] * len(ratios), ratios, ".", color=FAINT, ms=4)
        medians[value] = statistics.median(ratios)
    axes.plot(list(medians), list(medians.values()), "o-", color=PALETTE[2], ms=4.5)


def _from_zero(axes: Axes, values: list[int]) -> None:
    axes.set_ylim(0, 1.08 * axes.dataLim.y1 if axes.has_data() else 1)
    axes.set_xlim(0, max(values) * 1.06)
    axes.set_xticks(values)


@styled
def devices_picture(found: Mapping[str, Any]) -> Figure:
    """Bytes on each device, and bytes and number of collectives, against the number of devices.

    Raises:
      InputError: if nothing was counted.
    """
    devices = points_of(found, "devices")
    if not devices:
        raise InputError("nothing was counted; run experiments/scaling.py with --parts=devices")
    figure = new_figure(10.5, 3.5)
    panels = figure.subplots(1, 3)
    styles = arm_styles(tuple(devices))
    for name, places in devices.items():
        points = next(iter(places.values()))
        style, counts = styles[name], list(points)
        look = {"color": style.colour, "marker": style.marker, "linestyle": style.dash, "ms": 4.5}
        held = [(f["arguments"] + f["temporaries"]) / MIB for f in points.values()]
        received = [f["received"] / MIB for f in points.values()]
        number = [sum(f["collectives"].values()) for f in points.values()]
        for axes, numbers in zip(panels, (held, received, number), strict=True):
            axes.plot(counts, numbers, label=name, **look)
    titles = (
        "arguments and temporaries,\nMiB on each device",
        "received from others in a step,\nMiB on each device",
        "collectives of a step",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("devices")
        _from_zero(axes, [1, 2, 4, 8])
        axes.set_xticks([1, 2, 4, 8])
    panels[0].legend(frameon=False, fontsize=8, title="axis of the mesh", title_fontsize=8)
    return figure


def write_pictures(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the pictures of what was found into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part, draw in (("counts", scaling_picture), ("devices", devices_picture)):
        if points_of(found, part):
            path = folder / f"scaling_{part}.png"
            write_file(path, png_bytes(draw(found)))
            written.append(path)
    return written
