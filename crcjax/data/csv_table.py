"""CSV files as spreadsheets write them, and Parquet files, read into rows of texts by column name.

Excel, LibreOffice, R and pandas differ in encoding, delimiter, header case and trailing blanks. `read_table` accepts all
of these, and refuses ambiguous files in place of guessing.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crcjax.environment import require_extra
from crcjax.errors import InputError

_DELIMITERS = ",;\t"
_WORKBOOKS = {b"PK\x03\x04": "an Excel or LibreOffice workbook", b"\xd0\xcf\x11\xe0": "an Excel workbook"}
_PARQUET = (".parquet", ".pq")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# The words that R, pandas and Excel write for an empty cell.
_MISSING = {"na", "n/a", "#n/a", "nan", "null"}
# A column name this similar to one that the reader knows is taken for a misspelling of it.
_MISSPELLED = 0.8


@dataclass(frozen=True)
class TableRow:
    """One row: `line` is its line number in the file; `cells` are trimmed texts by column name, empty if missing."""

    line: int
    cells: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A table with named columns."""

    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def column_key(name: str) -> str:
    """The letters and digits of a column name in lower case: columns with equal keys are the same column."""
    return re.sub(r"[\W_]", "", name.casefold())


def is_missing(text: str) -> bool:
    """Whether a cell is empty or holds a spreadsheet's word for an empty cell, such as NA."""
    return text.strip().casefold() in {"", *_MISSING}


def parse_number(text: str) -> float:
    """Parses a number with a decimal point or a decimal comma. Raises ValueError for other text."""
    return float(text.replace(",", ".") if text.count(",") == 1 and "." not in text else text)


def read_table(path: str | Path, known: Sequence[str]) -> Table:
    """Reads a CSV file with a header, or a Parquet file by its suffix, whose values become texts.

    Args:
      path: UTF-8 with or without a byte-order mark, or UTF-16; fields separated by commas, semicolons or tabs. Parquet
        needs the extra `parquet`.
      known: names of the columns that the caller reads. A column of the file gets the known name if the two differ only
        in case, blanks, underscores or hyphens. Other columns keep their names.

    Returns:
      The rows without blank ones, and the columns without blank ones at the end.

    Raises:
      InputError: the file cannot be read or decoded, two columns have the same name, a name is a likely misspelling of
        a known one, or a row has more or fewer fields than the header.
    """
    path = Path(path)
    if path.suffix.lower() in _PARQUET:
        return _read_parquet(path, known)
    text = _decode(path)
    delimiter, lines = _delimiter(text, known), []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for cells in reader:
            lines.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num}: is not a CSV ({error}); save the table as CSV again"
        ) from error
    # Excel's declaration of the delimiter.
    if lines and lines[0][1][0].casefold().startswith("sep="):
        lines = lines[1:]
    lines = [(number, cells) for number, cells in lines if any(cells)]
    header = lines[0][1] if lines else []
    width = len(header)
    while width and not any("".join(cells[width - 1 : width]) for _, cells in lines):
        width -= 1
    columns = _columns(path, header[:width], known)
    rows = []
    for number, cells in lines[1:]:
        if len(cells) < width or any(cells[width:]):
            quoted = "quote fields that contain commas" if delimiter == "," else "correct the row"
            raise InputError(
                f"{path}, line {number}: has {len(cells)} fields, the header has {width}; add the missing ones, or {quoted}"
            )
        rows.append(TableRow(number, dict(zip(columns, cells, strict=False))))
    return Table(columns, tuple(rows))


def renamed(path: Path, table: Table, names: Mapping[str, str]) -> Table:
    """The table with columns of other names, by the names that the reader knows; two of these may be one column.

    Raises InputError for a column that the table does not have.
    """
    for name, written in names.items():
        if written not in table.columns:
            raise InputError(
                f"{path}: has no column {written!r}, which is named for {name}; its columns are "
                f"{', '.join(table.columns) or 'none'}"
            )
    # A column keeps its own name too, unless that is a name the reader knows: it holds something else.
    own_columns = [column for column in table.columns if column not in names or column in names.values()]
    rows = tuple(
        TableRow(
            row.line,
            {column: row.cells[column] for column in own_columns}
            | {name: row.cells[column] for name, column in names.items()},
        )
        for row in table.rows
    )
    return Table(tuple(dict.fromkeys((*own_columns, *names))), rows)


def _read_parquet(path: Path, known: Sequence[str]) -> Table:
    """Rows are counted from 1; a list, such as a set of classes, becomes its items joined by a bar."""
    parquet = require_extra("pyarrow.parquet", "parquet", f"reading {path}")
    try:
        content = parquet.read_table(path)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: cannot be read as Parquet ({reason}); write it again, or as CSV") from error
    columns = _columns(path, list(content.column_names), known)
    texts = [[_text_of(value) for value in column.to_pylist()] for column in content.columns]
    rows = (
        TableRow(line, dict(zip(columns, cells, strict=True))) for line, cells in enumerate(zip(*texts, strict=True), 1)
    )
    return Table(columns, tuple(rows))


def _text_of(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "|".join(map(str, value)) if isinstance(value, list) else str(value).strip()


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    for signature, kind in _WORKBOOKS.items():
        if data.startswith(signature):
            raise InputError(f"{path}: is {kind}, not a CSV; save the sheet as 'CSV UTF-8'")
    try:
        if data.startswith(_UTF16_MARKS):
            return data.decode("utf-16")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: must be UTF-8 or UTF-16, got the byte 0x{data[error.start]:02X}; save the table as 'CSV UTF-8'"
        ) from error
    if "\0" in text:
        raise InputError(f"{path}: contains zero bytes, so it is no text; save the table as 'CSV UTF-8'")
    return text


def _delimiter(text: str, known: Sequence[str]) -> str:
    """The delimiter that Excel declares, or the one that separates most known column names in the header."""
    first = next((line for line in text.splitlines() if line.strip(" ,;\t")), "")
    if first.casefold().startswith("sep=") and first[4:5] in _DELIMITERS:
        return first[4:5]
    keys = {column_key(name) for name in known}

    def known_names(delimiter: str) -> tuple[int, int]:
        names = next(csv.reader([first], delimiter=delimiter), [])
        return sum(column_key(name) in keys for name in names), len(names)

    return max(_DELIMITERS, key=known_names)


def _columns(path: Path, header: list[str], known: Sequence[str]) -> tuple[str, ...]:
    name_of = {column_key(name): name for name in known}
    columns: dict[str, str] = {}
    for number, written in enumerate(header, 1):
        name = name_of.get(column_key(written), written) if written else f"column {number}"
        if name in columns:
            duplicate = f"the column {name!r} twice"
            if columns[name] != written:
                duplicate = f"the columns {columns[name]!r} and {written!r}, which are the same"
            raise InputError(f"{path}: has {duplicate}; keep one")
        columns[name] = written
    further = [name for name in columns if name not in known]
    for name in known:
        if name not in columns:
            near = difflib.get_close_matches(name, [other.casefold() for other in further], 1, _MISSPELLED)
            if near:
                written = next(other for other in further if other.casefold() == near[0])
                raise InputError(f"{path}: has no column {name!r}; rename {written!r}")
    return tuple(columns)
