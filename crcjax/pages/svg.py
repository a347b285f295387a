"""Matplotlib figures as SVG that read well on a screen and in print."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as MatplotlibFigure

from crcjax.pages.render import Figure

# Two figures stand in a row of 170 mm on A4; one of this width is scaled to half of that, and its text of 10 pt to 7 pt.
HALF_WIDTH, FULL_WIDTH = 4.8, 9.8
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
    # The same figure gives the same bytes.
    "svg.hashsalt": "crcjax",
}
# Colours that remain distinct for colour-blind readers and in grey (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


@contextmanager
def drawing(width: float = HALF_WIDTH, height: float = 3.6) -> Iterator[MatplotlibFigure]:
    """A figure of a size in inches, in the style of the pages."""
    with matplotlib.rc_context(_STYLE):
        yield MatplotlibFigure(figsize=(width, height), layout="constrained")


def to_figure(
    figure: MatplotlibFigure, id: str, title: str, description: str, caption: str = "", *, stamp: str = ""
) -> Figure:
    """The finished figure; call it within `drawing`. `stamp` is written into its corner."""
    if stamp:
        figure.text(0.998, 0.002, stamp.lower(), ha="right", va="bottom", fontsize=7, color="#b3261e")
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)
    return Figure(
        id, title, svg, description, caption, wide=bool(figure.get_figwidth() > (HALF_WIDTH + FULL_WIDTH) / 2)
    )
