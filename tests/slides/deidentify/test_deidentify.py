"""Copies of slides without what tells whose they are: every place of an identifier, every refusal, and the same pixels."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import openslide
import psutil
import pytest
import simplejpeg
import tifffile
from PIL import Image, ImageCms

from crcjax.errors import InputError, OutputError, SlideError
from crcjax.slides.deidentify.deidentify import REFUSED, SAFE, Report, deidentify_slide, deidentify_slides, report_path
from crcjax.slides.deidentify.embedded_metadata import stripped_profile
from crcjax.slides.jobs.worker_pool import JobFailed
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide
from crcjax.slides.tiling.plan import TilingParams, plan_tiles
from crcjax.slides.wsi.slide import open_slide

SECRET = "S-2019-04711 Doe"  # an accession number and a name
KEYS = ["ScanScope ID", "Filename", "Date", "Time", "User", "ImageID", "Barcode", "Slide", "Title", "Patient"]
TEXT_TAGS = {  # code: type
    **{269: 2, 285: 2, 305: 2, 315: 2, 316: 2, 33432: 2, 271: 2, 272: 2},  # DocumentName … Copyright, Make, Model
    **{700: 1, 33723: 7, 34377: 7, 37510: 7, 65000: 2, 65421: 7},  # XMP, IPTC, Photoshop, UserComment, private
}


def _slide(path: Path, picture: np.ndarray, *, description: str | None = None, levels: int = 2, **options) -> Path:
    """An Aperio slide with thumbnail, label and macro image; `options` go to level 0."""
    if description is None:
        description = f"Aperio Image Library v11.2.1\r\n{SECRET}|AppMag = 20|MPP = 0.4990"
    tiled = {"tile": (240, 240), "compression": "jpeg", "photometric": "rgb", "metadata": None, "software": False}
    strips = {"rowsperstrip": 16, "metadata": None, "software": False, "compression": "lzw"}
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False), byteorder=options.pop("order", "<")) as tiff:
        for level in range(levels):
            shown = cv2.resize(picture, None, fx=0.25**level, fy=0.25**level, interpolation=cv2.INTER_AREA)
            tiff.write(shown, **tiled | {"description": description} | (options if level == 0 else {}))
            if level == 0:
                tiff.write(picture[::8, ::8], description=f"Aperio\r\n{SECRET}", **strips)
        for name, kind in (("label", 1), ("macro", 9)):
            words = f"Aperio Image Library v11.2.1\r\n{name} 400x300"
            tiff.write(picture[:300, :400], description=words, subfiletype=kind, **strips)
    return path


@pytest.fixture(scope="module")
def picture(tissue_picture: Callable[..., np.ndarray]) -> np.ndarray:
    return tissue_picture(1000, 800)


@pytest.fixture(scope="module")
def labelled(picture: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Aperio slide that names a person at every place of its description."""
    keys = "".join(f"|{key} = {SECRET} {i}" for i, key in enumerate(KEYS))
    description = f"Aperio Image Library v11.2.1\r\n1000x800 {SECRET}|AppMag = 20{keys}|MPP = 0.4990|{SECRET}"
    folder = tmp_path_factory.mktemp("labelled")
    return _slide(folder / f"{SECRET}.svs", picture, description=description, datetime="2019:04:11 10:20:30")


def _streams(path: Path) -> list[list[bytes]]:
    with tifffile.TiffFile(path) as tiff, open(path, "rb") as file:
        found = []
        for page in tiff.pages:
            if page.is_tiled:
                places = zip(page.dataoffsets, page.databytecounts, strict=True)
                found.append([(file.seek(offset), file.read(count))[1] for offset, count in places])
        return found


def _holds_secret(*texts: bytes) -> bool:
    words = [SECRET, *SECRET.split(), "04711", "2019:04:11"]
    forms = [word.encode(encoding) for word in words for encoding in ("utf-8", "utf-16-le", "utf-16-be")]
    return any(form in text for form in forms for text in texts)


def test_the_copy_has_no_label_macro_or_thumbnail_and_no_identifier_but_mpp_and_power(
    labelled: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.svs"
    report = deidentify_slide(labelled, copy)
    assert _holds_secret(labelled.read_bytes())
    assert not _holds_secret(copy.read_bytes(), report_path(copy).read_bytes())
    with openslide.OpenSlide(copy) as slide, openslide.OpenSlide(labelled) as original:
        assert set(original.associated_images) == {"thumbnail", "label", "macro"}
        assert not slide.associated_images
        assert slide.level_dimensions == original.level_dimensions
        assert {name: value for name, value in slide.properties.items() if name.startswith("aperio.")} == {
            "aperio.AppMag": "20",
            "aperio.MPP": "0.4990",
        }
        assert slide.properties["openslide.mpp-x"] == "0.499"
        assert slide.properties["openslide.objective-power"] == "20"
    with tifffile.TiffFile(copy) as tiff:
        assert len(tiff.pages) == 2
        assert tiff.pages[0].description == "Aperio Image Library\r\n1000x800 (240x240)|AppMag = 20|MPP = 0.4990"
        assert "DateTime" not in tiff.pages[0].tags
    assert report.mpp == ("0.499", "0.499")


def test_the_report_names_what_was_removed_and_where_without_repeating_it(labelled: Path, tmp_path: Path) -> None:
    report = deidentify_slide(labelled, tmp_path / "copy.svs")
    removed = "\n".join(report.removed)
    for key in KEYS[:-1]:
        assert f"image 0: ImageDescription: {key}" in removed
    assert "image 0: ImageDescription: 2 further entries" in removed  # `Patient`, which could be a name itself
    for words in (
        "image 1: thumbnail image",
        "image 3: label image of 400 x 300",
        "image 4: macro",
        "image 0: DateTime",
    ):
        assert words in removed
    written = json.loads(report_path(tmp_path / "copy.svs").read_text())
    assert written["removed"] == list(report.removed)
    assert written["streams"] == report.streams
    assert {"TileWidth", "ImageDescription"} <= set(written["copied_tags"])
    assert "DateTime" not in written["copied_tags"]


def test_the_tiles_streams_and_all_pixels_are_the_same_bits(labelled: Path, tmp_path: Path) -> None:
    deidentify_slide(labelled, tmp_path / "copy.svs")
    assert _streams(tmp_path / "copy.svs") == _streams(labelled)
    with openslide.OpenSlide(tmp_path / "copy.svs") as copy, openslide.OpenSlide(labelled) as original:
        for level, size in enumerate(original.level_dimensions):
            regions = [np.asarray(slide.read_region((0, 0), level, size)) for slide in (copy, original)]
            np.testing.assert_array_equal(*regions)


def test_the_original_is_untouched(labelled: Path, tmp_path: Path) -> None:
    before = labelled.read_bytes(), labelled.stat().st_mtime_ns, sorted(labelled.parent.iterdir())
    deidentify_slide(labelled, tmp_path / "copy.svs")
    assert (labelled.read_bytes(), labelled.stat().st_mtime_ns, sorted(labelled.parent.iterdir())) == before


@pytest.mark.parametrize("code", TEXT_TAGS)
def test_a_text_in_any_tag_of_any_level_is_removed_and_reported(code: int, picture: np.ndarray, tmp_path: Path) -> None:
    text = f"<x:who>{SECRET}</x:who>".encode() + b"\0"
    original = _slide(tmp_path / "a.svs", picture, levels=1, extratags=[(code, TEXT_TAGS[code], len(text), text, True)])
    assert text in original.read_bytes()
    report = deidentify_slide(original, tmp_path / "copy.svs")
    assert not _holds_secret((tmp_path / "copy.svs").read_bytes())
    name = tifffile.TIFF.TAGS.get(code) or f"tag {code}"
    assert f"image 0: {name}" in report.removed


@pytest.mark.parametrize("code", [34665, 34853])
def test_exif_and_gps_are_removed(code: int, picture: np.ndarray, tmp_path: Path) -> None:
    placeholder = code - 1  # tifffile writes no such pointer itself
    original = _slide(tmp_path / "a.svs", picture, levels=1, extratags=[(placeholder, 4, 1, 0, True)])
    text = SECRET.encode() + b"\0"
    with tifffile.TiffFile(original) as tiff:
        at = tiff.pages[0].tags[placeholder].offset
    with open(original, "r+b") as file:
        start = file.seek(0, os.SEEK_END)
        tag = 0x9003 if code == 34665 else 0x1D  # the time of the picture
        file.write(struct.pack("<HHHIII", 1, tag, 2, len(text), start + 18, 0) + text)
        file.seek(at)
        file.write(struct.pack("<HHII", code, 4, 1, start))
    with tifffile.TiffFile(original) as tiff:
        assert SECRET in str(tiff.pages[0].tags[code].value)
    report = deidentify_slide(original, tmp_path / "copy.svs")
    assert not _holds_secret((tmp_path / "copy.svs").read_bytes())
    assert f"image 0: {tifffile.TIFF.TAGS[code]}" in report.removed


def test_bytes_that_belong_to_no_image_are_not_copied(labelled: Path, tmp_path: Path) -> None:
    """Behind the file's end, and of a label image that was only unlinked."""
    original = tmp_path / "a.svs"
    data = bytearray(labelled.read_bytes())
    with tifffile.TiffFile(labelled) as tiff:
        second, last = tiff.pages[1], tiff.pages[-1]
        label = bytes(data[last.dataoffsets[0] : last.dataoffsets[0] + last.databytecounts[0]])
        link = second.offset + 2 + 12 * len(second.tags)
    level = struct.unpack_from("<I", data, link)[0]
    with tifffile.TiffFile(labelled) as tiff:
        end = level + 2 + 12 * len(tiff.pages[2].tags)
    struct.pack_into("<I", data, end, 0)
    original.write_bytes(bytes(data) + SECRET.encode() * 10)
    deidentify_slide(original, tmp_path / "copy.svs")
    copied = (tmp_path / "copy.svs").read_bytes()
    assert label in original.read_bytes()
    assert label not in copied
    assert not _holds_secret(copied)


def _profile() -> bytes:
    """An sRGB profile with a scanner's name in its description and maker."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    text = (SECRET * 4).encode("utf-16-be")
    (count,) = struct.unpack_from(">I", data, 128)
    for i in range(count):
        (name,) = struct.unpack_from(">4s", data, 132 + 12 * i)
        if name == b"desc":  # moved to the end, with the new words
            body = struct.pack(">4sIII2s2sII", b"mluc", 0, 1, 12, b"en", b"US", len(text), 28) + text
            struct.pack_into(">4sII", data, 132 + 12 * i, name, len(data), len(body))
            data += body
    data[48:52] = SECRET.encode()[:4]
    struct.pack_into(">I", data, 0, len(data))
    return bytes(data)


def test_a_colour_profile_keeps_its_transform_and_loses_its_words(picture: np.ndarray, tmp_path: Path) -> None:
    original = _slide(tmp_path / "a.svs", picture, extratags=[(34675, 7, len(_profile()), _profile(), True)])
    report = deidentify_slide(original, tmp_path / "copy.svs")
    assert "image 0: names, dates and devices of the colour profile" in report.removed
    assert not _holds_secret((tmp_path / "copy.svs").read_bytes())
    lab = ImageCms.createProfile("LAB")
    converted = []
    for path in (original, tmp_path / "copy.svs"):
        with openslide.OpenSlide(path) as slide:
            transform = ImageCms.buildTransform(slide.color_profile, lab, "RGB", "LAB")
            converted.append(np.asarray(ImageCms.applyTransform(Image.fromarray(picture), transform)))
    np.testing.assert_array_equal(*converted)


def test_a_damaged_colour_profile_is_an_error() -> None:
    with pytest.raises(ValueError, match="damaged colour profile"):
        stripped_profile(_profile()[:300])
    with pytest.raises(ValueError, match="damaged colour profile"):
        stripped_profile(b"")


def _with_streams(path: Path, picture: np.ndarray, change: Callable[[bytes], bytes], compression: str) -> Path:
    """A tiled slide whose first tile's stream is changed."""
    encode = {
        "jpeg": lambda tile: simplejpeg.encode_jpeg(tile, 90, "RGB", "420"),
        "deflate": lambda tile: zlib.compress(tile.tobytes()),
        "none": lambda tile: tile.tobytes(),
    }[compression]
    tiles = [
        encode(np.ascontiguousarray(picture[y : y + 256, x : x + 256])) for y in (0, 256, 512) for x in (0, 256, 512)
    ]
    tiles[0] = change(tiles[0])
    photometric = "ycbcr" if compression == "jpeg" else "rgb"
    options = {"compression": compression, "photometric": photometric, "tile": (256, 256), "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(iter(tiles), shape=(768, 768, 3), dtype=np.uint8, resolution=(2e4, 2e4), resolutionunit=3, **options)
    return path


def _segment(marker: int, body: bytes) -> Callable[[bytes], bytes]:
    return lambda stream: stream[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + stream[2:]


HIDING_PLACES = {
    "a JPEG comment": ("jpeg", _segment(0xFE, SECRET.encode()), "a comment"),
    "Exif in a tile": ("jpeg", _segment(0xE1, b"Exif\0\0" + SECRET.encode()), "a segment of metadata (marker E1)"),
    "a thumbnail": ("jpeg", _segment(0xE0, b"JFIF\0\1\1\1\0\1\0\1\1\1abc"), "a segment of metadata (marker E0)"),
    "behind a JPEG's end": ("jpeg", lambda stream: stream + SECRET.encode() + b"\xff\xd9", "bytes after its end"),
    "behind deflate's end": ("deflate", lambda stream: stream + SECRET.encode(), "bytes after its end"),
}


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_a_tile_that_carries_more_than_pixels_is_refused_for_tiles_are_copied_as_they_are(
    place: str, picture: np.ndarray, tmp_path: Path
) -> None:
    compression, change, words = HIDING_PLACES[place]
    original = _with_streams(tmp_path / "a.tif", picture, change, compression)
    with pytest.raises(SlideError, match=re.escape(f"carries {words}")) as caught:
        deidentify_slide(original, tmp_path / "out" / "copy.tif")
    assert caught.value.status == "unsupported"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("compression", ["jpeg", "deflate", "none"])
def test_plain_tiled_tiffs_are_copied_in_every_flavour(compression: str, picture: np.ndarray, tmp_path: Path) -> None:
    original = _with_streams(tmp_path / "a.tif", picture, lambda stream: stream, compression)
    report = deidentify_slide(original, tmp_path / "copy.tif")
    assert _streams(original) == _streams(tmp_path / "copy.tif")
    assert (report.format, report.mpp) == ("generic-tiff", ("0.5", "0.5"))


def test_comments_of_jpeg_2000_encoders_pass_and_any_other_is_refused(picture: np.ndarray, tmp_path: Path) -> None:
    stream = imagecodecs.jpeg2k_encode(picture[:256, :256], codecformat="j2k", level=30)
    assert b"OpenJPEG" in stream
    for i, comment in enumerate((b"Kakadu-v6.0", SECRET.encode())):
        size = stream.index(b"\xff\x52")  # before the coding style
        tile = stream[:size] + struct.pack(">BBHH", 0xFF, 0x64, len(comment) + 4, 1) + comment + stream[size:]
        path = tmp_path / f"{i}.svs"
        with tifffile.TiffWriter(path) as tiff:
            options = {"tile": (256, 256), "compression": 33005, "photometric": "rgb", "metadata": None}
            tiff.write(iter([tile]), shape=(256, 256, 3), dtype=np.uint8, description="Aperio|MPP = 0.5", **options)
    assert deidentify_slide(tmp_path / "0.svs", tmp_path / "copy.svs").tiles == 1
    with pytest.raises(SlideError, match="carries a comment"):
        deidentify_slide(tmp_path / "1.svs", tmp_path / "refused.svs")


@pytest.mark.parametrize("flavour", [{}, {"bigtiff": True}, {"bigtiff": True, "order": ">"}])
def test_bigtiff_and_big_endian_files_keep_their_flavour(flavour: dict, picture: np.ndarray, tmp_path: Path) -> None:
    original = _slide(tmp_path / "a.svs", picture, **flavour)
    deidentify_slide(original, tmp_path / "copy.svs")
    assert original.read_bytes()[:4] == (tmp_path / "copy.svs").read_bytes()[:4]
    assert _streams(original) == _streams(tmp_path / "copy.svs")


def test_tiles_that_the_scanner_left_out_stay_left_out(picture: np.ndarray, tmp_path: Path) -> None:
    tiles = [simplejpeg.encode_jpeg(np.ascontiguousarray(picture[:256, :256]), 90, "RGB", "420"), b"", b"", b""]
    options = {"compression": "jpeg", "photometric": "ycbcr", "tile": (256, 256), "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.svs") as tiff:
        tiff.write(iter(tiles), shape=(512, 512, 3), dtype=np.uint8, description="Aperio|MPP = 0.5", **options)
    deidentify_slide(tmp_path / "a.svs", tmp_path / "copy.svs")
    with tifffile.TiffFile(tmp_path / "copy.svs") as tiff:
        assert tiff.pages[0].databytecounts[1:] == tiff.pages[0].dataoffsets[1:] == (0, 0, 0)


def test_a_painted_slide_stays_synthetic_and_tiles_as_the_original(tmp_path: Path) -> None:
    spec = SlideSpec("immune", 3, size_px=(1600, 1280), mpp=0.5)
    original = paint_slide(tmp_path / "painted.svs", spec)
    report = deidentify_slide(original, tmp_path / "copy.svs")
    assert "image 0: ImageDescription: ScanScope ID" in report.removed
    assert spec.site.scanner.encode() not in (tmp_path / "copy.svs").read_bytes()
    with open_slide(original) as one, open_slide(tmp_path / "copy.svs") as other:
        assert other.info.synthetic
        assert other.info.mpp == one.info.mpp
        plans = [plan_tiles(slide, TilingParams(("10x", "20x"))) for slide in (one, other)]
        np.testing.assert_array_equal(plans[0].origin, plans[1].origin)
        np.testing.assert_array_equal(plans[0].mask, plans[1].mask)


def test_every_format_of_openslide_is_either_safe_or_refused_for_a_reason() -> None:
    known = {"aperio", "dicom", "generic-tiff", "hamamatsu", "leica", "mirax", "philips", "sakura", "trestle"}
    assert {*SAFE, *REFUSED} == known | {"ventana", "zeiss"}


def test_a_tiled_label_or_macro_image_is_refused(picture: np.ndarray, tmp_path: Path) -> None:
    for name, shape, words in (("label", (320, 400), "label 400x320"), ("other", (160, 400), "1000x800 -> 400x160")):
        with tifffile.TiffWriter(tmp_path / f"{name}.svs") as tiff:
            options = {"tile": (240, 240), "compression": "jpeg", "photometric": "rgb", "metadata": None}
            tiff.write(picture, description="Aperio Image Library\r\n|MPP = 0.5", **options)
            tiff.write(picture[: shape[0], : shape[1]], description=f"Aperio Image Library\r\n{words}", **options)
        with pytest.raises(SlideError, match="may be a label or macro image"):
            deidentify_slide(tmp_path / f"{name}.svs", tmp_path / "copy.svs")


_SCALE = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}


def _images(path: Path, images: list[tuple[np.ndarray, str, dict]], ome: bool = False) -> Path:
    """A tiled TIFF of several images; each a picture, a name and tifffile's options."""
    with tifffile.TiffWriter(path, ome=ome) as tiff:
        for pixels, name, options in images:
            about = {"metadata": {"axes": "YXS", "Name": name, **_SCALE}} if ome else {"metadata": None}
            tiled = {"tile": (240, 240), "compression": "jpeg", "photometric": "rgb"}
            tiff.write(np.ascontiguousarray(pixels), **about, **tiled | options)
    return path


def test_a_file_whose_first_image_may_not_be_the_scan_is_refused(picture: np.ndarray, tmp_path: Path) -> None:
    macro = cv2.resize(picture, (400, 320), interpolation=cv2.INTER_AREA)
    strips = {"tile": None, "rowsperstrip": 16}
    for number, (images, ome) in enumerate(
        [
            ([(macro, "macro", {}), (picture, "scan", {})], True),
            ([(macro, "a", {}), (picture, "b", {})], True),
            ([(picture, "", {}), (picture[:, ::-1], "", {})], False),
            ([(macro, "", {}), (picture, "", strips)], False),
            ([(macro, "Label Image", {})], True),
            ([(macro, "", {"description": "slide macro"})], False),
            ([(macro, "", {"extratags": [(285, 2, 0, "Overview", True)]})], False),
        ]
    ):
        path = _images(tmp_path / (f"{number}.ome.tif" if ome else f"{number}.tif"), images, ome)
        with pytest.raises(
            SlideError, match=r"scan|only one would be read|named like a label, macro or overview"
        ) as caught:
            deidentify_slide(path, tmp_path / "copy.tif")
        assert caught.value.status == "unsupported"
        assert caught.value.remedy in (
            "export the scan alone as a tiled TIFF",
            "write each into a file of its own",
            "write each into a file",
        )
        assert not (tmp_path / "copy.tif").exists()


def test_a_small_stripped_image_after_the_scan_stays_behind(picture: np.ndarray, tmp_path: Path) -> None:
    images = [(picture, "", {}), (picture[::4, ::4], "", {"tile": None, "rowsperstrip": 16})]
    report = deidentify_slide(_images(tmp_path / "a.tif", images), tmp_path / "copy.tif")
    assert report.size == (1000, 800)
    assert "image 1: further image of 250 x 200 px" in report.removed


@pytest.mark.parametrize("flavour", [{}, {"bigtiff": True, "byteorder": ">"}])
def test_a_copy_keeps_the_micrometres_per_pixel_that_only_ome_xml_states(
    flavour: dict, picture: np.ndarray, tmp_path: Path
) -> None:
    scale = {"axes": "YXS", **_SCALE, "PhysicalSizeX": 0.2525, "PhysicalSizeY": 0.2524, "Name": SECRET}
    original, copy = tmp_path / "a.ome.tif", tmp_path / "copy.tif"
    options = {"tile": (240, 240), "compression": "jpeg", "photometric": "rgb"} | flavour
    tifffile.imwrite(original, picture, ome=True, metadata=scale, **options)
    report = deidentify_slide(original, copy)
    assert [float(mpp) for mpp in report.mpp] == [0.2525, 0.2524]
    with open_slide(copy) as slide:
        assert slide.info.mpp == pytest.approx((0.2525, 0.2524), rel=1e-6)
    assert not _holds_secret(copy.read_bytes())


def test_a_slide_that_states_no_scale_has_a_copy_without_one(picture: np.ndarray, tmp_path: Path) -> None:
    report = deidentify_slide(_images(tmp_path / "a.tif", [(picture, "", {})]), tmp_path / "copy.tif")
    assert report.mpp == (None, None)
    with pytest.raises(SlideError, match="does not state its micrometres"):
        open_slide(tmp_path / "copy.tif")


def test_images_within_images_are_refused(picture: np.ndarray, tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        options = {"tile": (240, 240), "compression": "jpeg", "photometric": "rgb", "metadata": None}
        tiff.write(picture, subifds=1, **options)
        tiff.write(picture[::4, ::4].copy(), subfiletype=1, **options)
    with pytest.raises(SlideError, match="SubIFDs"):
        deidentify_slide(tmp_path / "a.ome.tif", tmp_path / "copy.tif")


def test_compressions_in_which_something_could_hide_are_refused(picture: np.ndarray, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture, tile=(240, 240), compression="lzw", photometric="rgb", metadata=None)
    with pytest.raises(SlideError, match="may hide something"):
        deidentify_slide(tmp_path / "a.tif", tmp_path / "copy.tif")


@pytest.mark.parametrize("cut", [0.1, 0.4])
def test_a_slide_that_is_cut_off_is_refused_and_leaves_nothing(cut: float, labelled: Path, tmp_path: Path) -> None:
    data = labelled.read_bytes()
    (tmp_path / "a.svs").write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(SlideError):
        deidentify_slide(tmp_path / "a.svs", tmp_path / "copy.svs")
    assert [path.name for path in tmp_path.iterdir()] == ["a.svs"]


def test_any_damage_gives_a_named_error_or_a_right_copy(picture: np.ndarray, tmp_path: Path) -> None:
    original = _slide(tmp_path / "a.svs", picture[:400, :500], levels=1)
    data, rng = original.read_bytes(), np.random.default_rng(0)
    with tifffile.TiffFile(original) as tiff:
        tables = [(page.offset, page.offset + 2 + 12 * len(page.tags)) for page in tiff.pages]
    endings = set()
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(*tables[rng.integers(len(tables))])] = rng.integers(256)
        original.write_bytes(damaged)
        copy = tmp_path / "copy.svs"
        try:
            deidentify_slide(original, copy)
            assert not _holds_secret(copy.read_bytes())
            copy.unlink()
            endings.add("copied")
        except SlideError as error:
            endings.add(error.status)
        assert {path.name for path in tmp_path.iterdir()} <= {"a.svs", "copy.svs.deidentified.json"}
    assert endings == {"copied", "corrupt", "unsupported"}


def test_missing_files_and_other_files_than_slides_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    for name, status in (("absent.svs", "missing"), ("text.svs", "unsupported")):
        with pytest.raises(SlideError) as caught:
            deidentify_slide(tmp_path / name, tmp_path / "copy.svs")
        assert caught.value.status == status


def test_nothing_is_overwritten_least_of_all_the_original(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.svs").write_bytes(b"mine")
    for target in (tmp_path / "copy.svs", labelled):
        before = target.read_bytes()
        with pytest.raises(InputError, match="not overwritten"):
            deidentify_slide(labelled, target)
        assert target.read_bytes() == before


def test_an_output_below_a_file_and_an_unreadable_slide_are_named(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/a\.svs: cannot be written \(Not a directory\); choose another --out"):
        deidentify_slide(labelled, tmp_path / "file" / "a.svs")
    with pytest.raises(OutputError, match=r"cannot be written.*shorten the name"):
        deidentify_slide(labelled, tmp_path / ("a" * 300))
    (tmp_path / "loop.svs").symlink_to("loop.svs")
    with pytest.raises(SlideError) as caught:
        deidentify_slide(tmp_path / "loop.svs", tmp_path / "copy.svs")
    assert caught.value.status == "missing"


def test_a_full_disk_leaves_no_copy(small_disk: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (1280, 1280, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", picture, tile=(256, 256), photometric="rgb", metadata=None)
    with pytest.raises(OutputError, match="free space"):
        deidentify_slide(tmp_path / "a.tif", small_disk / "copy.tif")
    assert not list(small_disk.iterdir())


def test_memory_does_not_grow_with_the_pixels(tmp_path: Path) -> None:
    tile = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    stream = simplejpeg.encode_jpeg(tile, 90, "RGB", "420")
    peaks = []
    for side in (8, 32):
        path = tmp_path / f"{side}.svs"
        options = {"compression": "jpeg", "photometric": "ycbcr", "tile": (256, 256), "metadata": None}
        with tifffile.TiffWriter(path) as tiff:
            shape = (side * 256, side * 256, 3)
            tiles = (stream for _ in range(side**2))
            tiff.write(tiles, shape=shape, dtype=np.uint8, description="Aperio|MPP = 0.5", **options)
        tracemalloc.start()
        deidentify_slide(path, tmp_path / f"copy{side}.svs")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 50 << 20
    assert peaks[1] < peaks[0] + (20 << 20)  # a block that is searched, whole in the larger file only


def test_a_slide_whose_worker_dies_loses_itself_alone_and_leaves_nothing(labelled: Path, tmp_path: Path) -> None:
    tile = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    stream = simplejpeg.encode_jpeg(tile, 95, "RGB", "444")
    options = {"compression": "jpeg", "photometric": "ycbcr", "tile": (256, 256), "metadata": None}
    with tifffile.TiffWriter(tmp_path / "large.svs") as tiff:
        tiles = (stream for _ in range(32**2))
        tiff.write(tiles, shape=(8192, 8192, 3), dtype=np.uint8, description="Aperio|MPP = 0.5", **options)
    out = tmp_path / "out"

    def kill_the_worker() -> None:
        while not list(out.glob(".large.svs.*.partial")):
            time.sleep(0.005)
        for process in psutil.Process().children(recursive=True):
            if process.ppid() != os.getpid():  # a child of multiprocessing's fork server
                process.send_signal(signal.SIGSEGV)  # as a crash in C: SIGKILL would be tried again

    killer = threading.Thread(target=kill_the_worker, daemon=True)
    killer.start()
    jobs = [(tmp_path / "large.svs", out / "large.svs"), (labelled, out / "small.svs")]
    results = {copy.name: result for _, copy, result in deidentify_slides(jobs, processes=1)}
    assert isinstance(results["large.svs"], JobFailed)
    assert isinstance(results["small.svs"], Report)
    assert sorted(path.name for path in out.iterdir()) == ["small.svs", "small.svs.deidentified.json"]


@pytest.mark.real_data
def test_real_slides_are_copied_or_refused_in_clear_words(real_data: Path, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="a hamamatsu slide cannot be de-identified safely: serial number"):
        deidentify_slide(real_data / "slides_refused" / "hamamatsu_test3-DAPI.ndpi", tmp_path / "copy.ndpi")
    for path in sorted((real_data / "slides").glob("*.svs")):
        copy, before = tmp_path / path.name, path.read_bytes()
        deidentify_slide(path, copy)
        assert _streams(copy) == _streams(path)
        data = copy.read_bytes()
        for word in (b"CMU-1", b"CPAPERIOCS", b"12/29/09", b"09:59:15", b"b414003d", b"1004486", b"Hewlett", b"HP  "):
            assert word not in data
        with openslide.OpenSlide(copy) as slide, openslide.OpenSlide(path) as original:
            assert not slide.associated_images
            assert slide.level_dimensions == original.level_dimensions
            if original.color_profile:
                shown = original.get_thumbnail((300, 300))
                pictures = [
                    np.asarray(ImageCms.profileToProfile(shown, profile, ImageCms.createProfile("sRGB")))
                    for profile in (slide.color_profile, original.color_profile)
                ]
                np.testing.assert_array_equal(*pictures)
        assert path.read_bytes() == before


def test_the_command_prints_the_report_names_refusals_and_exits_1(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    key = tmp_path / "key"
    key.write_text("k" * 32)
    key.chmod(0o600)
    command = [sys.executable, "-m", "crcjax.cli", "deidentify", str(labelled), str(tmp_path / "text.svs")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--pseudonym-key", str(key)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "removed: image 3: label image" in done.stderr
    assert "refused:" in done.stderr
    assert "1 of 2 slides copied" in done.stderr
    (copy,) = (tmp_path / "out").glob("*.svs")
    written = copy.stat().st_mtime_ns
    again = subprocess.run([*command, "--out", str(tmp_path / "out"), "--pseudonym-key", str(key)], capture_output=True)
    assert b"0 of 2 slides copied, 1 copied before" in again.stderr
    assert copy.stat().st_mtime_ns == written
    assert re.fullmatch(r"p[0-9a-f]{20}", copy.stem)
    done = subprocess.run([*command, "--out", str(tmp_path / "out2")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("crcjax: file names often identify")
