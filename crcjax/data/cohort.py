"""The cohort: a table of slides with case, site, scanner, split and labels, validated as it is read."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crcjax.errors import InputError
from crcjax.slides.wsi.slide import MPP_RANGE

SPLITS = ("train", "val", "test")
_REQUIRED = ("slide_id", "case_id")
_KNOWN = (*_REQUIRED, "path", "subtype", "site", "scanner", "split", "mpp")


@dataclass(frozen=True)
class SlideRow:
    """One slide; what the table leaves empty is None. `mpp` overrides the file's µm per level-0 px. Further columns are in `extra`."""

    slide_id: str
    case_id: str
    path: Path | None = None
    subtype: str | None = None
    site: str | None = None
    scanner: str | None = None
    split: str | None = None
    mpp: float | None = None
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cohort:
    """Slides in the table's order, and the classes that their subtypes belong to."""

    rows: tuple[SlideRow, ...]
    classes: tuple[str, ...]

    def split(self, name: str) -> Cohort:
        """The slides of one split."""
        return replace(self, rows=tuple(row for row in self.rows if row.split == name))

    @property
    def cases(self) -> tuple[str, ...]:
        """Case ids, each once, in order of appearance."""
        return tuple(dict.fromkeys(row.case_id for row in self.rows))


def load_cohort(path: str | Path, classes: Sequence[str] | None) -> Cohort:
    """Reads a CSV with slide_id and case_id, and optionally path, subtype, site, scanner, split and mpp.

    Relative paths are relative to the CSV's folder; whether the files exist is not checked. With `classes` None any
    subtype is one. Raises InputError naming
    the line: missing or doubled columns, duplicated slides, unknown subtypes or splits, an impossible mpp, a case in two splits or with
    two subtypes.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            lines = [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV ({error}); check the path and the encoding") from error
    _check_columns(path, columns)
    if not lines:
        raise InputError(f"{path}: has no rows; write one a slide")
    if classes is None:
        classes = sorted({line["subtype"].strip() for _, line in lines if line.get("subtype")} - {""})
    rows = [_row(path, number, line, tuple(classes)) for number, line in lines]
    _check_rows(path, [number for number, _ in lines], rows)
    return Cohort(tuple(rows), tuple(classes))


def _check_columns(path: Path, columns: list[str]) -> None:
    for name in _REQUIRED:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, 1)
            hint = f"; rename {near[0]!r}" if near else "; add it"
            raise InputError(f"{path}: has no column {name!r}{hint}")
    doubled = sorted({name for name in columns if columns.count(name) > 1})
    if doubled:
        raise InputError(f"{path}: has the column {doubled[0]!r} twice; keep one")


def _row(path: Path, number: int, line: dict, classes: tuple[str, ...]) -> SlideRow:
    if None in line or None in line.values():
        raise InputError(f"{path}, line {number}: has another number of fields than the header; quote commas")
    values = {name: value.strip() or None for name, value in line.items()}
    for name in _REQUIRED:
        if values[name] is None:
            raise InputError(f"{path}, line {number}: {name} is empty; fill it in")
    subtype, split = values.get("subtype"), values.get("split")
    if subtype is not None and subtype not in classes:
        near = difflib.get_close_matches(subtype, classes, 1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it empty if unknown, or set config.data.classes"
        raise InputError(f"{path}, line {number}: subtype {subtype!r} is none of {', '.join(classes)}; {hint}")
    if split is not None and split not in SPLITS:
        raise InputError(f"{path}, line {number}: split {split!r} is none of {', '.join(SPLITS)}; correct it")
    if "/" in str(values["slide_id"]):
        raise InputError(f"{path}, line {number}: slide_id {values['slide_id']!r} has a slash; it names a folder")
    known: dict[str, Any] = {name: values.get(name) for name in _KNOWN}
    extra = {name: value or "" for name, value in values.items() if name not in _KNOWN}
    file = path.parent / known["path"] if known["path"] else None
    mpp = _mpp(path, number, known["mpp"])
    return SlideRow(**known | {"path": file, "mpp": mpp}, extra=extra)


def _mpp(path: Path, number: int, text: str | None) -> float | None:
    least, most = MPP_RANGE
    try:
        mpp = None if text is None else float(text)
        if mpp is None or least <= mpp <= most:
            return mpp
    except ValueError:
        pass
    asked = f"a number from {least:g} to {most:g}, the µm per pixel at level 0"
    raise InputError(f"{path}, line {number}: mpp {text!r} is not {asked}; correct it, or leave it empty")


def _check_rows(path: Path, numbers: list[int], rows: list[SlideRow]) -> None:
    slides: dict[str, int] = {}
    cases: dict[str, tuple[int, SlideRow]] = {}
    for number, row in zip(numbers, rows, strict=True):
        if row.slide_id in slides:
            raise InputError(
                f"{path}, line {number}: slide_id {row.slide_id!r} is on line {slides[row.slide_id]} too; rename one"
            )
        slides[row.slide_id] = number
        first_number, first = cases.setdefault(row.case_id, (number, row))
        for name in ("split", "subtype"):
            here, there = getattr(row, name), getattr(first, name)
            if here != there:
                raise InputError(
                    f"{path}, line {number}: case {row.case_id!r} has the {name} {here!r}, but {there!r} on line "
                    f"{first_number}; a case has one {name}"
                )
