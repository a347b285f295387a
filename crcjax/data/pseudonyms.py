"""Pseudonyms of slides and cases by keyed hash: who has the key can find them again, nobody else can."""

from __future__ import annotations

import csv
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from crcjax.data.cohort import SlideRow, load_cohort
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
    """Writes a cohort's CSV with pseudonyms as ids, and returns its rows.

    No other columns than subtype, site, scanner and split are taken over, and those of `keep`: never the paths. Raises
    InputError for an unusable cohort or column, or if `out` exists; OutputError.
    """
    out, rows = Path(out), load_cohort(cohort, None).rows
    columns = [field.name for field in fields(SlideRow) if field.name not in ("path", "mpp", "extra")]
    unknown = [name for name in keep if name not in rows[0].extra]
    if unknown:
        raise InputError(f"{cohort}: --keep {unknown[0]}: has no such column; it has {', '.join(rows[0].extra)}")
    with writing(out):
        try:
            with open(out, "x", newline="") as file:
                table = csv.writer(file)
                table.writerow([*columns, *keep])
                for row in rows:
                    hidden = {name: pseudonym(key, getattr(row, name)) for name in ("slide_id", "case_id")}
                    values = [hidden.get(name) or getattr(row, name) or "" for name in columns]
                    table.writerow([*values, *(row.extra[name] for name in keep)])
        except FileExistsError:
            raise InputError(f"{out}: exists, and is not overwritten; choose another --out") from None
    return len(rows)
