"""The picture of serving many tenants: tokens a second and memory against their number."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from experiments.bench.serving_report import rates
from mos_jax.reporting.style import PALETTE, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def serving_picture(found: dict[str, Any]) -> Figure:
    """Of the part "tenants"."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = new_figure(9.6, 4.4)
    speed, memory = figure.subplots(1, 2)
    facts = found["facts"]
    mos = [name for name in facts if name.startswith("MoS")]
    rest = [name for name in facts if name not in mos]
    counts = [facts[name]["known"] for name in mos]
    for names, colour, marker, label in (
        (mos, PALETTE[0], "o", "MoS, all on the device"),
        *(
            ([name], PALETTE[1], "s", f"{name.rpartition(',')[0]}, {facts[name]['slots']:,} there")
            for name in rest
        ),
    ):
        values = [rates(found, name) for name in names]
        middle = [statistics.median(each) for each in values]
        low = [m - min(each) for m, each in zip(middle, values, strict=True)]
        high = [max(each) - m for m, each in zip(middle, values, strict=True)]
        speed.errorbar(
            [facts[name]["known"] for name in names], middle, yerr=[low, high],
            color=colour, marker=marker, capsize=3, label=label,
        )  # fmt: skip
    memory.plot(
        counts, [facts[name]["bank_bytes"] / 1e6 for name in mos], color=PALETTE[0], marker="o",
        label="MoS: pools, tables, assembled factors of 8 rows",
    )  # fmt: skip
    for name in rest:
        slot = facts[name]["slot_bytes"]
        memory.plot(
            counts, [(n + 1) * slot / 1e6 for n in counts], color=PALETTE[1], linestyle="--",
            label=f"{name.rpartition(',')[0]}, all on the device",
        )  # fmt: skip
        memory.plot(
            facts[name]["known"], facts[name]["bank_bytes"] / 1e6, color=PALETTE[1], marker="s",
            linestyle="", label=f"{name.rpartition(',')[0]}, as measured",
        )  # fmt: skip
    for axes in (speed, memory):
        axes.set_xscale("log")
        axes.set_xticks(counts)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tenants, requests by Zipf's law")
        axes.legend(frameon=False, fontsize=8, loc="best")
    speed.set_ylim(bottom=0)
    memory.set_yscale("log")
    memory.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    memory.yaxis.set_minor_formatter(NullFormatter())
    speed.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    speed.set_title("tokens a second by the clock, 8 rows; smallest to largest")
    memory.set_title("bank on the device, MB")
    return figure
