"""Pictures over steps and over learning rates.

Every function returns a figure; `style.png_bytes` makes a PNG of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mos_jax.reporting.style import (
    FAINT,
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


# Arms whose bands over seeds can be told apart in one axes.
BANDS = 4


@dataclasses.dataclass(frozen=True)
class Curve:
    """A quantity of an arm over steps, over its seeds.

    Attributes:
      steps: int [n], ascending.
      values: fp64 [seeds, n].
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Over seeds, fp64 [n]."""
        return self.values.mean(axis=0)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One axes of `over_steps`.

    Attributes:
      title: above it.
      y_label: of its axis.
      curves: by arm.
      guess: height of a line across and its words, or None.
      from_zero: whether the y axis begins at 0.
    """

    title: str
    y_label: str
    curves: Mapping[str, Curve]
    guess: tuple[float, str] | None = None
    from_zero: bool = False


@dataclasses.dataclass(frozen=True)
class RateTrial:
    """A run of the tuning stage.

    Attributes:
      rate: its learning rate.
      value: what was reached, or None for a run that failed.
    """

    rate: float
    value: float | None


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over the last `width` entries (fewer at the start) of the last axis."""
    sums = np.cumsum(np.insert(values.astype(np.float64), 0, 0.0, axis=-1), axis=-1)
    ends = np.arange(1, values.shape[-1] + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[..., ends] - sums[..., starts]) / (ends - starts)


@styled
def over_steps(panels: Sequence[Panel], styles: Mapping[str, ArmStyle]) -> Figure:
    """Curves over steps: a line for the mean over seeds, and for few arms a band over them.

    The band reaches from the lowest to the highest seed; with more than `BANDS` arms bands would
    hide the lines, and `one_by_one` shows them.

    Args:
      panels: side by side, at least one; arms without a curve are left out.
      styles: by arm.
    """
    figure = new_figure(max(8.4, 5.4 * len(panels)), 4.6)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        longest = 1
        for arm, curve in panel.curves.items():
            style = styles[arm]
            longest = max(longest, int(curve.steps[-1]))
            few = len(curve.steps) <= 12
            axes.plot(
                curve.steps,
                curve.mean,
                color=style.colour,
                linestyle=style.dash,
                linewidth=1.6,
                marker=style.marker if few else None,
                markersize=4,
                label=arm,
            )
            if len(panel.curves) <= BANDS:
                _band(axes, curve, style)
        axes.set_title(panel.title)
        axes.set_xlabel("step")
        axes.set_ylabel(panel.y_label)
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
        share = min(0.45, (text_width(list(panel.curves)) + 24) / 330)
        axes.set_xlim(0, longest / (1 - share))
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= longest])
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        if panel.guess is not None:
            reference_line(axes, *panel.guess)
    freeze_layout(figure)
    for axes, panel in zip(figure.axes, panels, strict=True):
        _label_ends(axes, panel, styles)
    return figure


def _band(axes: Axes, curve: Curve, style: ArmStyle) -> None:
    if len(curve.values) > 1:
        low, high = curve.values.min(axis=0), curve.values.max(axis=0)
        axes.fill_between(curve.steps, low, high, color=style.colour, alpha=0.2, lw=0)


@styled
def one_by_one(panel: Panel, styles: Mapping[str, ArmStyle]) -> Figure:
    """Each arm's curve over steps in an axes of its own, with its band, before the others."""
    figure, grid = _grid(len(panel.curves))
    for axes, (arm, curve) in zip(grid, panel.curves.items(), strict=True):
        for other in panel.curves.values():
            if other is not curve:
                axes.plot(other.steps, other.mean, color=PALE, linewidth=0.9, zorder=1)
        style = styles[arm]
        _band(axes, curve, style)
        axes.plot(curve.steps, curve.mean, color=style.colour, linewidth=1.6, zorder=3, label=arm)
        if panel.guess is not None:
            axes.axhline(panel.guess[0], color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.set_title(arm, fontsize=9)
        axes.set_xlim(left=0)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        axes.set_axisbelow(True)
    figure.supylabel(panel.y_label, fontsize=9.5)
    figure.supxlabel("step", fontsize=9.5)
    return figure


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes that share their limits, up to five in a row."""
    columns = min(5, count)
    rows = math.ceil(count / columns)
    figure = new_figure(max(8.4, 1.9 * columns), 0.8 + 1.9 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    for place, axes in enumerate(grid[:count]):
        # The last axes of a column has the numbers, also where the row below it is not full.
        axes.tick_params(axis="x", labelbottom=place + columns >= count)
    return figure, grid[:count]


def _label_ends(axes: Axes, panel: Panel, styles: Mapping[str, ArmStyle]) -> None:
    ends = [
        (float(curve.steps[-1]), float(curve.mean[-1]), arm, styles[arm].colour)
        for arm, curve in panel.curves.items()
    ]
    label_column(axes, ends)


def rate_text(rate: float) -> str:
    """0.003 as "3e-3"."""
    digits, _, power = f"{rate:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


@styled
def over_rates(
    trials: Mapping[str, Sequence[RateTrial]],
    chosen: Mapping[str, float],
    styles: Mapping[str, ArmStyle],
    y_label: str,
) -> Figure:
    """What each arm reached on validation data against the learning rate, an axes for each arm.

    The line joins means over tuning seeds, points are runs; all other arms' lines are pale behind
    it, the chosen rate has a ring, and a rate at which a run failed has a cross at the foot.

    Args:
      trials: by arm, at least one arm with one trial.
      chosen: by arm, the rate of the final runs.
      styles: by arm.
      y_label: what was reached.
    """
    figure, grid = _grid(len(trials))
    lines = {arm: _means(runs) for arm, runs in trials.items()}
    rates = sorted({trial.rate for runs in trials.values() for trial in runs})
    for axes, (arm, runs) in zip(grid, trials.items(), strict=True):
        style = styles[arm]
        for other, (xs, ys) in lines.items():
            if other != arm:
                axes.plot(xs, ys, color=PALE, linewidth=0.9, zorder=1)
        xs, ys = lines[arm]
        axes.plot(xs, ys, color=style.colour, linewidth=1.6, zorder=3, label=arm)
        good = [(trial.rate, trial.value) for trial in runs if trial.value is not None]
        axes.plot(
            [x for x, _ in good],
            [y for _, y in good],
            color=style.colour,
            marker="o",
            markersize=3.5,
            linestyle="none",
            zorder=4,
        )
        for trial in runs:
            if trial.value is None:
                axes.plot(
                    [trial.rate],
                    [0.03],
                    marker="x",
                    color="#5A5A5A",
                    transform=axes.get_xaxis_transform(),
                    label="failed",
                )
        picked = chosen.get(arm)
        if picked in xs:
            axes.plot(
                [picked],
                [ys[xs.index(picked)]],
                marker="o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor="#222222",
                markeredgewidth=1.3,
                linestyle="none",
                zorder=5,
                label="chosen",
            )
        axes.set_title(arm, fontsize=9)
    _rate_axis(grid, rates)
    figure.supylabel(y_label, fontsize=9.5)
    figure.supxlabel("learning rate", fontsize=9.5)
    return figure


def _means(runs: Sequence[RateTrial]) -> tuple[list[float], list[float]]:
    by_rate: dict[float, list[float]] = {}
    for trial in runs:
        if trial.value is not None:
            by_rate.setdefault(trial.rate, []).append(trial.value)
    xs = sorted(by_rate)
    return xs, [float(np.mean(by_rate[x])) for x in xs]


def _rate_axis(grid: Sequence[Axes], rates: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    # Labels of neighbouring rates would touch when there are many.
    shown = rates if len(rates) <= 4 else rates[:: math.ceil(len(rates) / 4)]
    for axes in grid:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(shown, [rate_text(rate) for rate in shown])
        axes.set_xlim(min(rates) / 1.6, max(rates) * 1.6)
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        axes.set_axisbelow(True)
