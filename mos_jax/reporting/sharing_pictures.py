"""Pictures of how layers share pools. Every function returns a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mos_jax.analysis.sharing import KINDS, Sharing
from mos_jax.reporting.style import PALE, PALETTE, new_figure, require_matplotlib, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND_NAMES = {"pool_a": "A", "pool_b": "B"}


@styled
def usage_map(sharing: Sharing) -> Figure:
    """Which layers read which shards, and how often: a heat map for each pool."""
    matplotlib = require_matplotlib()
    pools = {kind: [p for p in sharing.counts if p.startswith(f"{kind}/")] for kind in KINDS}
    columns = max(map(len, pools.values()))
    most = max(int(counts.max()) for counts in sharing.counts.values())
    shown = matplotlib.colormaps["cividis_r"](np.linspace(1, 0.15, max(most, 1))[::-1])
    colours = matplotlib.colors.ListedColormap(np.vstack([[1, 1, 1, 1], shown]))
    figure = new_figure(max(4.0, 1.0 + 1.55 * columns), 6.6)
    grid = figure.subplots(2, columns, squeeze=False, sharex=True)
    image: Any = None
    for row, kind in enumerate(KINDS):
        for axes in grid[row, len(pools[kind]) :]:
            axes.set_visible(False)
        for column, path in enumerate(pools[kind]):
            axes, counts = grid[row, column], sharing.counts[path]
            image = axes.imshow(
                counts,
                aspect="auto",
                interpolation="nearest",
                cmap=colours,
                vmin=-0.5,
                vmax=most + 0.5,
            )
            axes.spines[:].set_visible(True)
            axes.set_title(f"{KIND_NAMES[kind]} of {path.partition('/')[2]}", fontsize=8.5)
            if column == 0:
                axes.set_ylabel("shard of the pool")
            axes.tick_params(labelbottom=row == 1 or column >= len(pools[KINDS[1]]))
            if row == 1:
                axes.set_xlabel("layer")
            places = range(0, len(sharing.layers), -(-len(sharing.layers) // 3))
            axes.set_xticks(places, [str(sharing.layers[i]) for i in places])
    bar = figure.colorbar(image, ax=grid, shrink=0.5, aspect=24, pad=0.01)
    bar.set_label("times a layer reads the shard")
    bar.set_ticks(range(most + 1) if most <= 8 else [0, most])
    return figure


@styled
def gradient_map(sharing: Sharing) -> Figure:
    """Norm of the pools' gradient by layer, and cosines between the layers' gradients."""
    matplotlib = require_matplotlib()
    figure = new_figure(12.0, 3.9)
    left, *right = figure.subplots(1, 3, width_ratios=[1.1, 1, 1])
    for kind, colour, marker in zip(KINDS, PALETTE, "os", strict=False):
        left.plot(
            sharing.layers,
            sharing.pulls[kind].norms,
            color=colour,
            marker=marker,
            markersize=3.5,
            linewidth=1.4,
            label=f"pools of {KIND_NAMES[kind]}",
        )
    left.set_ylim(bottom=0)
    left.set_xlabel("layer")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("norm of the layer's gradient")
    left.set_title("How hard each layer pulls")
    left.grid(axis="y", color=PALE, linewidth=0.6)
    left.set_axisbelow(True)
    left.legend(frameon=False, fontsize=8.5)
    colours = matplotlib.colormaps["RdBu"].with_extremes(bad=PALE)
    off = [np.abs(sharing.pulls[kind].pairs()) for kind in KINDS]
    # The diagonal is 1 by definition and would hide how small the others are.
    limit = max([0.1, *(float(values.max()) for values in off if len(values))])
    image: Any = None
    for axes, kind in zip(right, KINDS, strict=True):
        cosines = sharing.pulls[kind].cosines.copy()
        np.fill_diagonal(cosines, np.nan)
        image = axes.imshow(np.ma.masked_invalid(cosines), cmap=colours, vmin=-limit, vmax=limit)
        axes.spines[:].set_visible(True)
        axes.set_title(f"Cosine on common shards, pools of {KIND_NAMES[kind]}")
        axes.set_xlabel("layer")
        places = range(0, len(sharing.layers), -(-len(sharing.layers) // 6))
        labels = [str(sharing.layers[i]) for i in places]
        axes.set_xticks(places, labels)
        axes.set_yticks(places, labels)
    right[0].set_ylabel("layer")
    figure.colorbar(image, ax=right, shrink=0.9, pad=0.02).set_label("cosine")
    return figure
