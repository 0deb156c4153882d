"""The picture of what a decode step can reach at most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mos_jax.reporting.style import arm_styles, new_figure, styled
from mos_jax.serving.roofline import Roofline

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def roofline_picture(found: Roofline) -> Figure:
    """Tokens a second against the rows of a step, and the share of the bare base's."""
    from matplotlib.ticker import NullFormatter, PercentFormatter, StrMethodFormatter

    figure = new_figure(9.6, 4.6)
    speed, share = figure.subplots(1, 2)
    styles = arm_styles([form.name for form in found.forms])
    bare = found.steps[found.forms[0].name]
    for form in found.forms:
        steps, style = found.steps[form.name], styles[form.name]
        rows = [step.rows for step in steps]
        reached = [step.tokens_per_second(found.device) for step in steps]
        most = [step.tokens_per_second(found.device) for step in bare]
        # Those that move the same bytes lie on one another: the wider is seen beneath.
        width = 4.0 if form.name.startswith("MoS") and form.name.endswith("once") else 1.6
        look = {"color": style.colour, "marker": style.marker, "linewidth": width, "ms": 5}
        speed.plot(rows, reached, label=form.name, **look)
        share.plot(rows, [own / top for own, top in zip(reached, most, strict=True)], **look)
    for axes in (speed, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks([step.rows for step in bare])
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("rows, each of a tenant of its own")
    speed.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    speed.set_ylim(bottom=0)
    speed.set_title(f"{found.model}, {found.device.name}: tokens a second at most")
    share.set_title("share of the bare base's")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure
