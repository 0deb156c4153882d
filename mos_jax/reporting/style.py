"""What all pictures have in common: colours by arm, type, and labels that do not overlap."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from mos_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

# Okabe and Ito (2008), told apart with any kind of colour vision; without its yellow, which is too
# pale for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
INK, FAINT, PALE = "#222222", "#8A8A8A", "#D0D0D0"
DPI = 130
# Of 255 levels of a colour.
NOT_SEEN = 24
LABEL_POINTS = 8.5
RC: Mapping[str, Any] = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "figure.facecolor": "white",
    "figure.dpi": DPI,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "savefig.facecolor": "white",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": INK,
    "ytick.labelsize": 8.5,
}


@dataclasses.dataclass(frozen=True)
class ArmStyle:
    """How an arm looks in every picture."""

    colour: str
    marker: str
    dash: str


def arm_styles(names: Sequence[str]) -> dict[str, ArmStyle]:
    """A style for each arm, by its place in the sweep: the same in all pictures.

    Beyond seven arms the colours come again, with other markers and dashes.
    """
    count = len(PALETTE)
    return {
        name: ArmStyle(
            PALETTE[i % count],
            MARKERS[(i + i // count) % len(MARKERS)],
            DASHES[i // count % len(DASHES)],
        )
        for i, name in enumerate(names)
    }


def require_matplotlib() -> Any:
    """Returns the package. Raises InputError, with the line that installs it."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "the pictures of a report need matplotlib; install it with "
            "pip install 'mos_jax[report]'"
        ) from None
    return matplotlib


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draws with the report's type and colours, whatever the user has set."""

    @functools.wraps(draw)
    def with_style(*args: P.args, **kwargs: P.kwargs) -> T:
        matplotlib = require_matplotlib()
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **RC}):
            return draw(*args, **kwargs)

    return with_style


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches that no window system knows of."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@styled
def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG; the same picture gives the same bytes.

    Reports are committed, so the file has 256 colours, a third of the size of one with all, where
    no pixel changes visibly.
    """
    from PIL import Image, ImageChops

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    image = Image.open(stream).convert("RGB")
    kept = image
    for method in (Image.Quantize.MEDIANCUT, Image.Quantize.FASTOCTREE):
        few = image.quantize(256, method=method, dither=Image.Dither.NONE)
        change = np.asarray(ImageChops.difference(image, few.convert("RGB")))
        if change.max() <= NOT_SEEN:
            kept = few
            break
    stream = io.BytesIO()
    kept.save(stream, format="png", optimize=True)
    return stream.getvalue()


def freeze_layout(figure: Figure) -> None:
    """Settles where the axes stand, so that labels placed by hand stay where they are."""
    figure.canvas.draw()
    figure.set_layout_engine("none")


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves positions apart, as little as may be, until neighbours are `gap` apart.

    Args:
      positions: where the labels want to be, in any order.
      gap: least distance of two labels.
      low: least position allowed.
      high: largest position allowed; if all do not fit, they are spaced evenly from `low` to it.

    Returns:
      The new positions, in the order of `positions`.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    if len(order) > 1 and gap * (len(order) - 1) >= high - low:
        places = np.linspace(low, high, len(order))
        return [float(places[order.index(i)]) for i in range(len(order))]
    # Blocks of labels that touch; each stands where its members' mean wish is.
    blocks: list[tuple[float, list[int]]] = []
    for i in order:
        start, members = positions[i], [i]
        start = min(max(start, low), high)
        while blocks and blocks[-1][0] + gap * len(blocks[-1][1]) > start:
            members = blocks.pop()[1] + members
            wish = sum(positions[m] - gap * k for k, m in enumerate(members)) / len(members)
            start = min(max(wish, low), high - gap * (len(members) - 1))
        blocks.append((start, members))
    placed = {m: start + gap * k for start, members in blocks for k, m in enumerate(members)}
    return [placed[i] for i in range(len(positions))]


def label_column(
    axes: Axes,
    points: Sequence[tuple[float, float, str, str]],
    at: float | None = None,
    side: str = "right",
) -> None:
    """Writes labels in a column beside points, spread until none overlaps, with leader lines.

    The layout must be frozen.

    Args:
      axes: where the points are.
      points: (x, y, text, colour of the leader line), in data units.
      at: x of the column in points (1/72 inch) from the figure's left; None = beside the points.
      side: "right" or "left" of the points.
    """
    figure = axes.figure
    to_points = 72 / figure.dpi
    if not points:
        return
    places = axes.transData.transform([(x, y) for x, y, _, _ in points]) * to_points
    box = axes.get_window_extent()
    height = LABEL_POINTS * 1.35
    low, high = box.y0 * to_points + height / 2, box.y1 * to_points
    heights = spread([float(y) for _, y in places], height, low, high)
    if at is None:
        at = float(max(x for x, _ in places) + 14 if side == "right" else min(places[:, 0]) - 14)
    for (x, y, text, colour), height_at in zip(points, heights, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(at, height_at),
            textcoords="figure points",
            ha="left" if side == "right" else "right",
            va="center",
            fontsize=LABEL_POINTS,
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8},
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0 if side == "right" else 1, 0.5),
                "color": colour,
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def text_width(texts: Sequence[str]) -> float:
    """Width of the widest label in points, near enough to keep a margin for it."""
    return max((len(text) for text in texts), default=0) * LABEL_POINTS * 0.6


def reference_line(axes: Axes, height: float, words: str) -> None:
    """A dashed line across, such as what guessing reaches, with words on it."""
    axes.axhline(height, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        words,
        (0.01, height),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        color="#5A5A5A",
        fontsize=8,
        va="bottom",
        # Or a line of the grid would strike them through.
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )
