"""Metadata within pixels' streams and colour profiles: finds it in a compressed tile, removes it from a profile."""

from __future__ import annotations

import re
import struct
import zlib

from tifffile import COMPRESSION

JPEG = COMPRESSION.JPEG
JPEG2000 = (COMPRESSION.APERIO_JP2000_YCBC, COMPRESSION.APERIO_JP2000_RGB)
DEFLATE = (COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE)
CHECKED = {COMPRESSION.NONE, JPEG, *JPEG2000, *DEFLATE}  # the compressions that `embedded_metadata` can search

_JPEG_PIXELS = {0xC0, 0xC1, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD}  # frames, tables, scans, restart intervals
_JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_ADOBE_BYTES, _JFIF_BYTES = 14, 16  # with the length, without a thumbnail
_J2K_PIXELS = range(0x51, 0x64)  # sizes, coding, quantisation, lengths; the next is the comment
_ENCODER = re.compile(  # comments that encoders write into every stream
    rb"Kakadu-v?[\d.]+|Created by OpenJPEG version [\d.]+"
    rb"|Kdu-Layer-Info: log_2\{Delta-D\([\w-]+\)/\[?(2\^16\*)?Delta-L\(bytes\)\]?\}, L\(bytes\)[\s\d.,e+-]*"
)
_PADDING = b"\0\xff"


def embedded_metadata(stream: bytes, compression: int, raw_bytes: int) -> str:
    """Describes what a compressed tile carries beside pixels: a comment, metadata, bytes after its end; "" if nothing.

    Args:
      stream: the compressed tile.
      compression: one of `CHECKED`.
      raw_bytes: the size of the decoded tile.

    Raises:
      ValueError: the stream is damaged.
    """
    try:
        if compression == JPEG:
            return _metadata_in_jpeg(stream)
        if compression in JPEG2000:
            return _metadata_in_jpeg2000(stream)
        if compression in DEFLATE:
            inflater = zlib.decompressobj()
            size = len(inflater.decompress(stream, raw_bytes + 1))
            return "bytes after its end" if size > raw_bytes or inflater.unused_data.strip(_PADDING) else ""
    except (IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"a damaged stream ({error})") from error
    return "bytes after its end" if len(stream) > raw_bytes else ""


def _metadata_in_jpeg(stream: bytes) -> str:
    """Walks the segments of ITU-T T.81 annex B."""
    at = _after_marker(stream, 0, 0xD8)
    while True:
        while stream[at] == stream[at + 1] == 0xFF:
            at += 1
        if stream[at] != 0xFF:
            raise ValueError(f"a damaged stream (no marker at byte {at})")
        marker = stream[at + 1]
        if marker == 0xD9:
            return "bytes after its end" if stream[at + 2 :].strip(_PADDING) else ""
        (length,) = struct.unpack_from(">H", stream, at + 2)
        body = stream[at + 4 : at + 2 + length]
        adobe = marker == 0xEE and body.startswith(b"Adobe") and length == _ADOBE_BYTES
        jfif = marker == 0xE0 and body.startswith(b"JFIF\0") and length == _JFIF_BYTES
        if marker not in _JPEG_PIXELS and not adobe and not jfif:
            return "a comment" if marker == 0xFE else f"a segment of metadata (marker {marker:02X})"
        at += 2 + length
        if marker == 0xDA:
            end = _JPEG_SCAN_END.search(stream, at)
            if end is None:
                raise ValueError("a damaged stream (cut off)")
            at = end.start()


def _metadata_in_jpeg2000(stream: bytes) -> str:
    """Walks the headers of ISO/IEC 15444-1 annex A: the main one, and each tile-part's."""
    at = _after_marker(stream, 0, 0x4F)
    part_end = 0
    while True:
        if stream[at] != 0xFF:
            raise ValueError(f"a damaged stream (no marker at byte {at})")
        marker = stream[at + 1]
        if marker == 0xD9:
            return "bytes after its end" if stream[at + 2 :].strip(_PADDING) else ""
        if marker == 0x93:  # the tile-part's packets follow
            if not at < part_end <= len(stream) - 2:
                raise ValueError("a damaged stream (cut off)")
            at = part_end
            continue
        (length,) = struct.unpack_from(">H", stream, at + 2)
        body = stream[at + 4 : at + 2 + length]
        if marker == 0x90:
            (size,) = struct.unpack_from(">I", body, 2)
            part_end = at + size if size else len(stream.rstrip(_PADDING[:1])) - 2
        elif marker == 0x64:
            if not _ENCODER.fullmatch(body[2:].rstrip(b"\0")):
                return "a comment"
        elif marker not in _J2K_PIXELS:
            return f"a segment of metadata (marker {marker:02X})"
        at += 2 + length


def _after_marker(stream: bytes, at: int, wanted: int) -> int:
    if stream[at : at + 2] != bytes((0xFF, wanted)):
        raise ValueError("a damaged stream (wrong first bytes)")
    return at + 2


# The parts of a profile that define its colour transform (ICC.1:2022 section 9.2). The others, such as descriptions,
# copyright, maker, model and measurements, name the scanner, often with its serial number.
_COLOUR = {
    *(b"wtpt", b"bkpt", b"chad", b"lumi", b"gamt", b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC", b"kTRC"),
    *(b"A2B0", b"A2B1", b"A2B2", b"B2A0", b"B2A1", b"B2A2", b"D2B0", b"D2B1", b"D2B2", b"D2B3", b"B2D0", b"B2D1"),
    *(b"B2D2", b"B2D3"),
}
_NUMBERS = {b"XYZ ", b"curv", b"para", b"mft1", b"mft2", b"mAB ", b"mBA ", b"sf32", b"mpet"}
_HEADER, _TAG = 128, struct.Struct(">4sII")


def stripped_profile(profile: bytes) -> bytes:
    """The colour profile with the same transform, without its names, dates and devices. Raises ValueError if it is damaged."""
    try:
        (count,) = struct.unpack_from(">I", profile, _HEADER)
        tags = [_TAG.unpack_from(profile, _HEADER + 4 + i * _TAG.size) for i in range(min(count, 1000))]
    except struct.error as error:
        raise ValueError("a damaged colour profile") from error
    parts = {b"desc": _text(profile[8], "colour profile"), b"cprt": _text(profile[8], "none", copyright=True)}
    for name, start, size in tags:
        body = profile[start : start + size]
        if len(body) != size:
            raise ValueError("a damaged colour profile")
        if name in _COLOUR and body[:4] in _NUMBERS:
            parts[name] = body
    at, table, bodies = _HEADER + 4 + len(parts) * _TAG.size, b"", b""
    for name, body in parts.items():
        table += _TAG.pack(name, at + len(bodies), len(body))
        bodies += body + bytes(-len(body) % 4)
    header = bytearray(profile[:_HEADER])
    # Fields set to zero: software, date, platform, the device's maker, model and attributes, creator, the profile's own
    # hash, and the reserved bytes.
    for start, stop in ((4, 8), (24, 36), (40, 44), (48, 64), (80, _HEADER)):
        header[start:stop] = bytes(stop - start)
    header[:4] = struct.pack(">I", at + len(bodies))
    return bytes(header) + struct.pack(">I", len(parts)) + table + bodies


def _text(version: int, text: str, copyright: bool = False) -> bytes:
    """Encodes a text for a profile of version 4 (multiLocalizedUnicode) or 2 (textDescription; plain text for a copyright)."""
    if version >= 4:
        encoded = text.encode("utf-16-be")
        return struct.pack(">4sIII2s2sII", b"mluc", 0, 1, 12, b"en", b"US", len(encoded), 28) + encoded
    plain = text.encode() + b"\0"
    if copyright:
        return b"text" + bytes(4) + plain
    return b"desc" + bytes(4) + struct.pack(">I", len(plain)) + plain + bytes(4 + 4 + 2 + 1 + 67)
