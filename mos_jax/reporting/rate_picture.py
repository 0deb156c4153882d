"""The picture of a learning-rate range test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mos_jax.reporting.style import FAINT, INK, PALE, PALETTE, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def range_test_picture(found: Mapping[str, Any], title: str) -> Figure:
    """Loss against learning rate, with the rates that the suggestion rests on.

    Args:
      found: what `mos_jax.training.lr_find.find_rate` returned.
      title: of the picture.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    rates, smoothed = found["rates"], found["smoothed"]
    axes.plot(rates, found["losses"], ".", color=FAINT, markersize=4, label="loss of each batch")
    axes.plot(rates, smoothed, color=PALETTE[0], linewidth=2, label="smoothed")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.0e}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss, nats per target token")
    axes.set_title(title)
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    # What comes after the curve has turned up would press the rest of it flat.
    low, high = min([*smoothed, *found["losses"]]), max(smoothed[0], found["losses"][0])
    axes.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))
    if found["suggestion"] is not None:
        found = found["suggestion"]
        bottom = f"bottom, {found['settled']:.1e} to {found['edge']:.1e}"
        axes.axvspan(found["settled"], found["edge"], color=PALETTE[5], alpha=0.25, label=bottom)
        label = f"suggestion, {found['rate']:.1e}"
        axes.axvline(found["rate"], color=INK, linestyle="--", label=label)
    axes.legend(frameon=False, fontsize=8)
    return figure
