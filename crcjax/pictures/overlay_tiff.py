"""Evidence as a pyramidal OME-TIFF: one channel of true values for each map, which QuPath and other viewers open."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import tifffile
from jaxtyping import Float32

from crcjax.errors import writing
from crcjax.predict.evidence import SlideEvidence
from crcjax.predict.evidence_map import PixelGrid, TileLayer, draw, merged

# Pixels along the side of the smallest tile: the change between neighbours takes half of them.
PIXELS_PER_TILE = 8
# The name of the channel with the share of each pixel that tiles cover.
TISSUE = "tiles"
_TIFF_TILE_PX = 256
_SMALLEST_LEVEL_PX = 512


def overlay_grid(evidence: SlideEvidence, layer: TileLayer) -> PixelGrid:
    """The pixels of a slide's overlay: from the corner of the scanned part on, as QuPath shows the slide, to its end.

    Their sides are the same share of a tile in x and y, so that they differ in µm as the slide's do.
    """
    pixel = layer.side / PIXELS_PER_TILE
    width, height = (size - corner for size, corner in zip(evidence.size, evidence.corner, strict=True))
    shape = max(1, int(np.ceil(height / pixel))), max(1, int(np.ceil(width / pixel)))
    return PixelGrid((float(evidence.corner[0]), float(evidence.corner[1])), (pixel, pixel), shape)


def write_overlay_tiff(path: Path, evidence: SlideEvidence, about: str) -> None:
    """Writes the overlay of a slide, atomically.

    Channels are float32: the maps in their units, for tiles of several sizes summed per area of the largest, then the share
    that tiles cover. Every coarser level is the mean of four pixels.

    Args:
      path: the file, by the suffix .ome.tif.
      evidence: the slide's evidence, with at least one tile.
      about: the description in the OME-XML.

    Raises:
      OutputError: the file cannot be written.
    """
    layer = merged(evidence.layers)
    grid = overlay_grid(evidence, layer)
    levels = [overlay_channels(layer, grid)]
    while max(levels[-1].shape[1:]) > _SMALLEST_LEVEL_PX:
        levels.append(_half(levels[-1]))
    names = [*evidence.maps, TISSUE]
    metadata = {
        "axes": "CYX",
        "Name": path.name,
        "Description": about,
        "PhysicalSizeX": grid.pixel[0] * evidence.mpp[0],
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": grid.pixel[1] * evidence.mpp[1],
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": names, "Color": _channel_colours(len(names))},
    }
    partial = path.with_suffix(".partial")
    with writing(path):
        with tifffile.TiffWriter(partial, bigtiff=True, ome=True) as tiff:
            for number, level in enumerate(levels):
                resolution = [
                    1e4 / (side * mpp * 2**number) for side, mpp in zip(grid.pixel, evidence.mpp, strict=True)
                ]
                tiff.write(
                    level,
                    subifds=len(levels) - 1 if number == 0 else 0,
                    subfiletype=1 if number else 0,
                    metadata=metadata if number == 0 else None,
                    resolution=tuple(resolution),
                    resolutionunit="CENTIMETER",
                    tile=(_TIFF_TILE_PX, _TIFF_TILE_PX),
                    photometric="minisblack",
                    compression="zlib",
                    predictor=3,
                )
        partial.replace(path)


def overlay_channels(layer: TileLayer, grid: PixelGrid) -> Float32[np.ndarray, "channel y x"]:
    """The maps and the coverage; drawn in strips, so that memory holds them once."""
    channels = np.empty((layer.value.shape[1] + 1, *grid.shape), np.float32)
    for first in range(0, grid.shape[0], _TIFF_TILE_PX):
        last = min(first + _TIFF_TILE_PX, grid.shape[0])
        values, coverage = draw(layer, grid.rows(first, last))
        channels[:-1, first:last], channels[-1, first:last] = np.moveaxis(values, -1, 0), coverage
    return channels


def _half(channels: Float32[np.ndarray, "channel y x"]) -> Float32[np.ndarray, "channel row column"]:
    """The mean of every four pixels. Maps are weighted by coverage, so that the rim of the tissue keeps its value."""
    padding = [(0, 0), *((0, size % 2) for size in channels.shape[1:])]
    padded = np.pad(channels, padding)
    weighted = np.concatenate([padded[:-1] * padded[-1:], padded[-1:]])
    blocks = weighted.reshape(len(weighted), weighted.shape[1] // 2, 2, weighted.shape[2] // 2, 2)
    mean = blocks.mean(axis=(2, 4))
    mean[:-1] = np.divide(mean[:-1], mean[-1:], out=np.zeros_like(mean[:-1]), where=mean[-1:] > 0)
    return mean


def _channel_colours(count: int) -> list[int]:
    """A colour for each map and grey for the coverage, as signed RGBA numbers, in which OME-XML states them."""
    colours = np.asarray(matplotlib.colormaps["Set1"].colors)[:, :3]  # type: ignore[attr-defined]
    rgb = [*(colours[i % len(colours)] for i in range(count - 1)), np.full(3, 0.5)]
    return [int.from_bytes([*np.rint(255 * colour).astype(int).tolist(), 255], "big", signed=True) for colour in rgb]
