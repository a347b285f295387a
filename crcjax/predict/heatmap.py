"""Heatmaps: attention or attribution as colours over the slide."""

from __future__ import annotations

import io

import cv2
import matplotlib
import numpy as np
from jaxtyping import Float, Float32, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from crcjax.predict.evidence_map import PixelGrid, TileLayer, draw

# The longer side of a heatmap's thumbnail.
LONGEST_PX = 1024
_RANKS, _SIGNED = "magma", "coolwarm"
# The share of the colour in a covered pixel; the rest is the slide in grey.
_OPACITY = 0.55
# The share of the tiles whose evidence reaches the ends of the colour scale at most.
_WITHIN_SCALE = 0.99


def rank(values: Float[np.ndarray, " tile"]) -> Float32[np.ndarray, " tile"]:
    """The rank of each value, 0 to 1; ties get their mean rank, so that equal attention has one colour."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return (middle[inverse] / max(1, len(values) - 1)).astype(np.float32)


def evidence_scale(values: Float[np.ndarray, "tile map"]) -> float:
    """The evidence at the ends of the colour scale, the same for all maps of a slide, so that their colours can be compared."""
    return float(np.quantile(np.abs(values), _WITHIN_SCALE)) or 1.0


def overlay(
    thumbnail: UInt8[np.ndarray, "y x 3"], layer: TileLayer, size: tuple[int, int], scale: float | None = None
) -> UInt8[np.ndarray, "y x 3"]:
    """Colours the tiles of the thumbnail, each at its true position, smooth between neighbours.

    Args:
      thumbnail: the slide.
      layer: the tiles with a single map.
      size: the slide's (width, height) in level-0 px.
      scale: None colours by the rank of the values; otherwise red is evidence of `scale` for a class, blue against it.
    """
    height, width = thumbnail.shape[:2]
    values = layer.value[:, 0]
    # Ranks are taken of tiles, not of pixels: among pixels, the edge of a single hot tile would rank as high as its middle.
    position = rank(values) if scale is None else (np.clip(values / scale, -1, 1) + 1) / 2
    grid = PixelGrid((0.0, 0.0), (size[0] / width, size[1] / height), (height, width))
    ranks, coverage = draw(TileLayer(layer.corner, layer.side, position[:, None].astype(np.float32)), grid)
    colours = matplotlib.colormaps[_RANKS if scale is None else _SIGNED](ranks[..., 0])[..., :3] * 255
    grey = cv2.cvtColor(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    share = _OPACITY * coverage[..., None]
    return np.rint((1 - share) * grey + share * colours).astype(np.uint8)


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
      coloured: the result of `overlay` by ranks.
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
    colours = matplotlib.cm.ScalarMappable(cmap=_RANKS)
    figure.colorbar(colours, ax=axes, orientation="horizontal", shrink=0.4, pad=0.02, aspect=40).set_label(
        f"rank of the tile's {meaning} within this slide", fontsize=8
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
