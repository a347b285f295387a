"""Plain pyramidal OME-TIFF slides. OpenSlide reads neither their pyramid nor their micrometres per pixel."""

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
_ICC_PROFILE = 34675  # TIFF tag
_ORIENTATION = 274  # TIFF tag
_SAME_MPP = 0.02  # relative: images of one resolution are scans; a macro or a label is coarser
_CACHED_BYTES = 64 << 20
_LARGEST_TILE_PX = 1 << 26  # 200 MB; a strip of a very wide slide stays below it


class UnsupportedTiffError(ValueError):
    """An undamaged TIFF of a layout that is not supported; the message is "REASON; REMEDY"."""


class OmeTiff:
    """An open OME-TIFF of 8-bit RGB, its pyramid in the largest image's SubIFDs; it has the interface of OpenSlide."""

    def __init__(self, file: Path):
        """Raises ValueError if the file is damaged, or its pixels are not 8-bit RGB in one page per level."""
        self._tiff = tifffile.TiffFile(file)
        try:
            first, stated = _largest_image(self._tiff)
            below = list(first.pages or ())
            self.pages = [page for page in (first, *below) if isinstance(page, tifffile.TiffPage)]
            for page in self.pages:
                _check(page)
            self.dimensions = (first.imagewidth, first.imagelength)
            self.level_dimensions = tuple((page.imagewidth, page.imagelength) for page in self.pages)
            self.level_downsamples = tuple(self.dimensions[0] / width for width, _ in self.level_dimensions)
            self.properties = {"openslide.vendor": "ome"} | _resolution_tags(first) | stated
            if profile := first.tags.get(_ICC_PROFILE):
                self.properties["openslide.icc-size"] = str(profile.count)
        except UnsupportedTiffError:
            self._tiff.close()
            raise
        except Exception as error:  # tifffile raises errors of many types for damaged directories
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
        except Exception:  # tifffile raises errors of many types for damaged directories; OpenSlide's error counts
            return False

    def close(self) -> None:
        """Closes the file."""
        self._tiff.close()

    @property
    def color_profile(self) -> ImageCms.ImageCmsProfile:
        """The colour profile of the first image, read on request. Raises ValueError if it is damaged or missing."""
        try:
            with self._lock:
                return ImageCms.ImageCmsProfile(io.BytesIO(self.pages[0].tags[_ICC_PROFILE].value))
        except Exception as error:  # tifffile raises errors of many types for damaged tags
            raise ValueError(str(error)) from error

    def get_best_level_for_downsample(self, downsample: float) -> int:
        """The coarsest level that is at least as fine."""
        fine = [level for level, value in enumerate(self.level_downsamples) if value <= downsample]
        return fine[-1] if fine else 0

    def read_region(self, corner: tuple[int, int], level: int, size: tuple[int, int]) -> UInt8[np.ndarray, "y x 4"]:
        """Reads RGBA of a rectangle as OpenSlide does: the corner is in level-0 px; pixels outside the slide are transparent.

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
                part = tile[c - row * side_y : d - row * side_y, a - column * side_x : b - column * side_x]
                pixels[c - top : d - top, a - left : b - left] = _rgba(part, page)
        return pixels

    def _segment(self, level: int, index: int) -> np.ndarray | None:
        """A decoded tile or strip; None if the scanner did not record it."""
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
    """Raises ValueError if a level's pixels are not 8-bit RGB, or its table of tiles does not fit its size."""
    if fault := tiff_fault(page):
        raise UnsupportedTiffError(fault)
    if page.samplesperpixel < 3 or page.dtype != np.uint8 or page.imagedepth != 1:
        kind = f"{page.samplesperpixel} channels of {page.dtype}"
        raise UnsupportedTiffError(f"its pixels are {kind}, not 8-bit RGB; export the slide as 8-bit RGB")
    rows, columns = page.chunks[:2]
    if not (0 < rows * columns <= _LARGEST_TILE_PX and page.imagewidth > 0 and page.imagelength > 0):
        raise ValueError(f"it states tiles of {columns} x {rows} px")
    tiles = -(-page.imagelength // rows) * -(-page.imagewidth // columns)
    if not tiles == len(page.dataoffsets) == len(page.databytecounts):
        raise ValueError(f"its size asks for {tiles} tiles, its tables list {len(page.dataoffsets)}")


def tiff_fault(page: tifffile.TiffPage) -> str:
    """Why a page's layout is not read, and what to do; empty if it is read."""
    orientation = page.tags.get(_ORIENTATION)
    if orientation is not None and orientation.value != 1:
        reason = f"its orientation tag is {orientation.value}, so that its picture is to be flipped or rotated"
        return f"{reason}; write it anew with the orientation 1"
    if page.planarconfig != 1:
        return "it stores red, green and blue in separate planes; convert it to interleaved RGB"
    return ""


def _largest_image(tiff: tifffile.TiffFile) -> tuple[tifffile.TiffPage, dict[str, str]]:
    """The first page of the largest image, which is the scan, and its properties in the OME-XML.

    A label or a macro beside it is left out. Raises UnsupportedTiffError if another image is a scan as well.
    """
    description = tiff.pages[0].description  # type: ignore[union-attr]
    images = [series.pages[0] for series in tiff.series] if len(tiff.pages) > 1 else [tiff.pages[0]]
    pages = [image for image in images if isinstance(image, tifffile.TiffPage)]
    if len(pages) < len(images):
        raise ValueError("an OME-TIFF without a first page")
    areas = [page.imagewidth * page.imagelength for page in pages]
    largest = areas.index(max(areas))
    stated = _stated(description, largest)
    mpp = stated.get("openslide.mpp-x")
    for index, area in enumerate(areas):
        other = _stated(description, index).get("openslide.mpp-x") if index != largest else None
        same = other is not None and mpp is not None and abs(float(other) / float(mpp) - 1) < _SAME_MPP
        unknown = index != largest and other is None and area * 4 > areas[largest]
        if same or unknown:
            sizes = ", ".join(f"{page.imagewidth} x {page.imagelength} px" for page in pages)
            raise UnsupportedTiffError(
                f"holds {len(pages)} images ({sizes}), and more than one is a scan; write each into a file of its own"
            )
    return pages[largest], stated


def _resolution_tags(page: tifffile.TiffPage) -> dict[str, str]:
    """The resolution tags by OpenSlide's names, without those that state no unit."""
    unit = {2: "inch", 3: "centimeter"}.get(int(page.tags[296].value) if 296 in page.tags else 0)
    if unit is None:
        return {}
    values = {"X": page.tags.get(282), "Y": page.tags.get(283)}
    stated = {f"tiff.{axis}Resolution": repr(tag.value[0] / tag.value[1]) for axis, tag in values.items() if tag}
    return stated | {"tiff.ResolutionUnit": unit}


def _rgba(part: np.ndarray, page: tifffile.TiffPage) -> np.ndarray:
    """Adds alpha to a decoded part: the page's, or opaque."""
    alpha = [index for index, kind in enumerate(page.extrasamples, 3) if kind in (1, 2) and index < part.shape[2]]
    rgba = np.full((*part.shape[:2], 4), 255, np.uint8)
    rgba[..., :3] = part[..., :3]
    if alpha and page.extrasamples[alpha[0] - 3] == 1:  # the colours are already multiplied by alpha
        rgba[..., :3] = np.minimum(255, part[..., :3].astype(np.uint16) + 255 - part[..., alpha[0], None])
    elif alpha:
        rgba[..., 3] = part[..., alpha[0]]
    return rgba


def _stated(description: str, image: int) -> dict[str, str]:
    """Reads from the OME-XML, for an image by its index: micrometres per pixel and the objective's magnification."""
    try:
        root = ElementTree.fromstring(description)
    except ElementTree.ParseError as error:
        raise ValueError(f"its OME-XML is damaged ({error})") from error
    properties = {}
    all_pixels, objective = root.findall(".//{*}Image/{*}Pixels"), root.find(".//{*}Objective")
    pixels = all_pixels[image] if image < len(all_pixels) else None
    for axis in "XY":
        size = None if pixels is None else pixels.get(f"PhysicalSize{axis}")
        unit = "" if pixels is None else pixels.get(f"PhysicalSize{axis}Unit", "")
        if size and unit in _UM:
            properties[f"openslide.mpp-{axis.lower()}"] = repr(float(size) * _UM[unit])
    if objective is not None and (power := objective.get("NominalMagnification")):
        properties["openslide.objective-power"] = power
    return properties
