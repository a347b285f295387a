"""A copy of a slide without what tells whose it is (`deidentify_slide`): written anew from what is allowed, then verified.

Nothing of the original is copied but the streams of its tiles, the tags that say how to decode them, mpp and objective
power. What this cannot see is in the picture itself: writing and pen marks on the scanned area.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import openslide
import tifffile

import crcjax
from crcjax.errors import InputError, OutputError, SlideError, writing
from crcjax.slides.deidentify.embedded_metadata import CHECKED
from crcjax.slides.deidentify.tiff_rewriter import (
    DESCRIPTION,
    JPEG_TABLES,
    KEPT_KEYS,
    KEPT_TAGS,
    PROFILE,
    PagePlan,
    UnsafeError,
    plan_page,
    raw_value,
    read_metadata,
    read_streams,
    write_tiff,
)
from crcjax.slides.jobs.worker_pool import JobFailed, run_jobs
from crcjax.slides.wsi.discovery import slide_files
from crcjax.slides.wsi.slide import open_slide

SAFE = ("aperio", "generic-tiff", "dicom")
REFUSED = {  # formats by OpenSlide's name, and why a safe copy is not written
    "hamamatsu": "serial number, dates and macro image are among the private tags that its pixels need",
    "leica": "the XML that its levels need names the slide, and the macro image is one of its images",
    "mirax": "its index and data files mix pixels with label, barcode and dates",
    "philips": "the XML that its levels need holds label, barcode and DICOM fields",
    "sakura": "its database mixes pixels with label and identifiers",
    "trestle": "its tiles lie as files beside it say, which name the slide",
    "ventana": "the XML that its tiles' places need holds barcode and operator",
    "zeiss": "the XML that its pixels need holds names and dates",
}
_SCAN_ALONE = "export the scan alone as a tiled TIFF"
_REMEDY = "export it as Aperio SVS or as a tiled TIFF; those can be copied safely"

# Words of the original that a report may repeat; any other could be a name.
_KNOWN_IMAGES = ("label", "macro", "thumbnail")
_KNOWN_KEYS = {
    *("Barcode", "CreationDate", "Date", "Description", "DisplayColor", "DSR ID", "Exposure Scale", "Exposure Time"),
    *("Filename", "Filtered", "Focus Offset", "ICC Profile", "ImageID", "Left", "LineAreaXOffset", "LineAreaYOffset"),
    *("LineCameraSkew", "OriginalHeight", "OriginalWidth", "Originalheight", "Parmset", "Rack", "ScanScope ID"),
    *("SessonMode", "Slide", "StripeWidth", "Time", "Time Zone", "Title", "Top", "User"),
}
_MPP_PROPERTIES = ("openslide.mpp-x", "openslide.mpp-y")

_PAGE_NAME = 285  # the tag
_OVERVIEW_NAME = re.compile(r"(?<![a-z])(label|macro|overview|thumbnail|barcode)", re.IGNORECASE)
_SAME_MPP = 1e-6  # relative: as fine as the copy's tags state it
_SEPARATORS = re.compile(rb'[^ -~]+|[|=;<>"]')  # between the pieces of a text
_TEXT_TYPES = (1, 2, 6, 7)  # TIFF's types of single bytes
_SHORT, _LONG = 4, 7  # bytes: the shortest piece that is no chance in a few kilobytes of tags, in gigabytes of tiles
_PIECE_BYTES, _TAG_BYTES, _BLOCK_BYTES = 256, 1 << 20, 4 << 20
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, struct.error)  # what tags with any value whatever may raise
_SPOT_PX, _SPOTS = 256, 4


@dataclass(frozen=True)
class Report:
    """What became of a slide. It repeats nothing of what was removed, and so may go with the copy.

    `streams` is the SHA-256 over the tiles' streams, the same in the original and in the copy; `kept` names the tags
    that were copied, `removed` says what was left out, and where it was.
    """

    copy: str
    format: str
    size: tuple[int, int]
    levels: int
    mpp: tuple[str | None, str | None]
    objective_power: str | None
    tiles: int
    streams: str
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    remains: str = "the picture itself: look for writing and pen marks in the scanned area"
    code_version: str = crcjax.__version__


def report_path(copy: Path) -> Path:
    """Where the report of a copy lies."""
    return copy.with_name(f"{copy.name}.deidentified.json")


def deidentify_slide(path: str | Path, copy: str | Path) -> Report:
    """Writes and verifies the copy and its report; the original is only read. Memory does not grow with the pixels.

    Raises SlideError: `missing`, `unsupported` for what cannot be copied safely, `corrupt`; InputError if the copy
    exists, OutputError if it cannot be written.
    """
    path, copy = Path(path), Path(copy)
    with writing(copy):
        if copy.exists():
            raise InputError(f"{copy}: exists, and is not overwritten; choose another --out")
    files, vendor = _files(path)
    partial = copy.with_name(f".{copy.name}.{os.getpid()}.partial")
    copied = _copy_dicom if vendor == "dicom" else _copy_tiff
    with writing(copy):
        if copy.parent.exists() and not copy.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _damage_named(path), openslide.OpenSlide(files[0]) as handle:
                made = copied(path, files, handle, partial)
                if wrong := _difference(handle, partial) or _other_scale(made.scale, partial) or made.leak:
                    raise UnsafeError(f"the copy was not as it must be ({wrong}), and was removed")
                report = _report(copy, handle, made)
                _publish(partial, copy, report)
        finally:
            _remove(partial)
    return report


def deidentify_slides(
    jobs: Sequence[tuple[Path, Path]], processes: int
) -> Iterator[tuple[Path, Path, Report | SlideError | InputError | JobFailed]]:
    """`deidentify_slide` on (path, copy) after (path, copy), in worker processes: yields each with its report or error.

    A slide on which a library crashes loses itself alone. Raises OutputError if the copies cannot be written.
    """
    for done in run_jobs(_deidentify, jobs, processes):
        (path, copy), result = done.job, done.result
        if isinstance(result, OutputError):
            raise result
        if isinstance(result, JobFailed):
            sys.stderr.write(result.trace)
            for left in copy.parent.glob(f".{glob.escape(copy.name)}.*.partial"):
                _remove(left)
        yield path, copy, result


def _deidentify(job: tuple[Path, Path]) -> Report:
    return deidentify_slide(*job)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Copied:
    """A copy that was written, and what a search of its bytes found that must not be (`leak`)."""

    streams: str
    tiles: int
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    leak: str
    scale: _Scale


def _publish(partial: Path, copy: Path, report: Report) -> None:
    """The report first: a copy that is there was verified, and has one."""
    about = partial.with_suffix(".json")
    try:
        about.write_text(json.dumps(asdict(report), indent=1) + "\n")
        about.replace(report_path(copy))
    finally:
        about.unlink(missing_ok=True)
    if copy.exists():
        raise InputError(f"{copy}: was written by another run meanwhile, and is not overwritten")
    partial.rename(copy)


def _files(path: Path) -> tuple[list[Path], str]:
    """A slide's files and its format. Raises SlideError for a format that is not copied."""
    if not path.exists():
        raise SlideError(path, "missing", "no such file", "check the path")
    files = slide_files(path) if path.is_dir() else [path]
    try:
        for file in files:
            open(file, "rb").close()
    except OSError as error:
        raise SlideError(path, "missing", f"cannot be read ({error.strerror})", "check its permissions") from error
    vendor = openslide.OpenSlide.detect_format(files[0]) if files else None
    if vendor is None:
        raise SlideError(path, "unsupported", "not a slide, or a damaged one", "crcjax doctor lists the formats")
    if vendor == "dicom" and not path.is_dir():
        raise SlideError(path, "unsupported", "is one file of a DICOM slide", "name the slide's folder")
    if vendor not in SAFE:
        why = REFUSED.get(vendor, "what identifies in this format is not known")
        raise SlideError(path, "unsupported", f"a {vendor} slide cannot be de-identified safely: {why}", _REMEDY)
    return files, vendor


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except UnsafeError as error:
        raise SlideError(path, "unsupported", str(error), error.remedy or _REMEDY) from error
    except (openslide.OpenSlideError, tifffile.TiffFileError, *_DAMAGE) as error:
        raise SlideError(path, "corrupt", f"damaged ({error})", "copy it again") from error


@dataclass(frozen=True)
class _Scale:
    """What crcjax reads of a slide: its size in px, and µm per px, None where the slide does not state it."""

    size: tuple[int, int]
    mpp: tuple[float, float] | None


def _scale(path: Path) -> _Scale:
    """Raises SlideError if crcjax cannot open the slide."""
    with open_slide(path, fallback_mpp=1.0) as slide:
        return _Scale(slide.info.size, None if slide.info.mpp_source == "given" else slide.info.mpp)


def _copy_dicom(path: Path, files: list[Path], handle: openslide.OpenSlide, partial: Path) -> _Copied:
    from crcjax.slides.deidentify.dicom_rewriter import frames_hash, plan_series, write_series  # loads pydicom

    series = plan_series(files)
    streams = write_series(series, partial)
    leak = "" if frames_hash(partial) == streams else "other frames"
    for file in partial.iterdir():
        with open(file, "rb") as written:
            leak = leak or _leak_in_streams(written, series.secrets)
    frames = sum(instance.frames for instance in series.instances)
    return _Copied(streams, frames, series.kept, series.removed, leak, _scale(path))


def _copy_tiff(path: Path, files: list[Path], handle: openslide.OpenSlide, partial: Path) -> _Copied:
    scale = _scale(path)
    if scale.size != handle.dimensions:
        raise UnsafeError("the scan is not its first image", _SCAN_ALONE)
    openslide_mpp = tuple(float(handle.properties.get(name, 0)) for name in _MPP_PROPERTIES)
    # OME-XML states the scale, but names people and places too: only its scale goes into the copy, as TIFF tags.
    unstated = None if scale.mpp is None or _same_mpp(scale.mpp, openslide_mpp) else scale.mpp
    with tifffile.TiffFile(path) as tiff, open(path, "rb") as source, open(partial, "xb") as out:
        levels = _levels(handle, tiff)
        plans = [plan_page(page, source, None if i else unstated, tiff.byteorder) for i, page in enumerate(levels)]
        removed, secrets = _removals(path, source, tiff, plans)
        streams = write_tiff(source, out, plans, tiff.byteorder, tiff.is_bigtiff)
        out.flush()
        os.fsync(out.fileno())
    tiles = sum(len(plan.page.dataoffsets) for plan in plans)
    kept_tags = tuple(dict.fromkeys(_tag_name(code) for plan in plans for code in sorted(plan.tags)))
    return _Copied(streams, tiles, kept_tags, removed, _leak(partial, streams, secrets), scale)


def _levels(handle: openslide.OpenSlide, tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """The images that are copied. Raises UnsafeError where one could be no level, or a level could be lost."""
    generic = handle.properties["openslide.vendor"] == "generic-tiff"
    tiled = [page for page in _pages(tiff) if page.is_tiled]
    levels = [page for page in tiled if not generic or page.index == 0 or page.subfiletype & 1]
    if generic:
        _check_scan_comes_first(_pages(tiff), levels)
    sizes = sorted(((page.imagewidth, page.imagelength) for page in levels), reverse=True)
    if sizes != list(handle.level_dimensions):
        raise UnsafeError("its tiled images are not just the levels that OpenSlide finds")
    width, height = sizes[0]
    for page in levels:
        expected = height * page.imagewidth / width
        if abs(page.imagelength - expected) > max(2, 0.02 * expected) or _image_name(page) in _KNOWN_IMAGES:
            raise UnsafeError(f"image {page.index} is tiled as levels are, but may be a label or macro image")
        if "SubIFDs" in page.tags:
            raise UnsafeError("keeps images within images (SubIFDs)")
        if page.compression not in CHECKED or page.fillorder != 1:
            known = "JPEG, JPEG 2000 (Aperio) and deflate are known"
            raise UnsafeError(f"image {page.index} is stored in a way that may hide something; {known}")
    return levels


def _check_scan_comes_first(pages: list[tifffile.TiffPage], levels: list[tifffile.TiffPage]) -> None:
    """Raises UnsafeError if another image than the first may be the scan: the first may then be a macro or label image."""
    first = pages[0]
    if _OVERVIEW_NAME.search(f"{_ome_name(first.description)} {first.tags.valueof(_PAGE_NAME, '')}"):
        raise UnsafeError("its first image is named as a label, macro or overview image is", _SCAN_ALONE)
    for page in pages:
        if page in levels:
            continue
        if page.is_tiled:
            raise UnsafeError(f"image {page.index} is tiled as the first is, and either may be the scan", _SCAN_ALONE)
        if page.imagewidth * page.imagelength > first.imagewidth * first.imagelength:
            raise UnsafeError(f"image {page.index} is larger than the first, and may be the scan", _SCAN_ALONE)


def _ome_name(description: str) -> str:
    """The first image's name in OME-XML; any other description as it is."""
    try:
        image = ElementTree.fromstring(description).find(".//{*}Image")
    except ElementTree.ParseError:
        return description
    return "" if image is None else image.get("Name", "")


def _pages(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    return [page for page in tiff.pages if isinstance(page, tifffile.TiffPage)]


def _image_name(page: tifffile.TiffPage) -> str:
    """What Aperio calls an image that is no level: of `_KNOWN_IMAGES`, or "" for any other word."""
    word = page.description.partition("\n")[2].split()[:1]
    if word and word[0] in _KNOWN_IMAGES:
        return word[0]
    return "thumbnail" if page.index == 1 and not page.is_tiled and page.description.startswith("Aperio") else ""


def _removals(
    path: Path, source: BinaryIO, tiff: tifffile.TiffFile, plans: list[PagePlan]
) -> tuple[tuple[str, ...], set[bytes]]:
    """What the copy leaves out: for the report, where it was; and the texts themselves, to be looked for in the copy."""
    plan_of_page = {plan.page.index: plan for plan in plans}
    removed: list[str] = []
    texts = [path.stem.encode()]
    for page in _pages(tiff):
        plan = plan_of_page.get(page.index)
        if plan:
            removed += _removed_tags(page, plan)
        else:
            name = _image_name(page) or "further"
            removed.append(f"image {page.index}: {name} image of {page.imagewidth} x {page.imagelength} px")
        for tag in page.tags:
            if tag.dtype in _TEXT_TYPES and tag.code != JPEG_TABLES:
                texts.append(raw_value(source, tag)[:_TAG_BYTES])
            elif isinstance(tag.value, dict):  # Exif, GPS
                texts += [str(value).encode() for value in tag.value.values()]
    pieces = {piece.strip()[:_PIECE_BYTES] for text in texts for piece in _SEPARATORS.split(_joined(text))}
    written = b"\n".join(plan.tags[code][2] for plan in plans for code in (DESCRIPTION, PROFILE) if code in plan.tags)
    return tuple(removed), {piece for piece in pieces if len(piece) >= _SHORT and piece not in _joined(written)}


def _joined(text: bytes) -> bytes:
    """Without zeros, so that words in UTF-16 become words."""
    return text.replace(b"\0", b"")


def _removed_tags(page: tifffile.TiffPage, plan: PagePlan) -> Iterator[str]:
    for tag in page.tags:
        if tag.code == PROFILE:
            yield f"image {page.index}: names, dates and devices of the colour profile"
        elif tag.code == DESCRIPTION and tag.code in plan.tags:
            keys = [piece.partition("=")[0].strip() for piece in page.description.split("|")[1:]]
            others = sum(key not in _KNOWN_KEYS and key not in KEPT_KEYS for key in keys)
            yield f"image {page.index}: ImageDescription: its first lines"
            for key in dict.fromkeys(key for key in keys if key in _KNOWN_KEYS):
                yield f"image {page.index}: ImageDescription: {key}"
            if others:
                yield f"image {page.index}: ImageDescription: {others} further entries"
        elif tag.code not in plan.tags and tag.code not in KEPT_TAGS - {DESCRIPTION}:
            yield f"image {page.index}: {_tag_name(tag.code)}"


def _tag_name(code: int) -> str:
    return tifffile.TIFF.TAGS.get(code, f"tag {code}")


def _difference(handle: openslide.OpenSlide, copy: Path) -> str:
    """The first difference that OpenSlide sees between the original (`handle`) and the copy; "" if there is none."""
    try:
        other = openslide.OpenSlide(min(copy.iterdir()) if copy.is_dir() else copy)
    except openslide.OpenSlideError:
        return "OpenSlide cannot open it"
    with other:
        for name in ("openslide.vendor", "openslide.objective-power"):
            if handle.properties.get(name) != other.properties.get(name):
                return name
        if other.level_dimensions != handle.level_dimensions:
            return "other levels"
        if len(other.associated_images):
            return "an associated image"
        for level, (width, height) in enumerate(handle.level_dimensions):
            for i in range(_SPOTS):
                scale = handle.level_downsamples[level] * (i + 0.5) / _SPOTS
                corner = int(width * scale), int(height * scale)
                original = handle.read_region(corner, level, (_SPOT_PX, _SPOT_PX))
                try:
                    copied = other.read_region(corner, level, (_SPOT_PX, _SPOT_PX))
                except openslide.OpenSlideError:
                    return f"unreadable pixels at {corner} of level {level}"
                if original.tobytes() != copied.tobytes():
                    return f"other pixels at {corner} of level {level}"
    return ""


def _other_scale(scale: _Scale, copy: Path) -> str:
    """How the size or scale that crcjax reads of the copy differs from the original's; "" if it does not."""
    try:
        copied = _scale(copy)
    except SlideError:
        return "crcjax cannot open it"
    if copied.size != scale.size:
        return "another size"
    if (copied.mpp is None) != (scale.mpp is None):
        return "other micrometres per pixel"
    return "" if scale.mpp is None or _same_mpp(scale.mpp, copied.mpp) else "other micrometres per pixel"


def _same_mpp(mpp: Sequence[float], other: Sequence[float] | None) -> bool:
    return other is not None and bool(np.allclose(mpp, other, rtol=_SAME_MPP, atol=0))


def _leak(copy: Path, streams: str, secrets: set[bytes]) -> str:
    """What a parse and a search of the copy's bytes find that must not be; "" if nothing."""
    digest = hashlib.sha256()
    with tifffile.TiffFile(copy) as tiff, open(copy, "rb") as source:
        pages = _pages(tiff)
        for page in pages:
            for _ in read_streams(source, page, digest):
                pass
        if digest.hexdigest() != streams:
            return "other tiles"
        if any(tag.code not in KEPT_TAGS for page in pages for tag in page.tags):
            return "a tag too many"
        metadata = _joined(read_metadata(source, pages))
        if any(secret in metadata for secret in secrets):
            return "a text among its tags that was to be removed"
        return _leak_in_streams(source, secrets)


def _leak_in_streams(source: BinaryIO, secrets: set[bytes]) -> str:
    long = [secret for secret in secrets if len(secret) >= _LONG]
    leaks = any(secret in text for text in _printable(source) for secret in long)
    return "a text among its tiles that was to be removed" if leaks else ""


def _printable(source: BinaryIO) -> Iterator[bytes]:
    """Block by block, the runs of at least `_LONG` printable bytes: a thousandth of what is compressed."""
    source.seek(0)
    rest = b""
    while block := source.read(_BLOCK_BYTES):
        data = np.frombuffer(rest + block, np.uint8)
        run = data - np.uint8(32) < 95  # from here on 1, then 2, 4 and 7 bytes are printable
        for step in (1, 2, _LONG - 4):
            run = run[:-step] & run[step:]
        inside = np.zeros(len(data), bool)
        inside[np.flatnonzero(run)[:, None] + np.arange(_LONG)] = True
        places = np.flatnonzero(inside)
        yield bytes(np.insert(data[places], np.flatnonzero(np.diff(places) > 1) + 1, 0))
        rest = bytes(data[-_PIECE_BYTES:])


def _report(copy: Path, handle: openslide.OpenSlide, made: _Copied) -> Report:
    stated = tuple(map(repr, made.scale.mpp)) if made.scale.mpp else (None, None)
    mpp_x, mpp_y = (handle.properties.get(name, mpp) for name, mpp in zip(_MPP_PROPERTIES, stated, strict=True))
    return Report(
        copy=copy.name,
        format=handle.properties["openslide.vendor"],
        size=handle.dimensions,
        levels=handle.level_count,
        mpp=(mpp_x, mpp_y),
        objective_power=handle.properties.get("openslide.objective-power"),
        tiles=made.tiles,
        streams=made.streams,
        kept=made.kept,
        removed=made.removed,
    )
