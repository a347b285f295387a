"""Pseudonyms of slides and cases: keyed hashes, which only an owner of the key can match with the ids."""

from __future__ import annotations

import csv
import hashlib
import hmac
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path

from crcjax.data.cohort import LABEL, SlideRow, load_cohort
from crcjax.data.csv_table import column_key
from crcjax.errors import InputError, writing

_KEY_BYTES = 32
# Hexadecimal digits of a pseudonym, 80 bits: two of a million ids collide with a probability of 4 x 10^-13.
_DIGITS = 20


def load_key(path: str | Path) -> bytes:
    """Reads a key from a file, without the end of the line.

    Raises InputError if the key is short, or if every user can read the file.
    """
    path = Path(path)
    try:
        key, mode = path.read_bytes().rstrip(b"\r\n"), path.stat().st_mode
    except OSError as error:
        raise InputError(f"{path}: the key cannot be read ({error.strerror}); check the path") from error
    if mode & 0o007:
        raise InputError(f"{path}: every user can read the key; chmod 600 it, and make a new one if anybody read it")
    if len(key) < _KEY_BYTES:
        raise InputError(
            f"{path}: a key of {len(key)} bytes can be guessed; make one of {_KEY_BYTES} or more: openssl rand -hex 32"
        )
    return key


def pseudonym(key: bytes, identifier: str) -> str:
    """The HMAC-SHA256 (RFC 2104) of an id, truncated to 80 bits.

    Equal ids have equal pseudonyms, whether they name slides or cases.
    """
    # The letter at the start keeps spreadsheets from reading digits such as 1e5 as a number.
    return "p" + hmac.new(key, identifier.encode(), hashlib.sha256).hexdigest()[:_DIGITS]


def write_pseudonymous(
    cohort: str | Path, key: bytes, out: str | Path, keep: Sequence[str] = (), label: str = LABEL
) -> int:
    """Writes a cohort's CSV with pseudonyms in place of its ids.

    The new table has the columns slide_id, case_id, the labels, site, scanner and split. Slide paths are never written.

    Args:
      cohort: the table to read.
      key: the key of the pseudonyms.
      out: the table to write.
      keep: further columns to write. Names may differ in case, blanks, underscores and hyphens.
      label: the column of the labels.

    Returns:
      The number of rows.

    Raises:
      InputError: the cohort is not usable, has no column that `keep` names, or `out` exists.
      OutputError: `out` cannot be written.
    """
    out, rows = Path(out), load_cohort(cohort, None, label).rows
    field_of_column = {label if field.name == "label" else field.name: field.name for field in fields(SlideRow)}
    columns = [name for name in field_of_column if name not in ("path", "mpp", "extra")]
    further_columns = [_further_column(cohort, rows[0], name, field_of_column) for name in keep]
    further_columns = [name for name in dict.fromkeys(further_columns) if name not in columns]
    with writing(out):
        try:
            with open(out, "x", newline="") as file:
                table = csv.writer(file)
                table.writerow([*columns, *further_columns])
                for row in rows:
                    pseudonyms = {name: pseudonym(key, getattr(row, name)) for name in ("slide_id", "case_id")}
                    values = [pseudonyms.get(name) or getattr(row, field_of_column[name]) or "" for name in columns]
                    table.writerow([*values, *(_cell(row, name) for name in further_columns)])
        except FileExistsError:
            raise InputError(f"{out}: exists, and is not overwritten; choose another --out") from None
    return len(rows)


def _further_column(cohort: str | Path, row: SlideRow, name: str, known: Collection[str]) -> str:
    """The column of the table that `--keep name` refers to. Raises InputError if there is none."""
    if column_key(name) == "path":
        raise InputError(f"{cohort}: --keep {name}: paths identify, and are never kept; leave it out")
    available = [column for column in known if column not in ("path", "extra")] + list(row.extra)
    for column in available:
        if column_key(column) == column_key(name):
            return column
    further = ", ".join(row.extra) or "none"
    raise InputError(f"{cohort}: --keep {name}: has no such column; its further columns are: {further}")


def _cell(row: SlideRow, column: str) -> str:
    if column == "mpp":
        return "" if row.mpp is None else repr(row.mpp)
    return row.extra[column]
