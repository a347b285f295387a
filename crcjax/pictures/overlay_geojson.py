"""Evidence as GeoJSON for QuPath: every tile with its values as measurements, and the tiles of the contact sheet by number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crcjax.errors import writing
from crcjax.pictures.top_tiles import TopTile
from crcjax.predict.evidence import SlideEvidence
from crcjax.slides.tiling.regions_of_interest import Box, write_boxes


def write_overlay_geojson(path: Path, evidence: SlideEvidence, top_tiles: Sequence[TopTile]) -> None:
    """Writes the tiles of a slide, atomically; coordinates count from the corner of the scanned part, as QuPath counts.

    In QuPath, drop the file on the slide, and colour the tiles by a measurement (Measure, Show measurement maps). The tiles of
    the contact sheet are annotations of the class that they are evidence for.

    Raises OutputError.
    """
    boxes = []
    for layer in evidence.layers:
        side_um = layer.side * evidence.mpp[0]
        for corner, values in zip(layer.corner, layer.value.tolist(), strict=True):
            measurements = dict(zip(evidence.maps, values, strict=True))
            boxes.append(Box(corner, layer.side, f"Tile {side_um:.0f} µm", measurements))
    boxes += [
        Box(tile.corner, tile.side, tile.map_name, {tile.map_name: tile.value}, f"{tile.map_name} {tile.number}")
        for tile in top_tiles
    ]
    with writing(path):
        write_boxes(path, boxes, evidence.corner)
