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
LONGEST_PX = 800
_RANKS, _SIGNED = "magma", "coolwarm"
# The share of the colour in a covered pixel; the rest is the slide in grey.
_OPACITY = 0.55
# The share of the tiles whose evidence reaches the ends of the colour scale at most.
_WITHIN_SCALE = 0.99
_DPI = 110
# The title and the legend need this width.
_LEAST_WIDTH_PX = 760
_MARGIN_PX, _TITLE_PX, _LEGEND_PX = 12, 36, 84


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


def to_heatmap_size(thumbnail: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "row column 3"]:
    """Enlarges a small thumbnail, as stores have, to LONGEST_PX."""
    factor = LONGEST_PX / max(thumbnail.shape[:2])
    if factor <= 1:
        return thumbnail
    height, width = (max(1, round(side * factor)) for side in thumbnail.shape[:2])
    return cv2.resize(thumbnail, (width, height), interpolation=cv2.INTER_CUBIC)


def heatmap_png(
    thumbnail: UInt8[np.ndarray, "y x 3"],
    coloured: UInt8[np.ndarray, "y x 3"],
    *,
    title: str,
    meaning: str,
    um_per_px: float,
    synthetic: bool,
) -> bytes:
    """Draws the slide beside its coloured copy, pixel for pixel, with a scale bar and a legend.

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
    panels_px = 2 * width + _MARGIN_PX
    size = max(panels_px + 2 * _MARGIN_PX, _LEAST_WIDTH_PX), height + _TITLE_PX + _LEGEND_PX
    left = (size[0] - panels_px) // 2
    figure = Figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    for number, picture in enumerate((thumbnail, coloured)):
        # Whole pixels, so that no pixel is resampled and the map stays at its place.
        figure.figimage(picture, left + number * (width + _MARGIN_PX), _LEGEND_PX)
    bar_um = _round_length(0.2 * width * um_per_px)
    bar = figure.add_axes((left / size[0], _LEGEND_PX / size[1], width / size[0], height / size[1]))
    bar.set(xlim=(0, width), ylim=(height, 0))
    bar.axis("off")
    bar.plot([0.02 * width, 0.02 * width + bar_um / um_per_px], [0.97 * height] * 2, "k-", lw=3)
    bar.text(0.02 * width, 0.955 * height, f"{bar_um:g} µm", va="bottom", fontsize=8)
    legend = figure.add_axes((0.3, (_LEGEND_PX - 30) / size[1], 0.4, 14 / size[1]))
    colours = matplotlib.cm.ScalarMappable(cmap=_RANKS)
    figure.colorbar(colours, cax=legend, orientation="horizontal").set_label(
        f"rank of the tile's {meaning} within this slide", fontsize=8
    )
    legend.tick_params(labelsize=8)
    stamp = "SYNTHETIC SLIDE · " if synthetic else ""
    figure.text(0.5, 1 - _TITLE_PX / 2 / size[1], f"{stamp}{title}", ha="center", va="center", fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png", pil_kwargs={"compress_level": 3})
    return png.getvalue()


def _round_length(um: float) -> float:
    """The largest length of 1, 2 or 5 times a power of ten that does not exceed `um`."""
    power = 10 ** np.floor(np.log10(um))
    return float(max(step * power for step in (1, 2, 5) if step * power <= um))
