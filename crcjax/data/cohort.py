"""The cohort: a table of slides with case, site, scanner, split and labels, validated as it is read."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crcjax.data.csv_table import TableRow, is_missing, parse_number, read_table
from crcjax.errors import InputError
from crcjax.slides.wsi.slide import MPP_RANGE

SPLITS = ("train", "val", "test")
_REQUIRED = ("slide_id", "case_id")
_KNOWN = (*_REQUIRED, "path", "subtype", "site", "scanner", "split", "mpp")


@dataclass(frozen=True)
class SlideRow:
    """One slide of a cohort; cells that the table leaves empty are None.

    `mpp` overrides the µm per level-0 px that the file states. `extra` holds the table's further columns.
    """

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

    Column names may differ in case, blanks, underscores and hyphens (`Slide ID`); encodings, delimiters and missing
    values are read as spreadsheets write them (`read_table`).

    Args:
      path: the table. Relative slide paths are relative to its folder; whether the files exist is not checked.
      classes: the valid subtypes; None accepts any subtype.

    Raises:
      InputError, naming the line: missing, doubled or misspelled columns, duplicated slides, unknown subtypes or splits,
        an impossible mpp, a case in two splits or with two subtypes.
    """
    path = Path(path)
    table = read_table(path, _KNOWN)
    _check_columns(path, table.columns)
    if not table.rows:
        raise InputError(f"{path}: has no rows; write one for each slide")
    if classes is None:
        stated = {row.cells.get("subtype", "") for row in table.rows}
        classes = sorted(subtype for subtype in stated if not is_missing(subtype))
    rows = [_row(path, row, tuple(classes)) for row in table.rows]
    _check_rows(path, [row.line for row in table.rows], rows)
    return Cohort(tuple(rows), tuple(classes))


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for name in _REQUIRED:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, 1)
            hint = f"rename {near[0]!r}" if near else f"add it; its columns are {', '.join(columns) or 'none'}"
            raise InputError(f"{path}: has no column {name!r}; {hint}")


def _row(path: Path, row: TableRow, classes: tuple[str, ...]) -> SlideRow:
    where = f"{path}, line {row.line}"
    values = {name: None if is_missing(text) else text for name, text in row.cells.items() if name in _KNOWN}
    for name in _REQUIRED:
        if values[name] is None:
            raise InputError(f"{where}: {name} is empty; fill it in")
    subtype, split = values.get("subtype"), values.get("split")
    if subtype is not None and subtype not in classes:
        near = difflib.get_close_matches(subtype, classes, 1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it empty if unknown, or set config.data.classes"
        raise InputError(f"{where}: subtype {subtype!r} is none of {', '.join(classes)}; {hint}")
    if split is not None and split.lower() not in SPLITS:
        raise InputError(f"{where}: split must be one of {', '.join(SPLITS)}, got {split!r}; correct it")
    known: dict[str, Any] = {name: values.get(name) for name in _KNOWN}
    slide_path = path.parent / known["path"] if known["path"] else None
    typed = {"path": slide_path, "split": split and split.lower(), "mpp": _mpp(where, known["mpp"])}
    return SlideRow(**known | typed, extra={name: text for name, text in row.cells.items() if name not in _KNOWN})


def _mpp(where: str, text: str | None) -> float | None:
    if text is None:
        return None
    least, most = MPP_RANGE
    try:
        mpp = parse_number(text)
        if least <= mpp <= most:
            return mpp
    except ValueError:
        pass
    asked = f"a number from {least:g} to {most:g}, the µm per pixel at level 0"
    raise InputError(f"{where}: mpp must be {asked}, got {text!r}; correct it, or leave it empty")


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
