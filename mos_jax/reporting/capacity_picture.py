"""The picture of how many tenants fit beside a base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mos_jax.reporting.style import (
    FAINT,
    INK,
    PALE,
    arm_styles,
    new_figure,
    reference_line,
    styled,
)
from mos_jax.serving.capacity import Capacity, in_gib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
# Ends of lines closer than this factor have no room for a label between them.
NEAR = 1.4


@styled
def capacity_picture(found: Capacity) -> Figure:
    """Memory against the number of tenants, for each kind, up to the device's memory."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = new_figure(9.6, 5.0)
    axes = figure.subplots()
    server = found.server
    fixed = found.base_bytes + found.cache_bytes
    usable = server.memory - found.reserve_bytes
    most = max([fit.tenants for fit in found.fits] + [10])
    counts = np.unique(np.geomspace(1, 1.6 * most, 400).astype(int))
    styles = arm_styles([fit.name for fit in found.fits])
    for fit in found.fits:
        style = styles[fit.name]
        used = fixed + fit.shared_bytes + counts * fit.tenant_bytes
        inside = used <= usable
        # The wider line of MoS is seen beneath one that lies on it.
        axes.plot(
            counts[inside], used[inside] / GIB, color=style.colour, linestyle=style.dash,
            linewidth=4 if fit is found.fits[0] else 1.8,
            label=f"{fit.name}, {in_gib(fit.tenant_bytes)} each: {fit.why}",
        )  # fmt: skip
    # One label for each place, those of near neighbours to either side.
    ends = {fit.tenants: fit for fit in reversed(found.fits) if fit.tenants}
    places = sorted(ends)
    for i, tenants in enumerate(places):
        above = i > 0 and tenants < NEAR * places[i - 1]
        below = i + 1 < len(places) and places[i + 1] < NEAR * tenants
        colour = styles[ends[tenants].name].colour
        axes.plot(tenants, usable / GIB, styles[ends[tenants].name].marker, color=colour, ms=7)
        axes.annotate(
            f"{tenants:,}", (tenants, usable / GIB), xytext=(2 if above else -2 * below, 7),
            textcoords="offset points", ha="left" if above else "right" if below else "center",
            color=colour, fontweight="bold",
        )  # fmt: skip
    axes.axhspan(usable / GIB, server.memory / GIB, color=PALE, alpha=0.6, linewidth=0)
    axes.text(
        0.01, server.memory / GIB, f"reserve, {server.reserve:.0%} of {in_gib(server.memory)}",
        transform=axes.get_yaxis_transform(), va="bottom", color=INK, fontsize=8,
    )  # fmt: skip
    reference_line(axes, found.base_bytes / GIB, f"base, {in_gib(found.base_bytes)}")
    cache = f"+ key-value cache, {server.rows} rows x {server.tokens:,} tokens"
    axes.axhline(fixed / GIB, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"{cache}, {in_gib(found.cache_bytes)}", (0.01, fixed / GIB), va="top", fontsize=8,
        xycoords=axes.get_yaxis_transform(), xytext=(0, -4), textcoords="offset points",
        color="#5A5A5A",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(1, counts[-1])
    axes.set_ylim(0, 1.08 * max(server.memory, fixed) / GIB)
    axes.set_xlabel("tenants on the device")
    axes.set_ylabel("memory, GiB")
    held = f"{server.dtype}, sites in {server.quantize}" if server.quantize else server.dtype
    axes.set_title(f"Tenants beside one {found.model} ({held})")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
