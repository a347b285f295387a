"""Decides which images of a TIFF are copied (`copied_images`), and lists everything else in the file (`removals`)."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import openslide
import tifffile

from crcjax.slides.deidentify.embedded_metadata import CHECKED
from crcjax.slides.deidentify.tiff_rewriter import (
    COPIED_KEYS,
    COPIED_TAGS,
    DESCRIPTION,
    JPEG_TABLES,
    PROFILE,
    PagePlan,
    UnsafeError,
    raw_value,
)

EXPORT_SCAN_ALONE = "export the scan alone as a tiled TIFF"
SHORTEST_TEXT = 4  # bytes: shorter texts occur by chance in a few kilobytes of tags
LONGEST_TEXT = 256  # bytes of a text that are looked for in the copy
_TAG_BYTES = 1 << 20  # of a tag that are searched for texts

# Words of the original that a report may repeat; any other word could be a name.
_KNOWN_IMAGES = ("label", "macro", "thumbnail")
_KNOWN_KEYS = {
    *("Barcode", "CreationDate", "Date", "Description", "DisplayColor", "DSR ID", "Exposure Scale", "Exposure Time"),
    *("Filename", "Filtered", "Focus Offset", "ICC Profile", "ImageID", "Left", "LineAreaXOffset", "LineAreaYOffset"),
    *("LineCameraSkew", "OriginalHeight", "OriginalWidth", "Originalheight", "Parmset", "Rack", "ScanScope ID"),
    *("SessonMode", "Slide", "StripeWidth", "Time", "Time Zone", "Title", "Top", "User"),
}

_PAGE_NAME = 285  # the tag
_OVERVIEW_NAME = re.compile(r"(?<![a-z])(label|macro|overview|thumbnail|barcode)", re.IGNORECASE)
_SEPARATORS = re.compile(rb'[^ -~]+|[|=;<>"]')  # between the pieces of a text
_TEXT_TYPES = (1, 2, 6, 7)  # TIFF's types of single bytes


def copied_images(original: openslide.OpenSlide, tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """The images that are copied: the levels of the scan.

    Raises UnsafeError if one of them may be a label or macro image, or if a level may be lost.
    """
    generic = original.properties["openslide.vendor"] == "generic-tiff"
    tiled = [page for page in tiff_pages(tiff) if page.is_tiled]
    levels = [page for page in tiled if not generic or page.index == 0 or page.subfiletype & 1]
    if generic:
        _check_scan_comes_first(tiff_pages(tiff), levels)
    sizes = sorted(((page.imagewidth, page.imagelength) for page in levels), reverse=True)
    if sizes != list(original.level_dimensions):
        raise UnsafeError("its tiled images are not just the levels that OpenSlide finds")
    width, height = sizes[0]
    for page in levels:
        expected = height * page.imagewidth / width
        if abs(page.imagelength - expected) > max(2, 0.02 * expected) or _image_name(page) in _KNOWN_IMAGES:
            raise UnsafeError(f"image {page.index} is tiled as levels are, but may be a label or macro image")
        if "SubIFDs" in page.tags:
            raise UnsafeError("contains images within images (SubIFDs)")
        if page.compression not in CHECKED or page.fillorder != 1:
            known = "JPEG, JPEG 2000 (Aperio) and deflate are known"
            raise UnsafeError(f"image {page.index} is stored in a way that may hide something; {known}")
    return levels


def _check_scan_comes_first(pages: list[tifffile.TiffPage], levels: list[tifffile.TiffPage]) -> None:
    """Raises UnsafeError if another image than the first may be the scan: the first may then be a macro or label image."""
    first = pages[0]
    if _OVERVIEW_NAME.search(f"{_ome_name(first.description)} {first.tags.valueof(_PAGE_NAME, '')}"):
        raise UnsafeError("its first image is named like a label, macro or overview image", EXPORT_SCAN_ALONE)
    for page in pages:
        if page in levels:
            continue
        if page.is_tiled:
            raise UnsafeError(
                f"image {page.index} is tiled like the first, and either may be the scan", EXPORT_SCAN_ALONE
            )
        if page.imagewidth * page.imagelength > first.imagewidth * first.imagelength:
            raise UnsafeError(f"image {page.index} is larger than the first, and may be the scan", EXPORT_SCAN_ALONE)


def _ome_name(description: str) -> str:
    """The first image's name in OME-XML; any other description unchanged."""
    try:
        image = ElementTree.fromstring(description).find(".//{*}Image")
    except ElementTree.ParseError:
        return description
    return "" if image is None else image.get("Name", "")


def tiff_pages(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """All images of the file's main chain."""
    return [page for page in tiff.pages if isinstance(page, tifffile.TiffPage)]


def _image_name(page: tifffile.TiffPage) -> str:
    """Aperio's name of an image that is no level: one of `_KNOWN_IMAGES`, "" for any other word."""
    word = page.description.partition("\n")[2].split()[:1]
    if word and word[0] in _KNOWN_IMAGES:
        return word[0]
    return "thumbnail" if page.index == 1 and not page.is_tiled and page.description.startswith("Aperio") else ""


def removals(
    path: Path, source: BinaryIO, tiff: tifffile.TiffFile, plans: list[PagePlan]
) -> tuple[tuple[str, ...], set[bytes]]:
    """Lists what the copy leaves out.

    Args:
      path: the original. Its name counts as a removed text.
      source: the original, open.
      tiff: the original, parsed.
      plans: the images of the copy.

    Returns:
      Lines for the report, each with the place and without the text; and the texts, to be looked for in the copy.
    """
    plan_of_page = {plan.page.index: plan for plan in plans}
    removed: list[str] = []
    texts = [path.stem.encode()]
    for page in tiff_pages(tiff):
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
    pieces = {piece.strip()[:LONGEST_TEXT] for text in texts for piece in _SEPARATORS.split(without_zeros(text))}
    written = b"\n".join(plan.tags[code][2] for plan in plans for code in (DESCRIPTION, PROFILE) if code in plan.tags)
    return tuple(removed), {
        piece for piece in pieces if len(piece) >= SHORTEST_TEXT and piece not in without_zeros(written)
    }


def without_zeros(text: bytes) -> bytes:
    """The text without zero bytes, so that words in UTF-16 become words in ASCII."""
    return text.replace(b"\0", b"")


def _removed_tags(page: tifffile.TiffPage, plan: PagePlan) -> Iterator[str]:
    for tag in page.tags:
        if tag.code == PROFILE:
            yield f"image {page.index}: names, dates and devices of the colour profile"
        elif tag.code == DESCRIPTION and tag.code in plan.tags:
            keys = [piece.partition("=")[0].strip() for piece in page.description.split("|")[1:]]
            others = sum(key not in _KNOWN_KEYS and key not in COPIED_KEYS for key in keys)
            yield f"image {page.index}: ImageDescription: its first lines"
            for key in dict.fromkeys(key for key in keys if key in _KNOWN_KEYS):
                yield f"image {page.index}: ImageDescription: {key}"
            if others:
                yield f"image {page.index}: ImageDescription: {others} further entries"
        elif tag.code not in plan.tags and tag.code not in COPIED_TAGS - {DESCRIPTION}:
            yield f"image {page.index}: {tag_name(tag.code)}"


def tag_name(code: int) -> str:
    """A tag's name in the TIFF standard, or its number."""
    return tifffile.TIFF.TAGS.get(code, f"tag {code}")
