"""Rewrites a tiled TIFF from allow-listed tags and the compressed tiles of the original, copied byte for byte.

tifffile reads the original but does not write the copy. Given the same compressed tiles, its writer declares Aperio's
RGB JPEG tiles as YCbCr, so that readers decode other colours, and adds tags that the original does not have
(ReferenceBlackWhite, a resolution of 1/1). A de-identified copy must hold no tag that was not asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import tifffile

from crcjax.slides.deidentify.embedded_metadata import JPEG, embedded_metadata, stripped_profile
from crcjax.slides.wsi.slide import PAINTED

TILE_OFFSETS, TILE_BYTES, DESCRIPTION, JPEG_TABLES, PROFILE = 324, 325, 270, 347, 34675
# The allow-list. Numbers that decoding needs and, in 282, 283 and 296, the micrometres per pixel.
_NUMERIC_TAGS = {254, 256, 257, 258, 259, 262, 274, 277, 282, 283, 284, 296, 317, 322, 323, 338, 339, 530, 531, 532}
COPIED_TAGS = _NUMERIC_TAGS | {TILE_OFFSETS, TILE_BYTES, JPEG_TABLES, PROFILE, DESCRIPTION}
_NUMERIC_TYPES = {1: 1, 3: 2, 4: 4, 5: 8, 16: 8}  # TIFF's numbers without sign, and their bytes
_MOST_VALUES = 8  # of a numeric tag, so that it has no room for a text
COPIED_KEYS = ("AppMag", "MPP")  # of the Aperio description
_MOST_BYTES = 1 << 24  # read of a tag, so that a damaged count does not fill the memory
_CENTIMETER = 3  # of ResolutionUnit
_PER_CM_STEPS = 10_000  # resolutions of 0.05 to 20 µm per px fit in 32 bits, to within 1e-7
_NUMBER = re.compile(r"\d{1,3}(\.\d{1,6})?")


class UnsafeError(Exception):
    """A slide that cannot be copied safely; the message gives the reason and the place. An empty `remedy` is the usual one."""

    def __init__(self, message: str, remedy: str = ""):
        super().__init__(message)
        self.remedy = remedy


@dataclass(frozen=True)
class PagePlan:
    """One image of the copy: the original's page, from which the tiles are copied, and the new tags.

    `tags` are (type, count, bytes) by code; `raw_bytes` is the size of a decoded tile.
    """

    page: tifffile.TiffPage
    tags: dict[int, tuple[int, int, bytes]]
    raw_bytes: int


def plan_page(
    page: tifffile.TiffPage, source: BinaryIO, mpp: tuple[float, float] | None = None, order: str = "<"
) -> PagePlan:
    """Plans the copy of one image.

    Args:
      page: the image.
      source: its file, open.
      mpp: µm per px in x and y to write as the image's resolution, where its own tags do not state it.
      order: the file's byte order, "<" or ">".

    Raises:
      UnsafeError: the image carries something that cannot be copied safely.
      ValueError: the image is damaged.
    """
    tags: dict[int, tuple[int, int, bytes]] = {}
    for tag in page.tags:
        if tag.code in _NUMERIC_TAGS and tag.dtype in _NUMERIC_TYPES and tag.count <= _MOST_VALUES:
            tags[tag.code] = (int(tag.dtype), tag.count, raw_value(source, tag))
        elif tag.code == JPEG_TABLES:
            tables = raw_value(source, tag)
            if metadata := embedded_metadata(tables, JPEG, 0):
                raise UnsafeError(f"the tables of image {page.index} carry {metadata}, and would be copied unchanged")
            tags[tag.code] = (7, len(tables), tables)
        elif tag.code == PROFILE:
            profile = stripped_profile(raw_value(source, tag))
            tags[tag.code] = (7, len(profile), profile)
    if mpp:
        tags |= _resolution(mpp, order)
    if page.index == 0 and page.description.startswith("Aperio"):
        text = _stripped_description(page).encode() + b"\0"
        tags[DESCRIPTION] = (2, len(text), text)
    across, down = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    if not len(page.dataoffsets) == len(page.databytecounts) == across * down * planes:
        raise ValueError(f"image {page.index} has a wrong number of tiles")
    if sum(page.databytecounts) > os.fstat(source.fileno()).st_size:
        raise ValueError(f"the tiles of image {page.index} overlap")
    samples = page.tilewidth * page.tilelength * (page.samplesperpixel // planes)
    return PagePlan(page, tags, samples * -(-page.bitspersample // 8))


def _resolution(mpp: tuple[float, float], order: str) -> dict[int, tuple[int, int, bytes]]:
    """The tags XResolution, YResolution and ResolutionUnit in pixels per centimetre."""
    per_cm = [struct.pack(order + "II", round(1e4 / size * _PER_CM_STEPS), _PER_CM_STEPS) for size in mpp]
    return {282: (5, 1, per_cm[0]), 283: (5, 1, per_cm[1]), 296: (3, 1, struct.pack(order + "H", _CENTIMETER))}


def raw_value(source: BinaryIO, tag: tifffile.TiffTag) -> bytes:
    """A tag's bytes in the file; for unsigned numbers and texts only."""
    source.seek(tag.valueoffset)
    return source.read(min(tag.count * _NUMERIC_TYPES.get(int(tag.dtype), 1), _MOST_BYTES))


def _stripped_description(page: tifffile.TiffPage) -> str:
    """An Aperio description with the sizes and the numbers of `COPIED_KEYS` alone."""
    pairs = [piece.partition("=") for piece in page.description.split("|")[1:]]
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    about = PAINTED if PAINTED in page.description else "Image Library"
    text = f"Aperio {about}\r\n{page.imagewidth}x{page.imagelength} ({page.tilewidth}x{page.tilelength})"
    return text + "".join(f"|{key} = {fields[key]}" for key in COPIED_KEYS if _NUMBER.fullmatch(fields.get(key, "")))


def write_tiff(source: BinaryIO, out: BinaryIO, plans: list[PagePlan], order: str, big: bool) -> str:
    """Writes the copy; each image's tiles come before its tags.

    Args:
      source: the original, open.
      out: the copy, open.
      plans: its images.
      order: its byte order, "<" or ">".
      big: whether it is a BigTIFF.

    Returns:
      The hash of the compressed tiles.

    Raises:
      UnsafeError: a tile carries something beside pixels.
      ValueError: a tile is damaged.
    """
    pointer, digest = struct.Struct(order + ("Q" if big else "I")), hashlib.sha256()
    out.write(b"II" if order == "<" else b"MM")
    out.write(struct.pack(order + "HHH", 43, 8, 0) if big else struct.pack(order + "H", 42))
    # The place in the file where the offset of the next image's tags is written.
    link = out.tell()
    out.write(bytes(pointer.size))
    for plan in plans:
        offsets = []
        for stream in read_streams(source, plan.page, digest):
            if stream and (metadata := embedded_metadata(stream, plan.page.compression, plan.raw_bytes)):
                raise UnsafeError(
                    f"a tile of image {plan.page.index} carries {metadata}, and tiles are copied unchanged"
                )
            offsets.append(out.tell() if stream else 0)
            out.write(stream)
        numbers = {TILE_OFFSETS: offsets, TILE_BYTES: plan.page.databytecounts}
        tags = dict(plan.tags)
        for code, values in numbers.items():
            tags[code] = (
                16 if big else 4,
                len(values),
                struct.pack(f"{order}{len(values)}{pointer.format[-1]}", *values),
            )
        start, next_link = _write_tags(out, tags, order, big)
        out.seek(link)
        out.write(pointer.pack(start))
        out.seek(0, os.SEEK_END)
        link = next_link
    return digest.hexdigest()


def read_streams(source: BinaryIO, page: tifffile.TiffPage, digest: Any) -> Iterator[bytes]:
    """Yields the compressed tiles, b"" for one that was not recorded, and adds each to the digest. Raises ValueError."""
    for i, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        source.seek(offset)
        stream = source.read(count)
        if len(stream) != count:
            raise ValueError(f"cut off in tile {i} of image {page.index}")
        digest.update(f"{page.imagewidth} {i} {count} ".encode())
        digest.update(stream)
        yield stream


def _write_tags(out: BinaryIO, tags: dict[int, tuple[int, int, bytes]], order: str, big: bool) -> tuple[int, int]:
    """Writes an image's tags; returns the offset of the tags, and the place for the offset of the next image's."""
    entry, number, room = ("HHQ", "Q", 8) if big else ("HHI", "H", 4)
    table = struct.pack(order + number, len(tags))
    for code, (kind, count, value) in sorted(tags.items()):
        if len(value) > room:
            out.write(bytes(-out.tell() % 8))
            place = struct.pack(order + ("Q" if big else "I"), out.tell())
            out.write(value)
        else:
            place = value.ljust(room, b"\0")
        table += struct.pack(order + entry, code, kind, count) + place
    out.write(bytes(-out.tell() % 8))
    start = out.tell()
    out.write(table + bytes(room))
    return start, start + len(table)


def read_metadata(source: BinaryIO, pages: list[tifffile.TiffPage]) -> bytes:
    """All bytes of a file outside its tiles."""
    tiles = sorted(
        (offset, offset + count)
        for page in pages
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        if count
    )
    size, at, parts = os.fstat(source.fileno()).st_size, 0, []
    for start, stop in [*tiles, (size, size)]:
        if start > at:
            source.seek(at)
            parts.append(source.read(start - at))
        at = stop
    return b"\n".join(parts)
