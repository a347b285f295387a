"""Heatmaps: attention or attribution as colours over the slide."""

from __future__ import annotations

import io

import cv2
import matplotlib
import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# The longer side of a heatmap's thumbnail.
LONGEST_PX = 1024
_COLOURS = "magma"


def attention_rank(attention: Float[np.ndarray, " region"]) -> Float32[np.ndarray, " region"]:
    """The rank of each region within the slide, 0 to 1; ties get their mean rank, so that equal attention has one colour."""
    _, inverse, counts = np.unique(attention, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return (middle[inverse] / max(1, len(attention) - 1)).astype(np.float32)


def overlay(
    thumbnail: UInt8[np.ndarray, "y x 3"],
    origin: Int32[np.ndarray, "region 2"],
    region_px: float,
    attention: Float[np.ndarray, " region"],
    size: tuple[int, int],
) -> UInt8[np.ndarray, "y x 3"]:
    """Colours every region of the thumbnail by the rank of its attention.

    Args:
      thumbnail: the slide.
      origin: the regions' top-left corners (x, y) in level-0 px.
      region_px: the side of a region in level-0 px.
      attention: the attention or attribution of each region.
      size: the slide's (width, height) in level-0 px.
    """
    height, width = thumbnail.shape[:2]
    scale = np.array([width / size[0], height / size[1]])
    colours = (matplotlib.colormaps[_COLOURS](attention_rank(attention))[:, :3] * 255).astype(np.uint8)
    grey = cv2.cvtColor(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    for (left, top), (right, bottom), colour in zip(
        np.rint(origin * scale).astype(int), np.rint((origin + region_px) * scale).astype(int), colours, strict=True
    ):
        grey_region = grey[top:bottom, left:right]
        grey[top:bottom, left:right] = (0.45 * grey_region + 0.55 * colour).astype(np.uint8)
    return grey


def heatmap_png(
    thumbnail: UInt8[np.ndarray, "y x 3"],
    coloured: UInt8[np.ndarray, "y x 3"],
    *,
    title: str,
    meaning: str,
    um_per_px: float,
    synthetic: bool,
) -> bytes:
    """Draws the slide beside its coloured copy, with a scale bar and a legend.

    Args:
      thumbnail: the slide.
      coloured: the result of `overlay`.
      title: the line above both.
      meaning: what the colours rank.
      um_per_px: of the thumbnail.
      synthetic: whether the title states that the slide is synthetic.

    Returns:
      A PNG file.
    """
    height, width = thumbnail.shape[:2]
    figure = Figure(figsize=(10, 10 * height / (2 * width) + 0.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, picture in zip(axes, (thumbnail, coloured), strict=True):
        axis.imshow(picture)
        axis.axis("off")
    bar_um = _round_length(0.2 * width * um_per_px)
    axes[0].plot([0.02 * width, 0.02 * width + bar_um / um_per_px], [0.97 * height] * 2, "k-", lw=3)
    axes[0].text(0.02 * width, 0.955 * height, f"{bar_um:g} µm", va="bottom", fontsize=8)
    colours = matplotlib.cm.ScalarMappable(cmap=_COLOURS)
    figure.colorbar(colours, ax=axes, orientation="horizontal", shrink=0.4, pad=0.02, aspect=40).set_label(
        f"rank of the region's {meaning} within this slide", fontsize=8
    )
    stamp = "SYNTHETIC SLIDE · " if synthetic else ""
    figure.suptitle(f"{stamp}{title}", fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _round_length(um: float) -> float:
    """The largest length of 1, 2 or 5 times a power of ten that does not exceed `um`."""
    power = 10 ** np.floor(np.log10(um))
    return float(max(step * power for step in (1, 2, 5) if step * power <= um))
