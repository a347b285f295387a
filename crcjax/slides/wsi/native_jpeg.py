"""The JPEG tiles of a TIFF slide, read without OpenSlide."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

import numpy as np
import openslide
import simplejpeg
import tifffile

from crcjax.slides.wsi.ome_tiff import OmeTiff

_CACHED_BYTES = 96 << 20  # of decoded tiles, a slide


class JpegTiles:
    """The native JPEG tiles of a TIFF slide, decoded without OpenSlide: the same pixels at several times the speed."""

    def __init__(self, file: Path, pages: dict[int, tifffile.TiffPage]):
        self.pages = pages
        self._file = os.open(file, os.O_RDONLY)
        self._file_bytes = os.fstat(self._file).st_size
        self.close = weakref.finalize(self, os.close, self._file)  # closes it once, when called or forgotten
        # Tiles that were read in part, and the number of their pixels that were not read yet.
        self._cache: OrderedDict[tuple[int, int, int], tuple[np.ndarray, int]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, file: Path, handle: openslide.OpenSlide | OmeTiff) -> JpegTiles | None:
        """Opens the tiles of a slide; None where pixels might differ from OpenSlide's: other formats, compressions, colour spaces."""
        if isinstance(handle, OmeTiff):
            levels = {level: page for level, page in enumerate(handle.pages) if page.is_tiled and _is_plain_jpeg(page)}
            return cls(file, levels) if levels else None
        if handle.properties.get("openslide.vendor") not in ("aperio", "generic-tiff"):
            return None
        try:
            with tifffile.TiffFile(file) as tiff:
                tiled = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
        except Exception:  # tifffile raises errors of many types for damaged directories; OpenSlide's error counts
            return None
        pages = {}
        for level, (width, height) in enumerate(handle.level_dimensions):
            same = [page for page in tiled if (page.imagewidth, page.imagelength) == (width, height)]
            if len(same) == 1 and _is_plain_jpeg(same[0]):
                pages[level] = same[0]
        return cls(file, pages) if pages else None

    def stream_of(self, level: int, x: int, y: int, side: int) -> bytes | None:
        """Returns the native JPEG tile that covers exactly this square within the level; None if there is none."""
        page = self.pages[level]
        is_native = page.tilewidth == page.tilelength == side and self._holds(page, x, y)
        return self._stream(level, y // side, x // side) if is_native else None

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray | None:
        """Reads pixels at (x, y), in px of the level; None if the scanner did not record a tile, which OpenSlide fills."""
        page = self.pages[level]
        side_x, side_y = page.tilewidth, page.tilelength
        if (width, height) == (side_x, side_y) and self._holds(page, x, y):
            return self._decoded(level, y // side_y, x // side_x)
        pixels = np.full((height, width, 3), 255, np.uint8)
        left, right = max(x, 0), min(x + width, page.imagewidth)
        top, bottom = max(y, 0), min(y + height, page.imagelength)
        for row in range(top // side_y, -(-bottom // side_y)):
            for column in range(left // side_x, -(-right // side_x)):
                x0, x1 = max(left, column * side_x), min(right, (column + 1) * side_x)
                y0, y1 = max(top, row * side_y), min(bottom, (row + 1) * side_y)
                tile = self._shared(level, row, column, (x1 - x0) * (y1 - y0))
                if tile is None:
                    return None
                part = tile[y0 - row * side_y : y1 - row * side_y, x0 - column * side_x : x1 - column * side_x]
                pixels[y0 - y : y1 - y, x0 - x : x1 - x] = part
        return pixels

    @staticmethod
    def shrunk(stream: bytes, side: int, shrink: int) -> np.ndarray:
        """Decodes a stream of `stream_of` at 1, 1/2, 1/4 or 1/8 of its size.

        The decoder shrinks before the cosine transform: it reads every bit, so it finds damage, but computes few pixels. Raises ValueError.
        """
        if simplejpeg.decode_jpeg_header(stream)[:2] != (side, side):
            raise ValueError(f"the tile is not {side} pixels square")
        small = side // shrink
        tile = simplejpeg.decode_jpeg(stream, "RGB", min_height=small, min_width=small, min_factor=shrink, strict=True)
        if tile.shape != (small, small, 3):
            raise ValueError(f"the tile has the shape {tile.shape} when {shrink} times smaller")
        return tile

    @staticmethod
    def _holds(page: tifffile.TiffPage, x: int, y: int) -> bool:
        """Whether a whole tile begins at (x, y)."""
        on_grid = x % page.tilewidth == y % page.tilelength == 0
        return on_grid and 0 <= x <= page.imagewidth - page.tilewidth and 0 <= y <= page.imagelength - page.tilelength

    def _shared(self, level: int, row: int, column: int, wanted: int) -> np.ndarray | None:
        """Decodes a tile and caches it until all of its pixels were read; `wanted` pixels are read now."""
        key, page = (level, row, column), self.pages[level]
        with self._lock:
            tile, rest = self._cache.pop(key, (None, 0))
        if tile is None:
            tile = self._decoded(*key)
            height, width = page.imagelength - row * page.tilelength, page.imagewidth - column * page.tilewidth
            rest = min(page.tilelength, height) * min(page.tilewidth, width)
        if tile is not None and rest > wanted:
            with self._lock:
                self._cache[key] = tile, rest - wanted
                while len(self._cache) > max(4, _CACHED_BYTES // tile.nbytes):
                    self._cache.popitem(last=False)
        return tile

    def _decoded(self, level: int, row: int, column: int) -> np.ndarray | None:
        stream = self._stream(level, row, column)
        if stream is None:
            return None
        # A cut or damaged stream is an error, as in OpenSlide; libjpeg alone would warn and fill the rest with grey.
        tile = simplejpeg.decode_jpeg(stream, "RGB", strict=True)
        page = self.pages[level]
        if tile.shape != (page.tilelength, page.tilewidth, 3):
            raise ValueError(f"the tile in row {row}, column {column} has the shape {tile.shape}")
        return tile

    def _stream(self, level: int, row: int, column: int) -> bytes | None:
        """A tile's JPEG stream with the page's tables and colour space in it; None if the scanner did not record it."""
        page = self.pages[level]
        index = row * -(-page.imagewidth // page.tilewidth) + column
        if index >= min(len(page.dataoffsets), len(page.databytecounts)):
            raise ValueError(f"the tile in row {row}, column {column} is not in the file's table of tiles")
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if count == 0:
            return None
        if offset + count > self._file_bytes:
            raise ValueError(f"the tile in row {row}, column {column} lies beyond the end of the file")
        stream = os.pread(self._file, count, offset)
        head, transform = stream[:64], _TRANSFORMS[page.photometric]
        if b"Adobe" in head or (transform == 0 and b"JFIF" in head):
            return None  # the stream states a colour space of its own, which OpenSlide overrides
        start = page.jpegtables[:-2] if page.jpegtables else stream[:2]
        return start + _ADOBE + bytes([transform]) + stream[2:]


# The marker that tells a JPEG decoder whether three components are RGB (0) or YCbCr (1): TIFF states it in a tag instead.
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
_TRANSFORMS: dict[int, int] = {tifffile.PHOTOMETRIC.RGB: 0, tifffile.PHOTOMETRIC.YCBCR: 1}


def _is_plain_jpeg(page: tifffile.TiffPage) -> bool:
    return (
        page.compression == tifffile.COMPRESSION.JPEG
        and page.photometric in _TRANSFORMS
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
    )
