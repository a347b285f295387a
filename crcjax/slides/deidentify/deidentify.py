"""De-identified copies of slides: written from an allow-list, then verified (`deidentify_slide`).

A copy contains the compressed tiles of the original, the tags that are needed to decode them, the micrometres per pixel and
the objective power; nothing else. Writing and pen marks on the scanned area are in the pixels, and stay in the copy.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import openslide
import tifffile

import crcjax
from crcjax.errors import InputError, OutputError, SlideError, writing
from crcjax.slides.deidentify.tiff_contents import EXPORT_SCAN_ALONE, copied_images, removals, tag_name
from crcjax.slides.deidentify.tiff_rewriter import UnsafeError, plan_page, write_tiff
from crcjax.slides.deidentify.verification import (
    MPP_PROPERTIES,
    SlideScale,
    leak_in_file,
    leak_in_tiff,
    openslide_difference,
    same_mpp,
    scale_difference,
    slide_scale,
)
from crcjax.slides.jobs.worker_pool import JobFailed, run_jobs
from crcjax.slides.wsi.discovery import slide_files

SAFE = ("aperio", "generic-tiff", "dicom")
# Formats by OpenSlide's name, and why a safe copy is not written.
REFUSED = {
    "hamamatsu": "serial number, dates and macro image are among the private tags that its pixels need",
    "leica": "the XML that its levels need names the slide, and the macro image is one of its images",
    "mirax": "its index and data files mix pixels with label, barcode and dates",
    "philips": "the XML that its levels need holds label, barcode and DICOM fields",
    "sakura": "its database mixes pixels with label and identifiers",
    "trestle": "the files beside it that place its tiles name the slide",
    "ventana": "the XML that its tiles' places need holds barcode and operator",
    "zeiss": "the XML that its pixels need holds names and dates",
}
_REMEDY = "export it as Aperio SVS or as a tiled TIFF; those can be copied safely"
# The exceptions of libraries for tags with arbitrary values.
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, struct.error)


@dataclass(frozen=True)
class Report:
    """The tags that a copy of a slide has and lacks. It repeats no value that was removed, so it may accompany the copy.

    `streams` is the SHA-256 over the compressed tiles, equal in the original and in the copy. `copied_tags` names the tags or
    DICOM attributes that were copied. `removed` lists what was left out and where it was.
    """

    copy: str
    format: str
    size: tuple[int, int]
    levels: int
    mpp: tuple[str | None, str | None]
    objective_power: str | None
    tiles: int
    streams: str
    copied_tags: tuple[str, ...]
    removed: tuple[str, ...]
    remains: str = "the picture itself: look for writing and pen marks in the scanned area"
    code_version: str = crcjax.__version__


def report_path(copy: Path) -> Path:
    """The path of a copy's report."""
    return copy.with_name(f"{copy.name}.deidentified.json")


def deidentify_slide(path: str | Path, copy: str | Path) -> Report:
    """Writes and verifies the de-identified copy of a slide, and its report; the original is only read.

    Memory does not grow with the pixels.

    Args:
      path: the slide file, or the folder of a DICOM slide.
      copy: the new file or folder. It appears under this name only once it is verified.

    Raises:
      SlideError: `missing`; `unsupported` if it cannot be copied safely; `corrupt`.
      InputError: `copy` exists.
      OutputError: `copy` cannot be written.
    """
    path, copy = Path(path), Path(copy)
    with writing(copy):
        if copy.exists():
            raise InputError(f"{copy}: exists, and is not overwritten; choose another --out")
    files, vendor = _files(path)
    partial = copy.with_name(f".{copy.name}.{os.getpid()}.partial")
    write_copy = _copy_dicom if vendor == "dicom" else _copy_tiff
    with writing(copy):
        if copy.parent.exists() and not copy.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _damage_as_slide_error(path), openslide.OpenSlide(files[0]) as original:
                written = write_copy(path, files, original, partial)
                fault = (
                    openslide_difference(original, partial) or scale_difference(written.scale, partial) or written.leak
                )
                if fault:
                    raise UnsafeError(f"the copy failed its verification ({fault}), and was removed")
                report = _report(copy, original, written)
                _publish(partial, copy, report)
        finally:
            _remove(partial)
    return report


def deidentify_slides(
    jobs: Sequence[tuple[Path, Path]], processes: int
) -> Iterator[tuple[Path, Path, Report | SlideError | InputError | JobFailed]]:
    """Runs `deidentify_slide` on every (path, copy) in worker processes, and yields each with its report or error.

    If a library crashes on a slide, only that slide fails. Raises OutputError if the copies cannot be written.
    """
    for done in run_jobs(_deidentify, jobs, processes):
        (path, copy), result = done.job, done.result
        if isinstance(result, OutputError):
            raise result
        if isinstance(result, JobFailed):
            sys.stderr.write(result.trace)
            for partial in copy.parent.glob(f".{glob.escape(copy.name)}.*.partial"):
                _remove(partial)
        yield path, copy, result


def _deidentify(job: tuple[Path, Path]) -> Report:
    return deidentify_slide(*job)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class _WrittenCopy:
    """A written copy; `leak` says what its bytes contain that must not be there, "" if nothing."""

    streams: str
    tiles: int
    copied_tags: tuple[str, ...]
    removed: tuple[str, ...]
    leak: str
    scale: SlideScale


def _publish(partial: Path, copy: Path, report: Report) -> None:
    """Gives report and copy their names, the report first: every copy under its own name was verified and has a report."""
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
    """A slide's files and its format. Raises SlideError for a format that cannot be copied safely."""
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
        why = REFUSED.get(vendor, "the places of identifiers in this format are not known")
        raise SlideError(path, "unsupported", f"a {vendor} slide cannot be de-identified safely: {why}", _REMEDY)
    return files, vendor


@contextmanager
def _damage_as_slide_error(path: Path) -> Iterator[None]:
    try:
        yield
    except UnsafeError as error:
        raise SlideError(path, "unsupported", str(error), error.remedy or _REMEDY) from error
    except (openslide.OpenSlideError, tifffile.TiffFileError, *_DAMAGE) as error:
        raise SlideError(path, "corrupt", f"damaged ({error})", "copy it again") from error


def _copy_dicom(path: Path, files: list[Path], original: openslide.OpenSlide, partial: Path) -> _WrittenCopy:
    from crcjax.slides.deidentify.dicom_rewriter import frames_hash, plan_series, write_series  # loads pydicom

    series = plan_series(files)
    streams = write_series(series, partial)
    leak = "" if frames_hash(partial) == streams else "other frames"
    for file in partial.iterdir():
        leak = leak or leak_in_file(file, series.removed_texts)
    frames = sum(instance.frames for instance in series.instances)
    return _WrittenCopy(streams, frames, series.copied_attributes, series.removed, leak, slide_scale(path))


def _copy_tiff(path: Path, files: list[Path], original: openslide.OpenSlide, partial: Path) -> _WrittenCopy:
    scale = slide_scale(path)
    if scale.size != original.dimensions:
        raise UnsafeError("the scan is not its first image", EXPORT_SCAN_ALONE)
    openslide_mpp = tuple(float(original.properties.get(name, 0)) for name in MPP_PROPERTIES)
    # OME-XML states the scale, but names people and places too: only its scale goes into the copy, as TIFF tags.
    mpp_to_write = None if scale.mpp is None or same_mpp(scale.mpp, openslide_mpp) else scale.mpp
    with tifffile.TiffFile(path) as tiff, open(path, "rb") as source, open(partial, "xb") as out:
        levels = copied_images(original, tiff)
        plans = [plan_page(page, source, None if i else mpp_to_write, tiff.byteorder) for i, page in enumerate(levels)]
        removed, removed_texts = removals(path, source, tiff, plans)
        streams = write_tiff(source, out, plans, tiff.byteorder, tiff.is_bigtiff)
        out.flush()
        os.fsync(out.fileno())
    tiles = sum(len(plan.page.dataoffsets) for plan in plans)
    copied_tags = tuple(dict.fromkeys(tag_name(code) for plan in plans for code in sorted(plan.tags)))
    return _WrittenCopy(streams, tiles, copied_tags, removed, leak_in_tiff(partial, streams, removed_texts), scale)


def _report(copy: Path, original: openslide.OpenSlide, written: _WrittenCopy) -> Report:
    stated = tuple(map(repr, written.scale.mpp)) if written.scale.mpp else (None, None)
    mpp_x, mpp_y = (original.properties.get(name, mpp) for name, mpp in zip(MPP_PROPERTIES, stated, strict=True))
    return Report(
        copy=copy.name,
        format=original.properties["openslide.vendor"],
        size=original.dimensions,
        levels=original.level_count,
        mpp=(mpp_x, mpp_y),
        objective_power=original.properties.get("openslide.objective-power"),
        tiles=written.tiles,
        streams=written.streams,
        copied_tags=written.copied_tags,
        removed=written.removed,
    )
