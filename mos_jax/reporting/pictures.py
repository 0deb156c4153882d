"""Pictures of finished arms: accuracy against size, and differences to the baseline.

Every function returns a figure; `style.png_bytes` makes a PNG of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mos_jax.reporting.style import (
    FAINT,
    INK,
    PALE,
    ArmStyle,
    freeze_layout,
    label_column,
    new_figure,
    reference_line,
    styled,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Arms whose sizes differ by less than this share stand side by side; in points.
SAME_SIZE, SIDE_STEP = 0.03, 6.0
# Decades between sizes whose labels stand in one column.
NEAR = 0.12
# Of a picture, inches.
WIDTH = 8.4


@dataclasses.dataclass(frozen=True)
class Point:
    """An arm in a picture of accuracy against size.

    Attributes:
      arm: its name.
      size: on the x axis, above 0.
      mean: accuracy.
      low: lower end of its interval.
      high: upper end.
      note: added to the label.
    """

    arm: str
    size: float
    mean: float
    low: float
    high: float
    note: str = ""

    @property
    def label(self) -> str:
        """What is written beside the point."""
        return f"{self.arm}, {self.note}" if self.note else self.arm


@dataclasses.dataclass(frozen=True)
class Bar:
    """An arm's difference to the baseline; without numbers when none was computed.

    Attributes:
      arm: its name.
      mean: of the difference, or None.
      low: lower end of its interval.
      high: upper end.
      note: shown beside it, or why there is no difference.
    """

    arm: str
    mean: float | None
    low: float = math.nan
    high: float = math.nan
    note: str = ""


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: none is at most as large and more accurate."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size, -p.mean)):
        if not front or point.mean > front[-1].mean:
            front.append(point)
    return front


@styled
def accuracy_against_size(
    points: Sequence[Point],
    styles: Mapping[str, ArmStyle],
    x_label: str,
    y_label: str,
    guess: tuple[float, str] | None = None,
) -> Figure:
    """Accuracy against a size on a logarithmic axis, with intervals and the Pareto front.

    Args:
      points: of the arms, at least one.
      styles: by arm.
      x_label: what the size is.
      y_label: what the accuracy is.
      guess: height of a line across and its words, such as the commonest answer's rate.
    """
    figure = new_figure(WIDTH, max(4.6, 2.4 + 0.2 * len(points)))
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlim(*_limits(points))
    heights = [end for point in points for end in (point.low, point.high)]
    if guess is not None:
        heights.append(guess[0])
    margin = 0.06 * max(max(heights) - min(heights), 0.05)
    axes.set_ylim(min(heights) - margin, max(heights) + margin)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    _plain_log_ticks(axes)
    front = pareto_front(points)
    xs = [point.size for point in front] + [max(point.size for point in points)]
    ys = [point.mean for point in front] + [front[-1].mean]
    (line,) = axes.step(
        xs, ys, where="post", color=FAINT, linewidth=1.1, zorder=2, label="Pareto front"
    )
    # Above the axes, where no point and no label can be.
    axes.legend(
        [line],
        ["most accurate of all up to a size (Pareto front)"],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.2,
        frameon=False,
        fontsize=8,
        labelcolor="#5A5A5A",
    )
    if guess is not None:
        reference_line(axes, *guess)
    freeze_layout(figure)
    labels: list[list[tuple[float, float, str, str]]] = []
    for cluster in _clusters(points):
        labels.append([])
        for point, x in _side_by_side(axes, cluster):
            style = styles[point.arm]
            axes.errorbar(
                [x],
                [point.mean],
                yerr=[[point.mean - point.low], [point.high - point.mean]],
                color=style.colour,
                marker=style.marker,
                markersize=6,
                markeredgecolor="white",
                markeredgewidth=0.6,
                elinewidth=1.3,
                capsize=2.5,
                zorder=3,
                label=point.arm,
            )
            labels[-1].append((x, point.mean, point.label, style.colour))
    for place, column in enumerate(labels):
        # The first cluster has room kept on its left, all others on their right.
        alone = place == 0 and len(labels) > 1
        label_column(axes, column, side="left" if alone else "right")
    return figure


def _limits(points: Sequence[Point]) -> tuple[float, float]:
    """Ends of the x axis that leave room for the labels beside the first and the last cluster."""
    clusters = _clusters(points)
    before = text_width([p.label for p in clusters[0]]) if len(clusters) > 1 else 0
    after = text_width([p.label for p in clusters[-1]])
    before, after = ((part + 40) / (72 * WIDTH - 60) for part in (before, after))
    inside = max(0.2, 1 - before - after)
    first, last = (math.log10(end(p.size for p in points)) for end in (min, max))
    # At least half a decade is shown, or ticks would tell equal sizes apart.
    pad = max(0.0, 0.5 - (last - first)) / 2
    first, last = first - pad, last + pad
    decade = (last - first) / inside
    return 10 ** (first - decade * before), 10 ** (last + decade * after)


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if math.log10(high / low) < 2.5 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_number(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def short_number(value: float) -> str:
    """20000 as "20k", 1500000 as "1.5M"."""
    for unit, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{word}"
    return f"{value:.4g}"


def _clusters(points: Sequence[Point]) -> list[list[Point]]:
    """Arms so near each other in size that their labels stand in one column."""
    found: list[list[Point]] = []
    last = -math.inf
    for point in sorted(points, key=lambda p: p.size):
        if math.log10(point.size) - last > NEAR:
            found.append([])
        found[-1].append(point)
        last = math.log10(point.size)
    return found


def _side_by_side(axes: Axes, cluster: Sequence[Point]) -> list[tuple[Point, float]]:
    """Points of a cluster with the x they are drawn at: equal sizes a few points apart."""
    groups: list[list[Point]] = []
    for point in cluster:
        if groups and point.size <= groups[-1][0].size * (1 + SAME_SIZE):
            groups[-1].append(point)
        else:
            groups.append([point])
    placed = []
    step = SIDE_STEP * axes.figure.dpi / 72
    for group in groups:
        for i, point in enumerate(group):
            x, y = axes.transData.transform((point.size, point.mean))
            moved = x + step * (i - (len(group) - 1) / 2)
            placed.append((point, float(axes.transData.inverted().transform((moved, y))[0])))
    return placed


@styled
def difference_bars(
    bars: Sequence[Bar],
    styles: Mapping[str, ArmStyle],
    x_label: str,
    margin: float | None = None,
) -> Figure:
    """Differences to the baseline with their intervals, one bar an arm.

    Args:
      bars: in the order they are shown, at least one.
      styles: by arm.
      x_label: says which baseline.
      margin: of non-inferiority, above 0; drawn at -margin.
    """
    figure = new_figure(WIDTH, 1.3 + 0.42 * len(bars))
    axes = figure.subplots()
    ends = [0.0] + [e for bar in bars if bar.mean is not None for e in (bar.low, bar.high)]
    ends += [] if margin is None else [-margin]
    room = 0.08 * max(max(ends) - min(ends), 0.02)
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.axvline(0, color=INK, linewidth=1, zorder=3)
    if margin is not None:
        axes.axvline(-margin, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "margin",
            (-margin, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            color="#5A5A5A",
            fontsize=8,
        )
    for row, bar in enumerate(bars):
        if bar.mean is not None:
            axes.barh(row, bar.mean, height=0.55, color=styles[bar.arm].colour, alpha=0.45)
            axes.errorbar(
                [bar.mean],
                [row],
                xerr=[[bar.mean - bar.low], [bar.high - bar.mean]],
                color=INK,
                linewidth=1.3,
                capsize=3,
                zorder=4,
            )
        axes.annotate(
            bar.note,
            (1.01, row),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=INK if bar.mean is not None else "#5A5A5A",
        )
    axes.set_yticks(range(len(bars)), [bar.arm for bar in bars])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label)
    return figure
