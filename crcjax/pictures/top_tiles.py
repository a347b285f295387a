"""The tiles with the largest values of every map, and their contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import matplotlib.font_manager
import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image, ImageDraw, ImageFont

from crcjax.predict.evidence import SlideEvidence
from crcjax.predict.evidence_map import merged
from crcjax.slides.wsi.slide import Slide

# The side of a tile on the sheet, and the space between tiles.
SHEET_TILE_PX, _GAP_PX, _LINE_PX = 224, 8, 26
_INK = (29, 36, 48)


@dataclass(frozen=True)
class TopTile:
    """A tile of a slide that is among the first of a map.

    Attributes:
      map_name: the class, or "attention".
      number: its place in the map's order, from 1.
      value: its value in the map.
      corner: (x, y) in level-0 px.
      side: in level-0 px.
    """

    map_name: str
    number: int
    value: float
    corner: Float64[np.ndarray, " 2"]
    side: float


def top_tiles(evidence: SlideEvidence, count: int) -> list[TopTile]:
    """The `count` tiles of the smallest size with the largest values of every map, in order; of evidence, only positive values."""
    layer = merged(evidence.layers)
    tiles = []
    for index, name in enumerate(evidence.maps):
        values = layer.value[:, index]
        order = [tile for tile in np.argsort(-values, kind="stable")[:count].tolist() if values[tile] > 0]
        tiles += [
            TopTile(name, number, float(values[tile]), layer.corner[tile], layer.side)
            for number, tile in enumerate(order, 1)
        ]
    return tiles


def tile_picture(slide: Slide, tile: TopTile, side_px: int = SHEET_TILE_PX) -> UInt8[np.ndarray, "y x 3"]:
    """The pixels of a tile, resampled by area means. Raises SlideError."""
    downsamples = np.asarray(slide.info.level_downsamples)
    # The coarsest level that is at least as fine as the picture.
    level = int(np.flatnonzero(downsamples <= max(1.0, 1.02 * tile.side / side_px))[-1])
    side = max(1, round(tile.side / downsamples[level]))
    corner = np.rint(tile.corner).astype(int).tolist()
    pixels = slide.read(corner[0], corner[1], side, side, level)
    shrinks = side >= side_px
    return cv2.resize(pixels, (side_px, side_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def contact_sheet(
    tiles: Sequence[TopTile], pictures: Sequence[UInt8[np.ndarray, "y x 3"]], um_per_side: float, columns: int
) -> UInt8[np.ndarray, "row column 3"]:
    """One row of pictures for each map, with its name above and the number and value below every tile.

    Args:
      tiles: the tiles, map by map.
      pictures: their pictures, SHEET_TILE_PX a side.
      um_per_side: the side of a tile in µm.
      columns: the largest number of tiles of a map.
    """
    maps = list(dict.fromkeys(tile.map_name for tile in tiles))
    row_px = 2 * _LINE_PX + SHEET_TILE_PX + _GAP_PX
    size = columns * (SHEET_TILE_PX + _GAP_PX) + _GAP_PX, max(1, len(maps)) * row_px
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for row, name in enumerate(maps):
        draw.text((_GAP_PX, row * row_px + 5), f"{name} (tiles of {um_per_side:.0f} µm)", _INK, font)
    for tile, picture in zip(tiles, pictures, strict=True):
        left = _GAP_PX + (tile.number - 1) * (SHEET_TILE_PX + _GAP_PX)
        top = maps.index(tile.map_name) * row_px + _LINE_PX
        sheet.paste(Image.fromarray(picture), (left, top))
        draw.text((left, top + SHEET_TILE_PX + 3), f"{tile.number}: {tile.value:.3g}", _INK, font)
    return np.asarray(sheet)


def _font() -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib; Pillow's own has no µ."""
    return ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), 14)
