"""The cohort: a table of slides with case, site, scanner, split and labels, checked while it is read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crcjax.data.csv_table import TableRow, is_missing, parse_number, read_table, renamed
from crcjax.errors import InputError
from crcjax.slides.wsi.slide import MPP_RANGE

CALIBRATION = "calibration"
SPLITS = ("train", "val", CALIBRATION, "test")
_REQUIRED = ("slide_id", "case_id")
# The cohort's column of the target, where the config does not name another.
LABEL = "subtype"
_COLUMNS = (*_REQUIRED, "path", "site", "scanner", "split", "mpp")


@dataclass(frozen=True)
class SlideRow:
    """One slide of a cohort; cells that the table leaves empty are None.

    `label` is its class of the target. `mpp` overrides the µm per level-0 px that the file states. `extra` holds the table's
    further columns.
    """

    slide_id: str
    case_id: str
    path: Path | None = None
    label: str | None = None
    site: str | None = None
    scanner: str | None = None
    split: str | None = None
    mpp: float | None = None
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cohort:
    """Slides in the table's order, the classes that their labels belong to, and the column of the labels."""

    rows: tuple[SlideRow, ...]
    classes: tuple[str, ...]
    label: str = LABEL

    def split(self, name: str) -> Cohort:
        """The slides of one split."""
        return replace(self, rows=tuple(row for row in self.rows if row.split == name))

    @property
    def cases(self) -> tuple[str, ...]:
        """Case ids, each once, in order of appearance."""
        return tuple(dict.fromkeys(row.case_id for row in self.rows))


def load_cohort(
    path: str | Path, classes: Sequence[str] | None, label: str = LABEL, names: Mapping[str, str] | None = None
) -> Cohort:
    """Reads a CSV with slide_id and case_id, and optionally path, site, scanner, split, mpp and the column of the labels.

    Column names may differ in case, blanks, underscores and hyphens (`Slide ID`); encodings, delimiters and missing
    values are read as spreadsheets write them (`read_table`).

    Args:
      path: the table. Relative slide paths are relative to its folder; whether the files exist is not checked.
      classes: the valid labels; None accepts any label.
      label: the name of the column with the labels (config.data.label).
      names: for each column that the table calls otherwise, the table's name by crcjax's. A table of one row per case may
        name one column for both `case_id` and `slide_id`.

    Raises:
      InputError, naming the line: missing, doubled or misspelled columns, duplicated slides, unknown labels or splits,
        an impossible mpp, a case in two splits or with two labels; and for a `label` that is another column.
    """
    path = Path(path)
    if label in _COLUMNS:
        raise InputError(
            f"config.data.label must be the column of the labels, got {label!r}, which has another meaning"
        )
    table = renamed(path, read_table(path, (*_COLUMNS, label, *(names or {}).values())), names or {})
    _check_columns(path, table.columns)
    if not table.rows:
        raise InputError(f"{path}: has no rows; write one for each slide")
    if classes is None:
        stated = {row.cells.get(label, "") for row in table.rows}
        classes = sorted(name for name in stated if not is_missing(name))
    rows = [_row(path, row, tuple(classes), label) for row in table.rows]
    _check_rows(path, [row.line for row in table.rows], rows, label)
    return Cohort(tuple(rows), tuple(classes), label)


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for name in _REQUIRED:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, 1)
            hint = f"rename {near[0]!r}" if near else f"add it; its columns are {', '.join(columns) or 'none'}"
            raise InputError(f"{path}: has no column {name!r}; {hint}")


def _row(path: Path, row: TableRow, classes: tuple[str, ...], label: str) -> SlideRow:
    location = f"{path}, line {row.line}"
    stated = {
        name: None if is_missing(text) else text for name, text in row.cells.items() if name in (*_COLUMNS, label)
    }
    for name in _REQUIRED:
        if stated[name] is None:
            raise InputError(f"{location}: {name} is empty; fill it in")
    values: dict[str, Any] = {name: stated.get(name) for name in _COLUMNS}
    stated_class, split = stated.get(label), values["split"]
    if stated_class is not None and stated_class not in classes:
        near = difflib.get_close_matches(stated_class, classes, 1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it empty if unknown, or set config.data.classes"
        raise InputError(f"{location}: {label} {stated_class!r} is none of {', '.join(classes)}; {hint}")
    if split is not None and split.lower() not in SPLITS:
        raise InputError(f"{location}: split must be one of {', '.join(SPLITS)}, got {split!r}; correct it")
    slide_path = path.parent / values["path"] if values["path"] else None
    parsed = {"path": slide_path, "split": split and split.lower(), "mpp": _mpp(location, values["mpp"])}
    parsed["label"] = stated_class
    further_columns = {name: text for name, text in row.cells.items() if name not in (*_COLUMNS, label)}
    return SlideRow(**values | parsed, extra=further_columns)


def _mpp(location: str, text: str | None) -> float | None:
    if text is None:
        return None
    least, most = MPP_RANGE
    try:
        mpp = parse_number(text)
        if least <= mpp <= most:
            return mpp
    except ValueError:
        pass
    raise InputError(
        f"{location}: mpp must be a number from {least:g} to {most:g}, the µm per pixel at level 0, got {text!r}; correct "
        "it, or leave it empty"
    )


def _check_rows(path: Path, line_numbers: list[int], rows: list[SlideRow], label: str) -> None:
    line_of_slide: dict[str, int] = {}
    first_of_case: dict[str, tuple[int, SlideRow]] = {}
    for line, row in zip(line_numbers, rows, strict=True):
        if row.slide_id in line_of_slide:
            raise InputError(
                f"{path}, line {line}: slide_id {row.slide_id!r} is on line {line_of_slide[row.slide_id]} too; rename one"
            )
        line_of_slide[row.slide_id] = line
        first_line, first_row = first_of_case.setdefault(row.case_id, (line, row))
        for name, value, first_value in (
            ("split", row.split, first_row.split),
            (label, row.label, first_row.label),
        ):
            if value != first_value:
                raise InputError(
                    f"{path}, line {line}: case {row.case_id!r} has the {name} {value!r}, but {first_value!r} on line "
                    f"{first_line}; a case has one {name}"
                )
