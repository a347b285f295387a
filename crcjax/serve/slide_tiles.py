"""The pixels of slides for viewers: Deep Zoom tiles, thumbnails and squares as JPEG.

Deep Zoom (the format of OpenSeadragon and others) halves a slide from level to level: the last one, `max_level`, is the slide's
level 0, and level 0 is a single pixel. Tiles do not overlap. Open slides and encoded tiles are cached within bounds. The label
and macro images of a slide file, which may show a name, are never read.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8

from crcjax.errors import CrcjaxError, InputError, SlideError
from crcjax.serve.slide_records import SlideRecord
from crcjax.serve.vault import Vault
from crcjax.slides.wsi.slide import Slide, open_slide

Value = TypeVar("Value")

# Part of every ETag: a change of the pixels or of their encoding changes it.
ENCODING = "1"
_QUALITY = 85
_DEFAULT_TILE_PX = 512
# Native JPEG tiles of other sizes are too many requests, or too slow to decode.
_NATIVE_TILE_PX = (240, 256, 512, 1024)
# A tile with more source pixels than this is put together from tiles of the next finer level.
_MAX_SOURCE_PX = 16 << 20
_MAX_OPEN_SLIDES = 64
# Of encrypted slides, whose files are in memory while they are open.
_MAX_DECRYPTED_BYTES = 8 << 30
_MAX_CACHED_BYTES = 256 << 20
# A slide's level counts as the power of two that it is to within one of its pixels over the whole slide.
_LEVEL_TOLERANCE_PX = 1.0


class SlideUnreadableError(CrcjaxError):
    """The pixels of a slide cannot be read."""


class NoSuchTileError(CrcjaxError):
    """The slide has no tile or square there."""


@dataclass(frozen=True)
class SlideImage:
    """What a viewer must know of a slide: its size (px at level 0), its tiles, and its resolution (µm per level-0 px)."""

    width: int
    height: int
    tile_px: int
    max_level: int
    mpp: float
    objective_power: float | None
    synthetic: bool

    def level_size(self, level: int) -> tuple[int, int]:
        """The width and height of a Deep Zoom level. Raises NoSuchTileError."""
        if not 0 <= level <= self.max_level:
            raise NoSuchTileError(f"level must be 0 to {self.max_level}, got {level}")
        downsample = 1 << (self.max_level - level)
        return -(-self.width // downsample), -(-self.height // downsample)

    def tile_box(self, level: int, column: int, row: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of a tile, in px of its level. Raises NoSuchTileError."""
        width, height = self.level_size(level)
        left, top = column * self.tile_px, row * self.tile_px
        if not (0 <= left < width and 0 <= top < height):
            raise NoSuchTileError(f"level {level} has no tile in column {column}, row {row}")
        return left, top, min(self.tile_px, width - left), min(self.tile_px, height - top)


class SlideTiles:
    """Reads slides for viewers; thread-safe.

    Args:
      vault: decrypts slides into memory, where they stay while they are open.
    """

    def __init__(self, vault: Vault) -> None:
        self._vault, self._opening = vault, threading.Lock()
        self._slides: _Bounded[_Open] = _Bounded(
            _MAX_DECRYPTED_BYTES, lambda slide: max(slide.memory, _MAX_DECRYPTED_BYTES // _MAX_OPEN_SLIDES)
        )
        self._tiles: _Bounded[bytes] = _Bounded(_MAX_CACHED_BYTES, len)

    def image(self, record: SlideRecord) -> SlideImage:
        """The facts of a slide. Raises SlideUnreadableError."""
        return self._open(record).image

    def cached_tile(self, record: SlideRecord, level: int, column: int, row: int) -> bytes | None:
        """A tile if it is in memory: never waits for a disk."""
        return self._tiles.get((record.content, level, column, row))

    def tile(self, record: SlideRecord, level: int, column: int, row: int) -> bytes:
        """A tile as JPEG: the slide's native one where it fits. Raises NoSuchTileError, SlideUnreadableError."""
        key = (record.content, level, column, row)
        encoded = self._tiles.get(key)
        if encoded is None:
            opened = self._open(record)
            slide, image = opened.slide, opened.image
            box = image.tile_box(level, column, row)
            with _readable(record):
                encoded = _native(slide, image, level, box) or _jpeg(self._pixels(slide, image, level, box))
            self._tiles.put(key, encoded)
        return encoded

    def _pixels(self, slide: Slide, image: SlideImage, level: int, box: tuple[int, int, int, int]) -> np.ndarray:
        """The pixels of a rectangle of a level, by area means of the nearest finer level of the slide."""
        left, top, width, height = box
        downsample = 1 << (image.max_level - level)
        source = _source_level(slide, float(downsample))
        ratio = downsample / slide.info.level_downsamples[source]
        if level < image.max_level and width * height * ratio**2 > _MAX_SOURCE_PX:
            finer_width, finer_height = image.level_size(level + 1)
            finer = 2 * left, 2 * top, min(2 * width, finer_width - 2 * left), min(2 * height, finer_height - 2 * top)
            return _shrunk(self._in_quarters(slide, image, level + 1, finer), width, height)
        # The last tile of a row or column ends with the slide, also where its last pixel is wider than what is left of it.
        scale = slide.info.level_downsamples[source]
        source_width = max(1, round(_within(left, width, image.width, downsample) / scale))
        source_height = max(1, round(_within(top, height, image.height, downsample) / scale))
        pixels = slide.read(left * downsample, top * downsample, source_width, source_height, source)
        return _shrunk(pixels, width, height)

    def _in_quarters(self, slide: Slide, image: SlideImage, level: int, box: tuple[int, int, int, int]) -> np.ndarray:
        left, top, width, height = box
        rows = []
        for y, part_height in _halves(top, height):
            parts = [
                self._pixels(slide, image, level, (x, y, part_width, part_height))
                for x, part_width in _halves(left, width)
            ]
            rows.append(np.concatenate(parts, axis=1))
        return np.concatenate(rows)

    def square(self, record: SlideRecord, x: int, y: int, side: int, px: int) -> bytes:
        """A square of the slide as JPEG: its corner and side are in level-0 px, and it is `px` pixels wide.

        Raises NoSuchTileError for one that is not on the slide or too large, SlideUnreadableError.
        """
        opened = self._open(record)
        slide, image = opened.slide, opened.image
        if not (-side < x < image.width and -side < y < image.height):
            raise NoSuchTileError(f"x and y must lie on the slide, {image.width} x {image.height} px, got {x}, {y}")
        source = _source_level(slide, side / px)
        source_px = max(1, round(side / slide.info.level_downsamples[source]))
        if source_px**2 > _MAX_SOURCE_PX:
            raise NoSuchTileError(f"side must be smaller at {px} px, got {side}")
        with _readable(record):
            pixels = slide.read(x, y, source_px, source_px, source)
        interpolation = cv2.INTER_AREA if source_px >= px else cv2.INTER_CUBIC
        return _jpeg(cv2.resize(pixels, (px, px), interpolation=interpolation))

    def thumbnail(self, record: SlideRecord, max_px: int) -> bytes:
        """The whole slide as JPEG; its longer side is `max_px`, or the slide's if that is smaller. Raises SlideUnreadableError."""
        key = (record.content, "thumbnail", max_px)
        encoded = self._tiles.get(key)
        if encoded is None:
            opened = self._open(record)
            with _readable(record):
                encoded = _jpeg(opened.slide.thumbnail(max_px))
            self._tiles.put(key, encoded)
        return encoded

    def _open(self, record: SlideRecord) -> _Open:
        key = (record.content, record.path, record.mpp)
        opened = self._slides.get(key)
        if opened is None:
            # One at a time, so that no slide is decrypted twice.
            with self._opening:
                opened = self._slides.get(key) or self._slides.put(key, _opened(self._vault, record))
        return opened


@dataclass(frozen=True)
class _Open:
    """An open slide, and the bytes of memory that its decrypted file takes."""

    slide: Slide
    image: SlideImage
    memory: int


def _opened(vault: Vault, record: SlideRecord) -> _Open:
    stack = ExitStack()
    with _readable(record), stack:
        payload = stack.enter_context(
            vault.readable_slides({"slides": [{"path": str(record.path), "site": record.site}]})
        )
        path = Path(payload["slides"][0]["path"])
        slide = open_slide(path, record.mpp)
        if slide.info.content_hash != record.content:
            slide.close()
            raise SlideUnreadableError(f"{record.name}: its file has changed since it was added; add it again")
        opened = _Open(slide, _image(slide), 0 if path == record.path else path.stat().st_size)
        # The decrypted file goes once the slide was dropped and no thread reads it any more.
        weakref.finalize(slide, stack.pop_all().close)
    return opened


def _image(slide: Slide) -> SlideImage:
    width, height = slide.info.size
    return SlideImage(
        width=width,
        height=height,
        tile_px=slide.native_tile_px if slide.native_tile_px in _NATIVE_TILE_PX else _DEFAULT_TILE_PX,
        max_level=math.ceil(math.log2(max(width, height))),
        mpp=slide.info.mpp[0],
        objective_power=slide.info.objective_power,
        synthetic=slide.info.synthetic,
    )


def _native(slide: Slide, image: SlideImage, level: int, box: tuple[int, int, int, int]) -> bytes | None:
    """The slide's native JPEG tile, if one covers exactly this whole tile."""
    left, top, width, height = box
    source = _same_level(slide, image, level)
    if source is None or (width, height) != (image.tile_px, image.tile_px):
        return None
    return slide.jpeg_stream(source, left, top, image.tile_px)


def _same_level(slide: Slide, image: SlideImage, level: int) -> int | None:
    """The slide's level that is this Deep Zoom level: no pixel of it is off by more than one."""
    downsample = 1 << (image.max_level - level)
    width = image.level_size(level)[0]
    for number, value in enumerate(slide.info.level_downsamples):
        if abs(value / downsample - 1) * width <= _LEVEL_TOLERANCE_PX:
            return number
    return None


def _source_level(slide: Slide, downsample: float) -> int:
    """The coarsest level of the slide that is at least as fine, with 1 % of tolerance."""
    levels = [n for n, value in enumerate(slide.info.level_downsamples) if value <= downsample * 1.01]
    return levels[-1] if levels else 0


def _halves(start: int, length: int) -> list[tuple[int, int]]:
    first = (length + 1) // 2
    return [(start, first), (start + first, length - first)] if length > first else [(start, first)]


def _within(start: int, length: int, whole: int, downsample: int) -> int:
    """The level-0 px of a stretch of a level that lie on the slide."""
    return min(length * downsample, whole - start * downsample)


def _shrunk(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def _jpeg(pixels: UInt8[np.ndarray, "y x 3"]) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=_QUALITY, colorsubsampling="420")


@contextmanager
def _readable(record: SlideRecord) -> Iterator[None]:
    """Turns errors of a slide file into SlideUnreadableError, which names no path."""
    try:
        yield
    except SlideError as error:
        raise SlideUnreadableError(f"{record.name}: {error.reason}; {error.remedy}") from error
    except (InputError, OSError, ValueError) as error:
        raise SlideUnreadableError(f"{record.name}: cannot be read; check the file") from error


class _Bounded(Generic[Value]):
    """The values that were used last, up to a total size but at least one; thread-safe."""

    def __init__(self, capacity: int, size: Callable[[Value], int]):
        self._capacity, self._size, self._total = capacity, size, 0
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: Hashable, value: Value) -> Value:
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._total += self._size(value)
            while self._total > self._capacity and len(self._values) > 1:
                _, dropped = self._values.popitem(last=False)
                self._total -= self._size(dropped)
        return value
