"""Slides that a user selects by paths or by a cohort, with their ids or with pseudonyms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crcjax.data.cohort import LABEL, SlideRow, load_cohort
from crcjax.data.pseudonyms import load_key, pseudonym
from crcjax.errors import InputError
from crcjax.slides.preprocess.tile_slides import check_slide_ids
from crcjax.slides.wsi.discovery import find_slides, slide_id_of


@dataclass(frozen=True)
class NamedSlide:
    """A slide with its ids; `mpp` (µm per level-0 px) and the other fields come from the cohort, and are None without one."""

    slide_id: str
    case_id: str
    path: Path
    mpp: float | None = None
    site: str | None = None
    scanner: str | None = None
    label: str | None = None


def named_slides(
    paths: Sequence[Path] | None, cohort: Path | None, pseudonym_key: Path | None = None, label: str = LABEL
) -> list[NamedSlide]:
    """Returns the slides that a command works on.

    Args:
      paths: slide files and folders. With a cohort they select rows of it; without paths all rows are selected.
      cohort: the cohort, which states the ids. Without one, ids are file names.
      pseudonym_key: file of a key; ids are then replaced with pseudonyms.
      label: the cohort's column of the labels.

    Raises:
      InputError: neither is given, a path is not in the cohort, or a selected row has no path.
    """
    slides = _slides_of_cohort(cohort, paths, label) if cohort else _slides_of_paths(paths)
    if pseudonym_key is None:
        return slides
    key = load_key(pseudonym_key)
    return [replace(s, slide_id=pseudonym(key, s.slide_id), case_id=pseudonym(key, s.case_id)) for s in slides]


def named_copies(paths: Sequence[Path], out: Path, pseudonym_key: Path | None) -> list[Path]:
    """The paths of copies of slides: `out` itself for one slide, or names in `out` that are pseudonyms. Raises InputError."""
    if pseudonym_key:
        key = load_key(pseudonym_key)
        check_slide_ids([(slide_id_of(path), path) for path in paths])
        suffixes = ["" if path.is_dir() else path.suffix.lower() for path in paths]
        names = [pseudonym(key, slide_id_of(path)) for path in paths]
        return [out / (name + suffix) for name, suffix in zip(names, suffixes, strict=True)]
    if len(paths) != 1 or out.is_dir():
        raise InputError("file names often identify: give --pseudonym-key to name copies, or --out COPY for one slide")
    return [out]


def _slides_of_paths(paths: Sequence[Path] | None) -> list[NamedSlide]:
    if not paths:
        raise InputError("name slides or folders, or give --cohort")
    return [NamedSlide(slide_id_of(path), slide_id_of(path), path) for path in find_slides(paths)]


def _slides_of_cohort(cohort: Path, paths: Sequence[Path] | None, label: str) -> list[NamedSlide]:
    rows = load_cohort(cohort, None, label).rows
    if not paths:
        return [_named(row, _path_of(row, cohort)) for row in rows]
    row_by_path = {row.path.resolve(): row for row in rows if row.path}
    row_by_id = {row.slide_id: row for row in rows}
    selected = []
    for path in find_slides(paths):
        row = row_by_path.get(path.resolve()) or row_by_id.get(slide_id_of(path))
        if row is None:
            raise InputError(f"{path}: is not in {cohort}; add a row, or leave the slide out")
        selected.append(_named(row, path))
    return selected


def _named(row: SlideRow, path: Path) -> NamedSlide:
    return NamedSlide(row.slide_id, row.case_id, path, row.mpp, row.site, row.scanner, row.label)


def _path_of(row: SlideRow, cohort: Path) -> Path:
    if row.path is None:
        raise InputError(f"{cohort}: slide {row.slide_id} has no path; fill the column, or name the slides' folder")
    return row.path
