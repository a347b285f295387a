"""Maps of tiles' values over a slide: attention or evidence as pixels, each tile at its true position.

A map is smooth between tiles that lie on a grid, and each tile keeps its value over its middle. Half-way between the values of
two neighbours lies exactly on their common edge, and nothing is shown outside of the tiles: smoothing moves no tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

# The share of a tile's side over which a value changes into the neighbour's, half of it in each tile.
_TRANSITION = 0.5
# Tiles lie on a grid if they are off by at most this, in level-0 px: corners of regions are rounded to whole pixels.
_ON_GRID_PX = 0.501
# Corners that are equal to this fraction of a tile's side are those of one tile.
_CELLS_PER_SIDE = 64


@dataclass(frozen=True)
class TileLayer:
    """Tiles of one size: their corners (x, y) and side in level-0 px, and their values in each map."""

    corner: Float64[np.ndarray, "tile 2"]
    side: float
    value: Float32[np.ndarray, "tile map"]


@dataclass(frozen=True)
class PixelGrid:
    """Pixels over a slide.

    Attributes:
      corner: the top-left corner (x, y) of the first pixel, in level-0 px.
      pixel: the sides (x, y) of a pixel in level-0 px.
      shape: the numbers of rows and columns.
    """

    corner: tuple[float, float]
    pixel: tuple[float, float]
    shape: tuple[int, int]

    def rows(self, first: int, last: int) -> PixelGrid:
        """The part of the grid from row `first` to before row `last`."""
        top = self.corner[1] + first * self.pixel[1]
        return PixelGrid((self.corner[0], top), self.pixel, (last - first, self.shape[1]))

    def edges(self, axis: int) -> Float64[np.ndarray, " edge"]:
        """The edges of the pixels along x (0) or y (1), in level-0 px."""
        return self.corner[axis] + self.pixel[axis] * np.arange(self.shape[1 - axis] + 1)


def tile_layers(
    origin: Int[np.ndarray, "region 2"],
    region_px: float,
    slot_boxes: Float[np.ndarray, "slot 3"],
    mask: Bool[np.ndarray, "region slot"],
    value: Float[np.ndarray, "region slot map"],
) -> list[TileLayer]:
    """The valid tiles of a slide by size, the largest first; sizes without a valid tile are left out.

    Args:
      origin: the regions' corners in level-0 px.
      region_px: the side of a region in level-0 px.
      slot_boxes: (x, y, side) of the slots as shares of a region's side.
      mask: the valid tiles.
      value: the values of all tiles.
    """
    layers = []
    for share in sorted(set(slot_boxes[:, 2].tolist()), reverse=True):
        region, slot = np.nonzero(mask & (slot_boxes[:, 2] == share))
        if len(region):
            corner = origin[region] + slot_boxes[slot, :2].astype(np.float64) * region_px
            layers.append(TileLayer(corner, share * region_px, value[region, slot].astype(np.float32)))
    return layers


def merged(layers: Sequence[TileLayer]) -> TileLayer:
    """All layers as one of the smallest tiles: the sum, over the tiles that contain each, of their values per area of the largest.

    Tiles of several sizes must lie within each other, as the slots of a region do.
    """
    finest, largest = layers[-1], layers[0].side
    corners, values = [], []
    for layer in layers:
        count, per_area = round(layer.side / finest.side), np.float32((largest / layer.side) ** 2)
        parts = np.stack(np.meshgrid(np.arange(count), np.arange(count)), axis=-1).reshape(-1, 2) * finest.side
        corners.append((layer.corner[:, None] + parts).reshape(-1, 2))
        values.append(np.repeat(layer.value * per_area, count**2, axis=0))
    corner, value = np.concatenate(corners), np.concatenate(values)
    cell = np.rint(corner * (_CELLS_PER_SIDE / finest.side)).astype(np.int64)
    _, first, of_cell = np.unique(cell, axis=0, return_index=True, return_inverse=True)
    total = np.zeros((len(first), value.shape[1]), np.float32)
    np.add.at(total, of_cell.reshape(-1), value)
    return TileLayer(corner[first], finest.side, total)


def draw(layer: TileLayer, grid: PixelGrid) -> tuple[Float32[np.ndarray, "y x map"], Float32[np.ndarray, "y x"]]:
    """The maps of a layer at every pixel, and the share of the pixel that tiles cover. Maps are zero where it is zero."""
    values, coverage = _on_lattice(layer, grid) or _in_blocks(layer, grid)
    return values * (coverage > 0)[..., None], coverage


def _on_lattice(layer: TileLayer, grid: PixelGrid) -> tuple[np.ndarray, np.ndarray] | None:
    """The smooth map of tiles on a grid, and their coverage of the pixels; None for tiles that lie on none or overlap."""
    cell = np.rint((layer.corner - layer.corner.min(axis=0)) / layer.side).astype(np.int64)
    first_corner = layer.corner - cell * layer.side
    columns, rows = (cell.max(axis=0) + 1).tolist()
    if np.ptp(first_corner, axis=0).max() > 2 * _ON_GRID_PX or len(np.unique(cell, axis=0)) < len(cell):
        return None
    # One empty cell on every side, so that a pixel always has two neighbours along each axis.
    value = np.zeros((rows + 2, columns + 2, layer.value.shape[1]), np.float32)
    valid = np.zeros((rows + 2, columns + 2), np.float32)
    value[cell[:, 1] + 1, cell[:, 0] + 1] = layer.value
    valid[cell[:, 1] + 1, cell[:, 0] + 1] = 1
    offset = (first_corner.min(axis=0) + first_corner.max(axis=0)) / 2 - layer.side
    weights = [_neighbours(grid.edges(axis), offset[axis], layer.side, valid.shape[1 - axis]) for axis in (0, 1)]
    (left, x_share), (top, y_share) = weights
    total, weight = np.zeros((*grid.shape, value.shape[2]), np.float32), np.zeros(grid.shape, np.float32)
    for down, row_weight in ((0, 1 - y_share), (1, y_share)):
        for right, column_weight in ((0, 1 - x_share), (1, x_share)):
            at = np.ix_(top + down, left + right)
            part = row_weight[:, None] * column_weight * valid[at]
            total += part[..., None] * value[at]
            weight += part
    overlaps = [_overlap(grid.edges(axis), offset[axis], layer.side, valid.shape[1 - axis]) for axis in (0, 1)]
    coverage = (overlaps[1] @ valid @ overlaps[0].T).astype(np.float32)
    # A pixel's middle may lie outside of the only tile that it touches.
    total = np.divide(total, weight[..., None], out=np.zeros_like(total), where=weight[..., None] > 0)
    return np.where((weight > 0)[..., None], total, _nearest(value, valid, weights)), coverage


def _neighbours(
    edges: Float64[np.ndarray, " edge"], offset: float, side: float, cells: int
) -> tuple[Int[np.ndarray, " pixel"], Float32[np.ndarray, " pixel"]]:
    """The cell before every pixel's middle, among those with a cell after it, and the share of that next cell's value."""
    middle = ((edges[:-1] + edges[1:]) / 2 - offset) / side - 0.5
    before = np.clip(np.floor(middle).astype(np.int64), 0, cells - 2)
    share = np.clip((middle - before - 0.5) / _TRANSITION + 0.5, 0, 1)
    return before, share.astype(np.float32)


def _overlap(
    edges: Float64[np.ndarray, " edge"], offset: float, side: float, cells: int
) -> Float32[np.ndarray, "pixel cell"]:
    """The share of every pixel that lies in every cell, along one axis."""
    cell_edges = offset + side * np.arange(cells + 1)
    shared = np.minimum(edges[1:, None], cell_edges[1:]) - np.maximum(edges[:-1, None], cell_edges[:-1])
    return (np.maximum(shared, 0) / (edges[1] - edges[0])).astype(np.float32)


def _nearest(value: np.ndarray, valid: np.ndarray, weights: list) -> np.ndarray:
    """The value of a valid cell among each pixel's four."""
    (left, _), (top, _) = weights
    nearest = np.zeros((len(top), len(left), value.shape[2]), np.float32)
    for down in (0, 1):
        for right in (0, 1):
            at = np.ix_(top + down, left + right)
            nearest = np.where(valid[at][..., None] > 0, value[at], nearest)
    return nearest


def _in_blocks(layer: TileLayer, grid: PixelGrid) -> tuple[np.ndarray, np.ndarray]:
    """The map of tiles anywhere, each as a block; where tiles overlap, their mean."""
    total, coverage = np.zeros((*grid.shape, layer.value.shape[1]), np.float32), np.zeros(grid.shape, np.float32)
    edges = grid.edges(0), grid.edges(1)
    for corner, value in zip(layer.corner, layer.value, strict=True):
        parts: list[np.ndarray] = []
        places: list[slice] = []
        for axis in (0, 1):
            first = np.searchsorted(edges[axis], corner[axis], side="right") - 1
            last = np.searchsorted(edges[axis], corner[axis] + layer.side, side="left")
            first, last = max(int(first), 0), min(int(last), len(edges[axis]) - 1)
            places.append(slice(first, max(first, last)))
            parts.append(
                _overlap(edges[axis][first : last + 1], corner[axis], layer.side, 1)[:, 0]
                if last > first
                else np.zeros(0)
            )
        area = np.outer(parts[1], parts[0]).astype(np.float32)
        total[places[1], places[0]] += area[..., None] * value
        coverage[places[1], places[0]] += area
    total = np.divide(total, coverage[..., None], out=total, where=coverage[..., None] > 0)
    return total, np.minimum(coverage, 1)
