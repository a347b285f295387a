"""Files from an enemy are refused by their structure, before native code reads them; slides pass."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from crcjax.slides.wsi.tiff_structure import MAX_DIRECTORIES, STARTS, StructureError, check_tiff

Tags = dict[int, tuple[str, list[int]]]
# One tile of 16 x 16 RGB pixels, uncompressed; its place is filled in.
IMAGE: Tags = {
    256: ("I", [16]),
    257: ("I", [16]),
    258: ("H", [8, 8, 8]),
    259: ("H", [1]),
    277: ("H", [3]),
    322: ("I", [16]),
    323: ("I", [16]),
    324: ("I", [0]),
    325: ("I", [768]),
}
_KINDS = {"B": 1, "H": 3, "I": 4, "f": 11}


def tiff(*directories: Tags, next_of_last: int = 0, order: str = "<") -> bytes:
    """A classic TIFF of these directories, each with the same 768 bytes of pixels at byte 8."""
    content = bytearray((b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 0) + bytes(768))
    link = 4
    for tags in directories:
        struct.pack_into(order + "I", content, link, len(content))
        table = bytearray(struct.pack(order + "H", len(tags)))
        after = len(content) + 2 + 12 * len(tags) + 4
        values = bytearray()
        for code, (kind, numbers) in sorted(tags.items()):
            numbers = [8] if (code, numbers) == (324, [0]) else numbers
            packed = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
            table += struct.pack(order + "HHI", code, _KINDS[kind], len(numbers))
            table += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(order + "I", after + len(values))
            values += packed if len(packed) > 4 else b""
        link = len(content) + len(table)
        content += table + bytes(4) + values
    struct.pack_into(order + "I", content, link, next_of_last)
    return bytes(content)


def refusal(content: bytes) -> str:
    """What is said of a file; empty if it passes."""
    try:
        check_tiff(io.BytesIO(content), len(content))
    except StructureError as error:
        return str(error)
    return ""


def with_tags(**changes: tuple[str, list[int]] | None) -> bytes:
    tags = {**IMAGE, **{int(code[1:]): value for code, value in changes.items()}}
    return tiff({code: value for code, value in tags.items() if value is not None})


def test_plain_files_of_both_byte_orders_and_several_directories_pass() -> None:
    assert refusal(tiff(IMAGE)) == refusal(tiff(IMAGE, IMAGE, order=">")) == ""


HOSTILE = {
    "no directory that can be read": (tiff(IMAGE)[:100], "it may be cut off"),
    "no directory": (b"II*\0" + bytes(64), "has no directory"),
    "a first directory beyond the end": (b"II*\0" + struct.pack("<I", 1 << 30) + bytes(64), "points to byte"),
    "another start": (b"PK\3\4" + tiff(IMAGE)[4:], "does not begin as a TIFF file"),
    "offsets of 4 bytes in a BigTIFF": (b"II+\0" + struct.pack("<HHQ", 4, 0, 16), "offsets are not 8 bytes long"),
    "a directory that is its own next one": (tiff(IMAGE, next_of_last=776), "leads back to itself"),
    "a sub-directory that is its parent": (with_tags(_330=("I", [776])), "leads back to itself"),
    "too many directories": (tiff(*[IMAGE] * (MAX_DIRECTORIES + 1)), f"over {MAX_DIRECTORIES} directories"),
    "no tag": (tiff({}), "a directory of 0 tags"),
    "too many tags": (b"II*\0" + struct.pack("<IH", 8, 60000) + bytes(64), "a directory of 60000 tags"),
    "a value of gigabytes": (
        with_tags(_270=("B", [65])).replace(struct.pack("<HHI", 270, 1, 1), struct.pack("<HHI", 270, 1, 1 << 31)),
        "tag 270 of 2147483648 bytes",
    ),
    "a value beyond the end": (
        with_tags(_270=("B", [65])).replace(struct.pack("<HHI", 270, 1, 1), struct.pack("<HHI", 270, 1, 9999)),
        "tag 270 whose value lies beyond the end",
    ),
    "an image of no width": (with_tags(_256=("I", [0])), "an image of 0 x 16 px"),
    "an image of 2**31 px": (with_tags(_256=("I", [1 << 31])), "an image of 2147483648 x 16 px"),
    "a tile of 2**30 px": (with_tags(_322=("I", [1 << 30])), "tiles of 1073741824 x 16 px"),
    "a tile of gigabytes": (
        with_tags(_322=("I", [1 << 16]), _323=("I", [1 << 15])),
        "a tile or strip of 6442450944 bytes",
    ),
    "tiles of no height": (with_tags(_323=("I", [0])), "tiles of 16 x 0 px"),
    "65,529 samples a pixel": (with_tags(_277=("H", [0xFFF9])), "65529 samples a pixel"),
    "samples of 64 bits": (with_tags(_258=("H", [64, 64, 64])), "samples of 64, 64, 64 bits"),
    "bits for more samples than there are": (with_tags(_258=("H", [8] * 9)), "once a sample"),
    "an unknown compression": (with_tags(_259=("H", [9999])), "compression 9999"),
    "a width that is a fraction": (with_tags(_256=("f", [16])), "tag 256 without whole numbers"),
    "no places": (with_tags(_324=None), "without the places of its tiles"),
    "more places than tiles": (
        with_tags(_324=("I", [8, 8]), _325=("I", [9, 9])),
        "an image of 1 tiles or strips, and places of 2",
    ),
    "fewer places than tiles": (with_tags(_256=("I", [64])), "an image of 4 tiles or strips, and places of 1"),
    "a tile beyond the end": (with_tags(_325=("I", [1 << 20])), "beyond the end of the file"),
    "a place that wraps": (with_tags(_324=("I", [0xFFFFFFFF])), "beyond the end of the file"),
    "a bomb": (
        with_tags(_256=("I", [16384]), _257=("I", [16384]), _322=("I", [16384]), _323=("I", [16384])),
        "unpack to 805306368",
    ),
    "strips of a bomb": (
        with_tags(
            _257=("I", [1 << 20]), _322=None, _323=None, _324=None, _325=None, _273=("I", [8]), _279=("I", [700])
        ),
        "bytes that unpack to",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_each_kind_of_hostile_file_is_refused_with_its_reason(kind: str) -> None:
    content, reason = HOSTILE[kind]
    assert reason in refusal(content)


def test_a_tile_that_was_left_out_has_no_place_to_be_checked() -> None:
    assert refusal(with_tags(_324=("I", [0xFFFFFFFF]), _325=("I", [0]))) == ""


@given(
    st.lists(st.tuples(st.integers(0, len(tiff(IMAGE, IMAGE)) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, 2000),
)
@settings(max_examples=300, deadline=None)
def test_any_damage_passes_or_is_refused_in_words(changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(tiff(IMAGE, IMAGE))
    for place, value in changes:
        content[place] = value
    assert isinstance(refusal(bytes(content[: len(content) - cut])), str)


def test_what_tifffile_writes_passes_in_every_flavour(tmp_path: Path) -> None:
    pixels = np.arange(96 * 80 * 3, dtype=np.uint8).reshape(96, 80, 3)
    for number, options in enumerate(
        (
            {"tile": (32, 32)},
            {"tile": (32, 32), "compression": "jpeg"},
            {"rowsperstrip": 8, "compression": "zlib"},
            {"planarconfig": "separate"},
        )
    ):
        for big in (False, True):
            path = tmp_path / f"{number}-{big}.tif"
            with tifffile.TiffWriter(path, bigtiff=big) as writer:
                image = pixels if options.get("planarconfig") is None else pixels.transpose(2, 0, 1)
                writer.write(image, photometric="rgb", subifds=1, **options)
                writer.write(
                    image[..., ::2, ::2] if image.shape[0] == 3 else image[::2, ::2], photometric="rgb", **options
                )
            assert refusal(path.read_bytes()) == "", (options, big)


@pytest.mark.real_data
def test_real_slides_pass(real_data: Path) -> None:
    checked = 0
    for path in [path for path in real_data.glob("slides*/**/*") if path.suffix in (".svs", ".tif", ".ndpi")]:
        with open(path, "rb") as file:
            if file.read(4) in STARTS and path.stem != "unopenable":
                check_tiff(file, os.path.getsize(path))
                checked += 1
    assert checked >= 4
