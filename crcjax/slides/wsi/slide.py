"""Opens slide files: their properties (`SlideInfo`) and their pixels (`Slide.read`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final

import cv2
import numpy as np
import openslide
import tifffile
from jaxtyping import UInt8
from PIL import Image, ImageCms

from crcjax.errors import InputError, SlideError
from crcjax.slides.wsi.discovery import content_hash, first_file
from crcjax.slides.wsi.native_jpeg import JpegTiles
from crcjax.slides.wsi.ome_tiff import OmeTiff, UnsupportedTiffError, tiff_fault
from crcjax.slides.wsi.tiff_structure import STARTS

PAINTED = "synthetic slide painted by crcjax"  # in the description of a painted slide
MPP_RANGE = (0.05, 20.0)  # finer than optics resolve, coarser than any scanner writes: a unit error
_SQUARE = 0.02  # a pixel's sides may differ by 2 %, as magnifications that count as the same
_BLOCK_PX = 2048
_UNREAD_COMPRESSIONS = (
    "WEBP",
    "JPEG2000",
    "JPEGXL",
    "JPEGXL_DNG",
    "JPEGXR",
    "JPEGXR_NDPI",
    "ZSTD",
    "ZSTD_DEPRECATED",
    "LERC",
    "PNG",
)
# crcjax's errors state what is wrong with a file and can omit its name; tifffile's log names it.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class SlideInfo:
    """The properties that a slide file states.

    `size` is (width, height) of level 0; `mpp` micrometres per level-0 pixel in (x, y), which differ by at most 2 %.
    `mpp_source` is its source: `vendor` (the scanner's property), `tiff` (the resolution tag), `objective` (10 µm over its power: a
    guess) or `given`. `synthetic` slides state that crcjax painted them; `has_icc` is true of slides with a colour
    profile. `corner` is the top-left corner of the scanned part (level-0 px), where the file states one: QuPath shows only
    that part and counts from its corner.
    """

    path: str
    vendor: str
    size: tuple[int, int]
    level_downsamples: tuple[float, ...]
    mpp: tuple[float, float]
    mpp_source: str
    objective_power: float | None
    content_hash: str
    synthetic: bool
    has_icc: bool = False
    corner: tuple[int, int] = (0, 0)

    @property
    def warning(self) -> str:
        """A warning for the user of this slide; empty if there is none."""
        if self.mpp_source != "objective":
            return ""
        return f"{self.mpp[0]:g} µm per pixel is guessed from the objective power {self.objective_power:g}; give --mpp"

    def to_json(self) -> dict:
        """Plain values for a store's attributes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> SlideInfo:
        """The inverse of `to_json`."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values | lists)


class Slide:
    """An open slide. Reading is thread-safe; close it, or use it as a context manager."""

    def __init__(self, path: Path, file: Path, handle: openslide.OpenSlide | OmeTiff, info: SlideInfo):
        self.info: Final = info
        self._path = path
        self._handle = handle
        self._level_sizes = handle.level_dimensions
        self._jpeg = JpegTiles.of(file, handle)
        self._to_srgb: ImageCms.ImageCmsTransform | None = None

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._handle.close()
        if self._jpeg:
            self._jpeg.close()

    def apply_icc(self) -> None:
        """Converts all further pixels to sRGB by the file's ICC profile; a slide without a profile is assumed to be sRGB.

        Raises SlideError (`corrupt`) if the profile is damaged.
        """
        if self._to_srgb is not None or not self.info.has_icc:
            return
        try:
            profile, srgb = self._handle.color_profile, ImageCms.createProfile("sRGB")
            assert profile
            self._to_srgb = ImageCms.buildTransform(profile, srgb, "RGB", "RGB")
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            reason = f"its ICC profile is damaged ({error})"
            raise SlideError(self._path, "corrupt", reason, "copy it again, or tile without --icc") from error

    def read(self, x: int, y: int, width: int, height: int, level: int = 0) -> UInt8[np.ndarray, "y x 3"]:
        """Reads a rectangle: (x, y) is its top-left corner in level-0 px, width and height are in px of `level`.

        Pixels are white outside the slide and where the scanner recorded nothing. On levels above 0 the corner is rounded
        to a whole pixel of the level. Raises SlideError (`corrupt`) if the file is damaged there.
        """
        pixels = self._read(x, y, width, height, level)
        if self._to_srgb is None:
            return pixels
        return np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), self._to_srgb))

    def _read(self, x: int, y: int, width: int, height: int, level: int) -> np.ndarray:
        try:
            if self._jpeg and level in self._jpeg.pages:
                downsample = self.info.level_downsamples[level]
                pixels = self._jpeg.read(level, round(x / downsample), round(y / downsample), width, height)
                if pixels is not None:
                    return pixels
            rgba = np.asarray(self._handle.read_region((x, y), level, (width, height)))
        except (openslide.OpenSlideError, OSError, ValueError) as error:
            raise self._damaged(x, y, level, error) from error
        return _over_white(rgba)

    @property
    def native_tile_px(self) -> int | None:
        """The side of the native JPEG tiles of level 0; None if it has none, or tiles that are not square."""
        if not self._jpeg or 0 not in self._jpeg.pages:
            return None
        page = self._jpeg.pages[0]
        return page.tilewidth if page.tilewidth == page.tilelength else None

    def jpeg_stream(self, level: int, x: int, y: int, side: int) -> bytes | None:
        """Returns the native JPEG tile of the square at (x, y), in px of `level`; None if no tile covers exactly that square.

        It is a complete JPEG stream and decodes to the pixels that `read` returns. Raises SlideError (`corrupt`).
        """
        if not self._jpeg or level not in self._jpeg.pages or self._to_srgb is not None:
            return None
        try:
            return self._jpeg.stream_of(level, x, y, side)
        except (OSError, ValueError) as error:
            raise self._damaged(x, y, level, error) from error

    def shrunk_stream(
        self, stream: bytes, level: int, x: int, y: int, side: int, shrink: int
    ) -> UInt8[np.ndarray, "y x 3"]:
        """Decodes a stream of `jpeg_stream` at 1, 1/2, 1/4 or 1/8 of its size, faster than a whole decode.

        The result differs slightly from area means of the whole picture, because JPEG shrinks by its cosines. Raises SlideError (`corrupt`).
        """
        try:
            return JpegTiles.shrunk(stream, side, shrink)
        except ValueError as error:
            raise self._damaged(x, y, level, error) from error

    def _damaged(self, x: int, y: int, level: int, error: Exception) -> SlideError:
        where = f"damaged at ({x}, {y}) of level {level} ({error})"
        return SlideError(self._path, "corrupt", where, "copy or scan it again")

    def thumbnail(self, max_px: int) -> UInt8[np.ndarray, "y x 3"]:
        """Reads the whole slide by area means; its longer side is `max_px`, or the slide's if that is smaller.

        It reads blocks of the nearest finer level, so that memory does not grow with the slide.
        """
        width, height = self.info.size
        scale = max(1.0, max(width, height) / max_px)
        level = self._handle.get_best_level_for_downsample(scale * 1.02)
        level_width, level_height = self._level_sizes[level]
        shape = (max(1, round(width / scale)), max(1, round(height / scale)))
        shrunk = np.empty((shape[1], shape[0], 3), np.uint8)
        columns = _edges(level_width, shape[0])
        rows = _edges(level_height, shape[1])
        downsample = self.info.level_downsamples[level]
        for (top, bottom), (out_top, out_bottom) in rows:
            for (left, right), (out_left, out_right) in columns:
                corner = round(left * downsample), round(top * downsample)
                block = self.read(*corner, right - left, bottom - top, level)
                out = (out_right - out_left, out_bottom - out_top)
                shrunk[out_top:out_bottom, out_left:out_right] = cv2.resize(block, out, interpolation=cv2.INTER_AREA)
        return shrunk


def _over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return rgba[..., :3]
    weight = alpha / np.float32(255)
    return np.rint(rgba[..., :3] * weight + 255 * (1 - weight)).astype(np.uint8)


def _edges(source: int, target: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Blocks of at most about _BLOCK_PX source pixels and the target pixels that they shrink to."""
    blocks = -(-source // _BLOCK_PX)
    cuts = [round(i * target / blocks) for i in range(blocks + 1)]
    ends = [round(cut * source / target) for cut in cuts]
    return [((ends[i], ends[i + 1]), (cuts[i], cuts[i + 1])) for i in range(blocks) if cuts[i + 1] > cuts[i]]


def open_slide(
    path: str | Path, mpp: float | None = None, fallback_mpp: float | None = None, *, info_path: str | None = None
) -> Slide:
    """Opens a slide file, or a DICOM series by its folder or any of its files.

    Args:
      path: the file or folder.
      mpp: µm per level-0 px, in place of what the file states.
      fallback_mpp: µm per level-0 px where the file states none or an impossible one.
      info_path: the path that `Slide.info` states and stores record, by default `path`; empty hides it.

    Raises:
      SlideError: `missing`, `corrupt`, `unsupported`, `mpp_missing`.
      InputError: an mpp that is given is out of range.
    """
    path = Path(path)
    check_mpp(mpp)
    check_mpp(fallback_mpp)
    file = first_file(path)
    try:
        handle = OmeTiff(file) if OmeTiff.holds(file) else openslide.OpenSlide(file)
    except UnsupportedTiffError as error:
        raise _unsupported(path, str(error)) from error
    except (openslide.OpenSlideError, ValueError) as error:
        raise _refusal(path, file, error) from error
    try:
        if handle.properties.get("openslide.vendor") == "generic-tiff" and (fault := _plain_tiff_fault(file)):
            raise _unsupported(path, fault)
        info = _info(path, handle, mpp, fallback_mpp)
        return Slide(path, file, handle, info if info_path is None else replace(info, path=info_path))
    except Exception:
        handle.close()
        raise


def check_mpp(mpp: float | None) -> None:
    """Raises InputError if a given mpp is out of range."""
    if mpp is not None and not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise InputError(
            f"--mpp {mpp} is outside {MPP_RANGE[0]} to {MPP_RANGE[1]} µm per pixel; give it in micrometres"
        )


def _refusal(path: Path, file: Path, error: Exception) -> SlideError:
    with open(file, "rb") as opened:
        magic = opened.read(4)
    kind = ""
    if magic in STARTS and (fault := _whole_tiff_fault(file)):
        return _unsupported(path, fault)
    if magic in STARTS:
        kind = "a TIFF that OpenSlide cannot open: damaged, cut off, or not a tiled slide"
    elif not isinstance(error, openslide.OpenSlideUnsupportedFormatError):
        kind = "of a format that OpenSlide knows, but damaged, cut off, or of an unknown kind"
    if kind:
        return SlideError(path, "corrupt", f"{kind} ({error})", "copy it again, or export it as a tiled TIFF")
    return SlideError(path, "unsupported", f"not a slide ({error})", "crcjax doctor lists the formats")


def _unsupported(path: Path, fault: str) -> SlideError:
    reason, _, remedy = fault.rpartition("; ")
    return SlideError(path, "unsupported", reason, remedy)


def _plain_tiff_fault(file: Path) -> str:
    """Why OpenSlide would misread the layout of a TIFF that it opened, and what to do; empty if it reads it correctly."""
    try:
        with tifffile.TiffFile(file) as tiff:
            pages = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
            if not pages:
                return ""
            full = [page for page in pages if page.shape[:2] == pages[0].shape[:2]]
            if len(full) > 1:
                return f"holds {len(full)} pages of full size, and only one would be read; write each into a file"
            return tiff_fault(pages[0])
    except Exception:  # tifffile raises errors of many types for damaged directories; OpenSlide's error counts
        return ""


def _whole_tiff_fault(file: Path) -> str:
    """Why OpenSlide does not open an undamaged TIFF, and what to do; empty for one that is damaged or cut off."""
    try:
        with tifffile.TiffFile(file) as tiff:
            page = tiff.pages[0]
            assert isinstance(page, tifffile.TiffPage)
            compression = getattr(page.compression, "name", "")
            ends = [start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
            if not ends or max(ends) > file.stat().st_size:
                return ""
            if compression in _UNREAD_COMPRESSIONS:
                return f"{compression} tiles are not read; convert it to a TIFF with JPEG tiles"
            if tiff.byteorder == ">":
                return "a big-endian TIFF is not read; convert it to a little-endian one"
            return tiff_fault(page)
    except Exception:  # tifffile raises errors of many types for damaged directories
        return ""


def _info(path: Path, handle: openslide.OpenSlide | OmeTiff, given: float | None, fallback: float | None) -> SlideInfo:
    properties = handle.properties
    vendor = properties.get("openslide.vendor", "unknown")
    power = _number(properties, "openslide.objective-power")
    mpp, source = ((given, given), "given") if given is not None else _mpp(path, properties, vendor, power, fallback)
    return SlideInfo(
        path=str(path),
        vendor=vendor,
        size=handle.dimensions,
        level_downsamples=tuple(float(d) for d in handle.level_downsamples),
        mpp=mpp,
        mpp_source=source,
        objective_power=power,
        content_hash=content_hash(path),
        synthetic=PAINTED in properties.get("openslide.comment", ""),
        has_icc="openslide.icc-size" in properties,
        corner=(
            int(_number(properties, "openslide.bounds-x") or 0),
            int(_number(properties, "openslide.bounds-y") or 0),
        ),
    )


def _mpp(
    path: Path, properties: Mapping[str, str], vendor: str, power: float | None, fallback: float | None
) -> tuple[tuple[float, float], str]:
    """Micrometres per pixel and their source: the first source that states a possible value."""
    stated = [_number(properties, f"openslide.mpp-{axis}") for axis in "xy"]
    tiff = [_number(properties, f"tiff.{axis}Resolution") for axis in "XY"]
    unit_um = {"centimeter": 1e4, "inch": 25400.0}.get(properties.get("tiff.ResolutionUnit", ""), 0.0)
    sources = [
        ("tiff" if vendor == "generic-tiff" else "vendor", stated),
        ("tiff", [unit_um / value if value else None for value in tiff]),
    ]
    oblong = ""
    for source, (x, y) in sources:
        if x is not None and y is not None and all(MPP_RANGE[0] <= value <= MPP_RANGE[1] for value in (x, y)):
            if max(x, y) <= min(x, y) * (1 + _SQUARE):
                return (x, y), source
            oblong = oblong or f"states {x:.4g} µm per pixel across and {y:.4g} down, so that tiles would be stretched"
    if fallback is not None:
        return (fallback, fallback), "given"
    if oblong:
        raise SlideError(
            path, "mpp_missing", oblong, "give --mpp if its pixels are square, else scan or export it anew"
        )
    if stated[0] is not None and stated[1] is not None:  # a unit error: the rest of the file is no better
        raise SlideError(path, "mpp_missing", f"states an impossible {stated[0]:g} µm per pixel", "give --mpp")
    if power is not None and MPP_RANGE[0] <= 10 / power <= MPP_RANGE[1]:
        return (10 / power, 10 / power), "objective"
    raise SlideError(path, "mpp_missing", "does not state its micrometres per pixel", "give --mpp")


def _number(properties: Mapping[str, str], name: str) -> float | None:
    """A property that is a number above 0, else None."""
    try:
        value = float(properties[name])
    except (KeyError, ValueError):
        return None
    return value if value > 0 else None
