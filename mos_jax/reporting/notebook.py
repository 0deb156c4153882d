"""What a notebook needs to show what programs show: pictures, and lines of text."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from mos_jax.reporting.style import png_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture that a notebook shows when it is the last value of a cell.

    Attributes:
      png: the file's bytes.
    """

    png: bytes = dataclasses.field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png


def show(figure: Figure) -> Shown:
    """The figure as a picture of few colours, so that a saved notebook stays small."""
    return Shown(png_bytes(figure))


def text_console(width: int = 100) -> Console:
    """A console whose tables are plain text and whose progress is one line at a time."""
    return Console(
        file=sys.stdout, width=width, force_terminal=False, force_jupyter=False, color_system=None
    )
