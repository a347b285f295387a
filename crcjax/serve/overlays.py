"""Pictures of a result to be laid over the slide: attention and evidence by class, and the tiles that were not used.

Each picture covers a rectangle of the slide exactly: a whole number of its pixels is a tile, so that a viewer that stretches it
over the rectangle shows every tile at its true place.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from crcjax.predict.evidence_map import PixelGrid, TileLayer, draw, merged, tile_layers
from crcjax.predict.heatmap import evidence_scale, rank
from crcjax.serve.results import attention_file, open_result
from crcjax.serve.vault import Vault

_RANKS, _SIGNED = "magma", "coolwarm"
_EXCLUDED_COLOUR = (0, 90, 181)
# Pixels of the smallest tile's side, and of a picture's longer side.
_TILE_PX, _LONGEST_PX = 4, 2048
_CACHED_RESULTS = 16
Kind = Literal["attention", "evidence", "excluded"]


@dataclass(frozen=True)
class OverlayMap:
    """One map of a slide.

    Attributes:
      id: names it in the API.
      label: names it for people.
      kind: attention (coloured by rank), evidence (red for the class, blue against it), or the tiles that were not used.
      scale: the evidence in nats at the ends of the colours; None for other kinds.
      box: left, top, width and height of its picture in level-0 px.
    """

    id: str
    label: str
    kind: Kind
    scale: float | None
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class TopTile:
    """One of the tiles with the largest values of a map: its corner and side in level-0 px."""

    x: float
    y: float
    side: float
    value: float


class Overlays:
    """The maps of one slide of a result.

    Args:
      arrays: those of the attention file.
      classes: in the order of the probabilities.
    """

    def __init__(self, arrays: dict[str, Any], classes: Sequence[str]):
        self._arrays = arrays
        mask: Bool[np.ndarray, "region slot"] = arrays["mask"]
        self._layers: dict[str, TileLayer] = {}
        self.maps: list[OverlayMap] = []
        self._add("attention", "Attention", "attention", mask, arrays["slot_attention"])
        by_class: Float[np.ndarray, "region slot branch"] = arrays["class_attention"]
        if by_class.shape[-1] == len(classes) > 1:
            for number, name in enumerate(classes):
                self._add(f"attention.{number}", f"Attention for {name}", "attention", mask, by_class[..., number])
        if str(arrays["method"]) != "attention":
            evidence = arrays["attribution_maps"]
            scale = evidence_scale(evidence[mask])
            for number, name in enumerate(classes):
                label = f"Evidence for {name}"
                self._add(f"evidence.{number}", label, "evidence", mask, evidence[..., number], scale)
        # Slots of magnifications that the slide lacks are no tiles.
        unused = ~mask & mask.any(axis=0)
        self._add("excluded", "Tiles that were not used", "excluded", unused, np.ones(mask.shape))

    def _add(
        self, map_id: str, label: str, kind: Kind, mask: np.ndarray, value: np.ndarray, scale: float | None = None
    ) -> None:
        place = self._arrays["origin"], float(self._arrays["region_px"]), self._arrays["slot_boxes"]
        layers = tile_layers(*place, mask, value[..., None])
        if not layers:
            return
        # What a fine tile lacks, a coarse one that contains it may have.
        layer = layers[-1] if kind == "excluded" else merged(layers)
        self._layers[map_id] = layer
        grid = _grid(layer)
        size = grid.shape[1] * grid.pixel[0], grid.shape[0] * grid.pixel[1]
        self.maps.append(OverlayMap(map_id, label, kind, scale, (*grid.corner, *size)))

    def map(self, map_id: str) -> OverlayMap | None:
        """The map of an id; None if there is none."""
        return next((overlay for overlay in self.maps if overlay.id == map_id), None)

    def png(self, overlay: OverlayMap) -> bytes:
        """The picture of a map as PNG: transparent where it has no tile."""
        layer = self._layers[overlay.id]
        values = layer.value[:, 0]
        if overlay.kind == "attention":
            # Ranks of tiles, not of pixels: otherwise an edge of a single hot tile would rank as high as its middle.
            position = rank(values)
        else:
            position = (np.clip(values / (overlay.scale or 1.0), -1, 1) + 1) / 2
        shown = TileLayer(layer.corner, layer.side, position[:, None].astype(np.float32))
        maps, coverage = draw(shown, _grid(layer))
        if overlay.kind == "excluded":
            colours = np.broadcast_to(np.asarray(_EXCLUDED_COLOUR, np.uint8), (*coverage.shape, 3))
        else:
            name = _RANKS if overlay.kind == "attention" else _SIGNED
            colours = np.rint(matplotlib.colormaps[name](maps[..., 0])[..., :3] * 255).astype(np.uint8)
        return _png(np.dstack([colours, np.rint(coverage * 255).astype(np.uint8)]))

    def top_tiles(self, overlay: OverlayMap, count: int) -> list[TopTile]:
        """The tiles with the largest values, in order; only positive ones."""
        layer = self._layers[overlay.id]
        values = layer.value[:, 0]
        order = [tile for tile in np.argsort(-values, kind="stable")[:count].tolist() if values[tile] > 0]
        return [
            TopTile(float(layer.corner[tile, 0]), float(layer.corner[tile, 1]), layer.side, float(values[tile]))
            for tile in order
        ]


@lru_cache(maxsize=_CACHED_RESULTS)
def _overlays(vault: Vault, results: Path, path: Path, classes: tuple[str, ...]) -> Overlays | None:
    try:
        with open_result(vault, results, path) as file, np.load(file) as saved:
            return Overlays(dict(saved), classes)
    except (OSError, KeyError, ValueError, EOFError, BadZipFile):
        return None


def overlays(
    vault: Vault, results: Path, job_id: str, token: int, content: str, classes: Sequence[str]
) -> Overlays | None:
    """The maps of a slide; None for one without a prediction. Raises DecryptionError."""
    path = attention_file(results, job_id, token, content)
    return _overlays(vault, results, path, tuple(classes)) if path.is_file() else None


def _grid(layer: TileLayer) -> PixelGrid:
    """Pixels that cover the tiles of a layer, a whole number for each tile."""
    corner = layer.corner.min(axis=0)
    tiles = np.rint((layer.corner.max(axis=0) - corner) / layer.side) + 1
    per_tile = int(np.clip(_LONGEST_PX // tiles.max(), 1, _TILE_PX))
    columns, rows = (tiles * per_tile).astype(int).tolist()
    pixel = layer.side / per_tile
    return PixelGrid((float(corner[0]), float(corner[1])), (pixel, pixel), (rows, columns))


def _png(rgba: UInt8[np.ndarray, "y x 4"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, format="png", compress_level=3)
    return file.getvalue()
