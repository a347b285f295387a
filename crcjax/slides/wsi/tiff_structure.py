"""Reads the directories of a TIFF file in Python before native code decodes it, and refuses what no slide has.

Native readers have crashed, run without end or taken all memory on directories that lead back to themselves, on tiles of
2**30 px, on 65,529 samples a pixel, and on a few bytes that unpack to terabytes. Nothing here is decoded, and memory is bounded
by the tables of the tiles' places.

TIFF 6.0; BigTIFF as libtiff describes it. Hamamatsu's NDPI files store only the lower half of offsets beyond 4 GiB, and each
level as one JPEG that is read in parts: they are recognised by their own tag and held to the rules that they can keep.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_DIRECTORIES = 256  # levels and focal planes, thumbnail, label
MAX_TAGS = 512
MAX_SIDE = 4_000_000  # px
MAX_PIXELS = 10**12
MAX_SAMPLES = 4
MAX_CHUNK_BYTES = 1 << 30  # a tile or strip, decoded
MAX_RATIO = 10_000  # decoded over stored bytes; deflate reaches 1,030
MAX_VALUE_BYTES = 1 << 28
# None, CCITT (3), LZW, JPEG (2), deflate, JPEG XR, PackBits, deflate, JPEG 2000 of Aperio (3), JPEG 2000, zstd, WebP.
COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 22610, 32773, 32946, 33003, 33004, 33005, 34712, 50000, 50001))
_NDPI_TAG = 65420
_SUB_DIRECTORIES = 330
_TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 5: "Q", 6: "b", 7: "B", 8: "h", 9: "i", 10: "q"}
_TYPES |= {11: "f", 12: "d", 13: "I", 16: "Q", 17: "q", 18: "Q"}


class StructureError(ValueError):
    """A file has no structure that a slide may have; the text says what was found and what is allowed."""


@dataclass(frozen=True)
class _Layout:
    """Byte order and widths of a file: classic TIFF has offsets of 4 bytes, BigTIFF of 8."""

    order: str
    count: str
    offset: str
    size: int


def check_tiff(file: io.BufferedIOBase, size: int) -> None:
    """Walks all directories of a TIFF file that is open for reading.

    Args:
      file: the file; its position changes.
      size: its length in bytes.

    Raises:
      StructureError: the first thing that is not allowed.
    """
    start = _read(file, 0, 16 if size >= 16 else min(size, 8), size)
    if start[:4] not in STARTS:
        raise StructureError("does not begin as a TIFF file")
    order = "<" if start[:2] == b"II" else ">"
    big = start[2:4] in (b"+\0", b"\0+")
    layout = _Layout(order, "Q" if big else "H", "Q" if big else "I", size)
    if big and struct.unpack(order + "HH", start[4:8]) != (8, 0):
        raise StructureError("is a BigTIFF whose offsets are not 8 bytes long")
    first = struct.unpack(order + layout.offset, start[8:16] if big else start[4:8])[0]
    if not first:
        raise StructureError("has no directory")
    pending, visited = [first], set()
    while pending:
        offset = pending.pop()
        while offset:
            if offset in visited:
                raise StructureError(f"has a directory at byte {offset} that leads back to itself")
            visited.add(offset)
            if len(visited) > MAX_DIRECTORIES:
                raise StructureError(f"has over {MAX_DIRECTORIES} directories")
            tags, offset = _directory(file, offset, layout)
            _check_image(file, tags, layout)
            if _SUB_DIRECTORIES in tags:
                pending += [int(value) for value in _numbers(file, tags, _SUB_DIRECTORIES, layout)]


# A tag's type, its count of values, and the offset of the values.
_Tags = Mapping[int, tuple[int, int, int]]


def _directory(file: io.BufferedIOBase, offset: int, layout: _Layout) -> tuple[_Tags, int]:
    """The tags of a directory, and the offset of the next one, 0 for none."""
    count_bytes, offset_bytes = struct.calcsize(layout.count), struct.calcsize(layout.offset)
    count = struct.unpack(layout.order + layout.count, _read(file, offset, count_bytes, layout.size))[0]
    if not 0 < count <= MAX_TAGS:
        raise StructureError(f"has a directory of {count} tags; 1 to {MAX_TAGS} are allowed")
    entry_bytes = 4 + 2 * offset_bytes
    table = _read(file, offset + count_bytes, count * entry_bytes + offset_bytes, layout.size)
    tags = {}
    for number in range(count):
        entry = table[number * entry_bytes : (number + 1) * entry_bytes]
        code, kind, length = struct.unpack(layout.order + "HH" + layout.offset, entry[: 4 + offset_bytes])
        if kind not in _TYPES:
            # Readers pass over types that they do not know.
            continue
        value_bytes = length * struct.calcsize(_TYPES[kind])
        place = offset + count_bytes + number * entry_bytes + 4 + offset_bytes
        if value_bytes > offset_bytes:
            place = struct.unpack(layout.order + layout.offset, entry[4 + offset_bytes :])[0]
        if value_bytes > MAX_VALUE_BYTES:
            raise StructureError(f"has a tag {code} of {value_bytes} bytes; up to {MAX_VALUE_BYTES} are allowed")
        tags[code] = (kind, length, place)
    is_ndpi = _NDPI_TAG in tags
    for code, (kind, length, place) in tags.items():
        # The upper halves of NDPI's offsets stand elsewhere.
        if not is_ndpi and place + length * struct.calcsize(_TYPES[kind]) > layout.size:
            raise StructureError(f"has a tag {code} whose value lies beyond the end of the file")
    # The directory of an NDPI file ends with a link of 8 bytes; its upper half counts in files over 4 GiB alone.
    return tags, struct.unpack(layout.order + layout.offset, table[-offset_bytes:])[0]


def _check_image(file: io.BufferedIOBase, tags: _Tags, layout: _Layout) -> None:
    if 256 not in tags or 257 not in tags:
        return
    width, height = (_number(file, tags, code, layout) for code in (256, 257))
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise StructureError(
            f"has an image of {width} x {height} px; sides up to {MAX_SIDE} px and {MAX_PIXELS:.0e} px in all are allowed"
        )
    samples = _number(file, tags, 277, layout, 1)
    if not 1 <= samples <= MAX_SAMPLES:
        raise StructureError(f"has an image with {samples} samples a pixel; 1 to {MAX_SAMPLES} are allowed")
    bits = _numbers(file, tags, 258, layout) if 258 in tags else np.ones(1, int)
    if not (0 < len(bits) <= samples and bits.min() >= 1 and bits.max() <= 32):
        raise StructureError(
            f"has samples of {', '.join(map(str, bits[:8]))} bits; up to 32, once a sample, are allowed"
        )
    compression = _number(file, tags, 259, layout, 1)
    if compression not in COMPRESSIONS:
        raise StructureError(f"has an image with compression {compression}, which no slide format uses")
    planes = samples if _number(file, tags, 284, layout, 1) == 2 else 1
    _check_chunks(file, tags, layout, (width, height, planes), int(bits.max()) * samples // planes)


def _check_chunks(
    file: io.BufferedIOBase, tags: _Tags, layout: _Layout, shape: tuple[int, int, int], bits: int
) -> None:
    """Holds the tiles or strips of an image against its size and the file.

    Args:
      shape: width, height, and the number of planes that are stored apart.
      bits: of a pixel within a plane.
    """
    width, height, planes = shape
    tiled = 322 in tags or 323 in tags or 324 in tags
    if tiled:
        across, down = (_number(file, tags, code, layout) for code in (322, 323))
    else:
        across, down = width, min(height, _number(file, tags, 278, layout, height))
    if not (0 < across <= MAX_SIDE and 0 < down <= MAX_SIDE):
        raise StructureError(f"has tiles of {across} x {down} px; sides up to {MAX_SIDE} px are allowed")
    is_ndpi = _NDPI_TAG in tags
    chunk_bytes = (across * down * bits + 7) // 8
    if chunk_bytes > MAX_CHUNK_BYTES and not is_ndpi:
        raise StructureError(f"has a tile or strip of {chunk_bytes} bytes; up to {MAX_CHUNK_BYTES} are allowed")
    offsets_code, counts_code = (324, 325) if tiled else (273, 279)
    if offsets_code not in tags or counts_code not in tags:
        raise StructureError("has an image without the places of its tiles or strips")
    expected = -(-width // across) * -(-height // down) * planes
    stated = tags[offsets_code][1], tags[counts_code][1]
    if stated != (expected, expected):
        raise StructureError(
            f"has an image of {expected} tiles or strips, and places of {stated[0]} and lengths of {stated[1]}"
        )
    if is_ndpi:
        return
    offsets, counts = (_numbers(file, tags, code, layout).astype(np.uint64) for code in (offsets_code, counts_code))
    # A tile that the scanner left out has no bytes; its place counts for nothing.
    stored = counts > 0
    if not stored.any():
        return
    offsets, counts = offsets[stored], counts[stored]
    # Each alone first: the sum of two large ones would wrap.
    if max(offsets.max(), counts.max()) > layout.size or (offsets + counts).max() > layout.size:
        raise StructureError("has tiles or strips beyond the end of the file; it may be cut off")
    decoded = len(counts) * chunk_bytes
    if decoded > MAX_RATIO * int(counts.sum()):
        raise StructureError(
            f"has {int(counts.sum())} bytes that unpack to {decoded}; up to {MAX_RATIO} times as many are allowed"
        )


def _number(file: io.BufferedIOBase, tags: _Tags, code: int, layout: _Layout, default: int | None = None) -> int:
    if code not in tags:
        if default is None:
            raise StructureError(f"has an image without tag {code}")
        return default
    return int(_numbers(file, tags, code, layout)[0])


def _numbers(file: io.BufferedIOBase, tags: _Tags, code: int, layout: _Layout) -> np.ndarray:
    """The values of a tag, one at least, which must be whole numbers."""
    kind, count, place = tags[code]
    numbers = np.dtype(layout.order + _TYPES[kind])
    if not count or numbers.kind not in "iu":
        raise StructureError(f"has a tag {code} without whole numbers")
    return np.frombuffer(_read(file, place, count * numbers.itemsize, layout.size), numbers)


def _read(file: io.BufferedIOBase, offset: int, count: int, size: int) -> bytes:
    if offset + count > size:
        raise StructureError(f"points to byte {offset + count} of {size}; it may be cut off")
    file.seek(offset)
    content = file.read(count)
    if len(content) != count:
        raise StructureError("became shorter while it was read")
    return content
