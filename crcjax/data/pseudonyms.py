"""Pseudonyms of slides and cases by keyed hash: who has the key can find them again, nobody else can."""

from __future__ import annotations

import csv
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from crcjax.data.cohort import SlideRow, load_cohort
from crcjax.data.csv_table import column_key
from crcjax.errors import InputError, writing

_KEY_BYTES = 32
_DIGITS = 20  # 80 bits: two of a million ids share a pseudonym once in 10^12 cohorts


def load_key(path: str | Path) -> bytes:
    """The key in a file, less the line's end. Raises InputError if it is short, or the file open to all users."""
    path = Path(path)
    try:
        key, mode = path.read_bytes().rstrip(b"\r\n"), path.stat().st_mode
    except OSError as error:
        raise InputError(f"{path}: the key cannot be read ({error.strerror}); check the path") from error
    if mode & 0o007:
        raise InputError(f"{path}: every user can read the key; chmod 600 it, and make a new one if it was seen")
    if len(key) < _KEY_BYTES:
        raise InputError(
            f"{path}: a key of {len(key)} bytes can be guessed; make one of {_KEY_BYTES} or more: openssl rand -hex 32"
        )
    return key


def pseudonym(key: bytes, identifier: str) -> str:
    """HMAC-SHA256 (RFC 2104) of an id, cut to 80 bits: equal ids have equal pseudonyms, of slides and cases alike.

    It begins with a letter, for spreadsheets take some hexadecimal numbers for floats.
    """
    return "p" + hmac.new(key, identifier.encode(), hashlib.sha256).hexdigest()[:_DIGITS]


def write_pseudonymous(cohort: str | Path, key: bytes, out: str | Path, keep: Sequence[str] = ()) -> int:
    """Writes a cohort's CSV with pseudonyms in place of its ids.

    The new table has the columns subtype, site, scanner and split, and those that `keep` names, whatever their case;
    never the slides' paths.

    Returns:
      The number of rows.

    Raises:
      InputError: the cohort is not usable, has no column that `keep` names, or `out` exists.
      OutputError: `out` cannot be written.
    """
    out, rows = Path(out), load_cohort(cohort, None).rows
    columns = [field.name for field in fields(SlideRow) if field.name not in ("path", "mpp", "extra")]
    further_columns = [_further_column(cohort, rows[0], name) for name in keep]
    further_columns = [name for name in dict.fromkeys(further_columns) if name not in columns]
    with writing(out):
        try:
            with open(out, "x", newline="") as file:
                table = csv.writer(file)
                table.writerow([*columns, *further_columns])
                for row in rows:
                    hidden = {name: pseudonym(key, getattr(row, name)) for name in ("slide_id", "case_id")}
                    values = [hidden.get(name) or getattr(row, name) or "" for name in columns]
                    table.writerow([*values, *(_cell(row, name) for name in further_columns)])
        except FileExistsError:
            raise InputError(f"{out}: exists, and is not overwritten; choose another --out") from None
    return len(rows)


def _further_column(cohort: str | Path, row: SlideRow, name: str) -> str:
    """The column that `--keep name` means, as the table writes it. Raises InputError."""
    if column_key(name) == "path":
        raise InputError(f"{cohort}: --keep {name}: paths identify, and are never kept; leave it out")
    available = [field.name for field in fields(SlideRow) if field.name not in ("path", "extra")] + list(row.extra)
    for column in available:
        if column_key(column) == column_key(name):
            return column
    further = ", ".join(row.extra) or "none"
    raise InputError(f"{cohort}: --keep {name}: has no such column; its further columns are: {further}")


def _cell(row: SlideRow, column: str) -> str:
    if column == "mpp":
        return "" if row.mpp is None else repr(row.mpp)
    return row.extra[column]
