"""Compares a written copy with its original, and searches its bytes for texts that were to be removed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import openslide
import tifffile

from crcjax.errors import SlideError
from crcjax.slides.deidentify.tiff_contents import LONGEST_TEXT, tiff_pages, without_zeros
from crcjax.slides.deidentify.tiff_rewriter import COPIED_TAGS, read_metadata, read_streams
from crcjax.slides.wsi.slide import open_slide

MPP_PROPERTIES = ("openslide.mpp-x", "openslide.mpp-y")
_SAME_MPP = 1e-6  # relative: the precision with which the copy's tags state it
_SHORTEST_IN_TILES = 7  # bytes: shorter texts occur by chance in gigabytes of tiles
_BLOCK_BYTES = 4 << 20
_SQUARE_PX, _SQUARES = 256, 4  # compared squares of every level


@dataclass(frozen=True)
class SlideScale:
    """The size (px) that crcjax reads of a slide, and its µm per px; None where the slide does not state them."""

    size: tuple[int, int]
    mpp: tuple[float, float] | None


def slide_scale(path: Path) -> SlideScale:
    """Reads a slide's size and scale. Raises SlideError if crcjax cannot open the slide."""
    with open_slide(path, fallback_mpp=1.0) as slide:
        return SlideScale(slide.info.size, None if slide.info.mpp_source == "given" else slide.info.mpp)


def openslide_difference(original: openslide.OpenSlide, copy: Path) -> str:
    """The first difference between the original and the copy that OpenSlide reads; "" if there is none."""
    try:
        copied = openslide.OpenSlide(min(copy.iterdir()) if copy.is_dir() else copy)
    except openslide.OpenSlideError:
        return "OpenSlide cannot open it"
    with copied:
        for name in ("openslide.vendor", "openslide.objective-power"):
            if original.properties.get(name) != copied.properties.get(name):
                return name
        if copied.level_dimensions != original.level_dimensions:
            return "other levels"
        if len(copied.associated_images):
            return "an associated image"
        for level, (width, height) in enumerate(original.level_dimensions):
            for i in range(_SQUARES):
                scale = original.level_downsamples[level] * (i + 0.5) / _SQUARES
                corner = int(width * scale), int(height * scale)
                expected = original.read_region(corner, level, (_SQUARE_PX, _SQUARE_PX))
                try:
                    pixels = copied.read_region(corner, level, (_SQUARE_PX, _SQUARE_PX))
                except openslide.OpenSlideError:
                    return f"unreadable pixels at {corner} of level {level}"
                if expected.tobytes() != pixels.tobytes():
                    return f"other pixels at {corner} of level {level}"
    return ""


def scale_difference(scale: SlideScale, copy: Path) -> str:
    """How the size or scale that crcjax reads of the copy differs from the original's; "" if it does not."""
    try:
        copied = slide_scale(copy)
    except SlideError:
        return "crcjax cannot open it"
    if copied.size != scale.size:
        return "another size"
    if scale.mpp is None:
        return "" if copied.mpp is None else "other micrometres per pixel"
    return "" if same_mpp(scale.mpp, copied.mpp) else "other micrometres per pixel"


def same_mpp(mpp: Sequence[float], other: Sequence[float] | None) -> bool:
    """Whether two scales are equal, up to the rounding of the copy's tags."""
    return other is not None and bool(np.allclose(mpp, other, rtol=_SAME_MPP, atol=0))


def leak_in_tiff(copy: Path, streams: str, removed_texts: set[bytes]) -> str:
    """Names an identifier that the copy still contains; "" if there is none.

    Args:
      copy: a TIFF.
      streams: the hash of the original's compressed tiles.
      removed_texts: what the original says and the copy must not.
    """
    digest = hashlib.sha256()
    with tifffile.TiffFile(copy) as tiff, open(copy, "rb") as source:
        pages = tiff_pages(tiff)
        for page in pages:
            for _ in read_streams(source, page, digest):
                pass
        if digest.hexdigest() != streams:
            return "other tiles"
        if any(tag.code not in COPIED_TAGS for page in pages for tag in page.tags):
            return "a tag that is not on the list"
        metadata = without_zeros(read_metadata(source, pages))
        if any(text in metadata for text in removed_texts):
            return "a text among its tags that was to be removed"
    return leak_in_file(copy, removed_texts)


def leak_in_file(path: Path, removed_texts: set[bytes]) -> str:
    """Says that one of the longer texts occurs anywhere in the file; "" if none does."""
    long_texts = [text for text in removed_texts if len(text) >= _SHORTEST_IN_TILES]
    with open(path, "rb") as source:
        leaks = any(text in printable for printable in _printable(source) for text in long_texts)
    return "a text among its tiles that was to be removed" if leaks else ""


def _printable(source: BinaryIO) -> Iterator[bytes]:
    """Yields the runs of at least `_SHORTEST_IN_TILES` printable bytes, block by block.

    In compressed data these are a thousandth of the bytes.
    """
    previous_end = b""
    while block := source.read(_BLOCK_BYTES):
        data = np.frombuffer(previous_end + block, np.uint8)
        # True where this byte and the ones after it, first 1, then 2, 4 and 7 in all, are printable.
        run = data - np.uint8(32) < 95
        for step in (1, 2, _SHORTEST_IN_TILES - 4):
            run = run[:-step] & run[step:]
        inside = np.zeros(len(data), bool)
        inside[np.flatnonzero(run)[:, None] + np.arange(_SHORTEST_IN_TILES)] = True
        places = np.flatnonzero(inside)
        yield bytes(np.insert(data[places], np.flatnonzero(np.diff(places) > 1) + 1, 0))
        previous_end = bytes(data[-LONGEST_TEXT:])
