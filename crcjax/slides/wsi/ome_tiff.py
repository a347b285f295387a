"""Plain pyramidal OME-TIFF slides, of which OpenSlide sees neither the pyramid nor the micrometres per pixel."""

from __future__ import annotations

import io
import threading
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import UInt8
from PIL import ImageCms

_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "": 1.0}
_ICC_PROFILE = 34675  # the tag
_CACHED_BYTES = 64 << 20
_LARGEST_TILE_PX = 1 << 26  # 200 MB; a strip of a very wide slide stays below it


class OmeTiff:
    """An open OME-TIFF of 8-bit RGB, its pyramid in the first image's SubIFDs; it speaks as OpenSlide does."""

    def __init__(self, file: Path):
        """Raises ValueError if the file is damaged, or its pixels are not 8-bit RGB in one page per level."""
        self._tiff = tifffile.TiffFile(file)
        try:
            first = self._tiff.pages[0]
            if not isinstance(first, tifffile.TiffPage):
                raise ValueError("an OME-TIFF without a first page")
            below = list(first.pages or ())
            self.pages = [page for page in (first, *below) if isinstance(page, tifffile.TiffPage)]
            for page in self.pages:
                _check(page)
            self.dimensions = (first.imagewidth, first.imagelength)
            self.level_dimensions = tuple((page.imagewidth, page.imagelength) for page in self.pages)
            self.level_downsamples = tuple(self.dimensions[0] / width for width, _ in self.level_dimensions)
            self.properties = {"openslide.vendor": "ome"} | _stated(first.description)
            if profile := first.tags.get(_ICC_PROFILE):
                self.properties["openslide.icc-size"] = str(profile.count)
        except Exception as error:  # on damaged directories tifffile stumbles in every way
            self._tiff.close()
            raise ValueError(f"an OME-TIFF that cannot be used: {error}") from error
        self._lock, self._cache = threading.Lock(), OrderedDict[tuple[int, int], np.ndarray]()

    @staticmethod
    def holds(file: Path) -> bool:
        """Whether a file is a TIFF with an OME description."""
        with open(file, "rb") as opened:
            if opened.read(2) not in (b"II", b"MM"):
                return False
        try:
            with tifffile.TiffFile(file) as tiff:
                return bool(tiff.is_ome)
        except Exception:  # on damaged directories tifffile stumbles in every way; what OpenSlide says of them counts
            return False

    def close(self) -> None:
        """Closes the file."""
        self._tiff.close()

    @property
    def color_profile(self) -> ImageCms.ImageCmsProfile:
        """The first image's, read when asked for. Raises ValueError if it is damaged, or there is none."""
        try:
            with self._lock:
                return ImageCms.ImageCmsProfile(io.BytesIO(self.pages[0].tags[_ICC_PROFILE].value))
        except Exception as error:  # on damaged tags tifffile stumbles in every way
            raise ValueError(str(error)) from error

    def get_best_level_for_downsample(self, downsample: float) -> int:
        """The coarsest level that is at least as fine."""
        fine = [level for level, held in enumerate(self.level_downsamples) if held <= downsample]
        return fine[-1] if fine else 0

    def read_region(self, corner: tuple[int, int], level: int, size: tuple[int, int]) -> UInt8[np.ndarray, "y x 4"]:
        """RGBA of a rectangle as OpenSlide gives it: the corner in level-0 px, transparent outside the slide.

        Raises ValueError or OSError if the file is damaged there.
        """
        page, downsample = self.pages[level], self.level_downsamples[level]
        left, top = (round(value / downsample) for value in corner)
        side_x, side_y = page.chunks[1], page.chunks[0]
        pixels = np.zeros((size[1], size[0], 4), np.uint8)
        x0, x1 = max(left, 0), min(left + size[0], page.imagewidth)
        y0, y1 = max(top, 0), min(top + size[1], page.imagelength)
        across = -(-page.imagewidth // side_x)
        for row in range(y0 // side_y, -(-y1 // side_y)):
            for column in range(x0 // side_x, -(-x1 // side_x)):
                tile = self._segment(level, row * across + column)
                if tile is None:
                    continue
                a, b = max(x0, column * side_x), min(x1, (column + 1) * side_x)
                c, d = max(y0, row * side_y), min(y1, (row + 1) * side_y)
                part = tile[c - row * side_y : d - row * side_y, a - column * side_x : b - column * side_x, :3]
                pixels[c - top : d - top, a - left : b - left, :3] = part
                pixels[c - top : d - top, a - left : b - left, 3] = 255
        return pixels

    def _segment(self, level: int, index: int) -> np.ndarray | None:
        """A decoded tile or strip; None if it was not recorded."""
        page = self.pages[level]
        if index >= min(len(page.dataoffsets), len(page.databytecounts)):
            raise ValueError(f"tile {index} is not in the file's table of tiles")
        with self._lock:
            if (level, index) in self._cache:
                self._cache.move_to_end((level, index))
                return self._cache[level, index]
            offset, count = page.dataoffsets[index], page.databytecounts[index]
            handle = self._tiff.filehandle
            if count == 0:
                return None
            if offset + count > handle.size:
                raise ValueError(f"tile {index} lies beyond the end of the file")
            handle.seek(offset)
            data = handle.read(count)
        try:
            decoded, _, _ = page.decode(data, index, jpegtables=page.jpegtables)
        except Exception as error:  # each codec has errors of its own
            raise ValueError(f"tile {index} cannot be decoded ({error})") from error
        if decoded is None:
            return None
        with self._lock:
            self._cache[level, index] = decoded[0]
            while len(self._cache) * decoded.nbytes > _CACHED_BYTES and len(self._cache) > 4:
                self._cache.popitem(last=False)
        return decoded[0]


def _check(page: tifffile.TiffPage) -> None:
    """Raises ValueError if a level's pixels are of another kind, or its table of tiles is not that of its size."""
    if page.samplesperpixel < 3 or page.dtype != np.uint8 or page.planarconfig != 1 or page.imagedepth != 1:
        raise ValueError("its pixels are not 8-bit RGB, as brightfield slides' are")
    rows, columns = page.chunks[:2]
    if not (0 < rows * columns <= _LARGEST_TILE_PX and page.imagewidth > 0 and page.imagelength > 0):
        raise ValueError(f"it states tiles of {columns} x {rows} px")
    tiles = -(-page.imagelength // rows) * -(-page.imagewidth // columns)
    if not tiles == len(page.dataoffsets) == len(page.databytecounts):
        raise ValueError(f"its size asks for {tiles} tiles, its tables list {len(page.dataoffsets)}")


def _stated(description: str) -> dict[str, str]:
    """What the OME-XML says of the first image: micrometres per pixel and the objective's magnification."""
    try:
        root = ElementTree.fromstring(description)
    except ElementTree.ParseError as error:
        raise ValueError(f"its OME-XML is damaged ({error})") from error
    found = {}
    pixels, objective = root.find(".//{*}Image/{*}Pixels"), root.find(".//{*}Objective")
    for axis in "XY":
        size = None if pixels is None else pixels.get(f"PhysicalSize{axis}")
        unit = "" if pixels is None else pixels.get(f"PhysicalSize{axis}Unit", "")
        if size and unit in _UM:
            found[f"openslide.mpp-{axis.lower()}"] = repr(float(size) * _UM[unit])
    if objective is not None and (power := objective.get("NominalMagnification")):
        found["openslide.objective-power"] = power
    return found
