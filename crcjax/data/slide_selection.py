"""The slides that a user names, by paths or by a cohort, with their ids or under pseudonyms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crcjax.data.cohort import SlideRow, load_cohort
from crcjax.data.pseudonyms import load_key, pseudonym
from crcjax.errors import InputError
from crcjax.slides.preprocess.tile_slides import check_slide_ids
from crcjax.slides.wsi.discovery import find_slides, slide_id_of


@dataclass(frozen=True)
class NamedSlide:
    """A slide with its ids; `mpp` and `site` are those of the cohort, if it states any."""

    slide_id: str
    case_id: str
    path: Path
    mpp: float | None = None
    site: str | None = None


def named_slides(
    paths: Sequence[Path] | None, cohort: Path | None, pseudonym_key: Path | None = None
) -> list[NamedSlide]:
    """The slides of a cohort's rows, of those alone that are named if any are; or of the files as they are called.

    With the file of a key, ids are pseudonyms. Raises InputError.
    """
    named = _of_cohort(paths, cohort) if cohort else _by_file(paths)
    if pseudonym_key is None:
        return named
    key = load_key(pseudonym_key)
    return [replace(s, slide_id=pseudonym(key, s.slide_id), case_id=pseudonym(key, s.case_id)) for s in named]


def named_copies(paths: Sequence[Path], out: Path, pseudonym_key: Path | None) -> list[Path]:
    """Where copies of slides go: `out` for one slide, or below it, named by pseudonyms. Raises InputError."""
    if pseudonym_key:
        key = load_key(pseudonym_key)
        check_slide_ids([(slide_id_of(path), path) for path in paths])
        suffixes = ["" if path.is_dir() else path.suffix.lower() for path in paths]
        return [out / (pseudonym(key, slide_id_of(path)) + end) for path, end in zip(paths, suffixes, strict=True)]
    if len(paths) != 1 or out.is_dir():
        raise InputError("file names often identify: give --pseudonym-key to name copies, or --out COPY for one slide")
    return [out]


def _by_file(paths: Sequence[Path] | None) -> list[NamedSlide]:
    if not paths:
        raise InputError("name slides or folders, or give --cohort")
    return [NamedSlide(slide_id_of(path), slide_id_of(path), path) for path in find_slides(paths)]


def _of_cohort(paths: Sequence[Path] | None, cohort: Path) -> list[NamedSlide]:
    rows = load_cohort(cohort, None).rows
    if not paths:
        return [NamedSlide(row.slide_id, row.case_id, _path_of(row, cohort), row.mpp, row.site) for row in rows]
    by_path = {row.path.resolve(): row for row in rows if row.path}
    by_id = {row.slide_id: row for row in rows}
    chosen = []
    for path in find_slides(paths):
        row = by_path.get(path.resolve()) or by_id.get(slide_id_of(path))
        if row is None:
            raise InputError(f"{path}: is not in {cohort}; add a row, or leave the slide out")
        chosen.append(NamedSlide(row.slide_id, row.case_id, path, row.mpp, row.site))
    return chosen


def _path_of(row: SlideRow, cohort: Path) -> Path:
    if row.path is None:
        raise InputError(f"{cohort}: slide {row.slide_id} has no path; fill the column, or name the slides' folder")
    return row.path
