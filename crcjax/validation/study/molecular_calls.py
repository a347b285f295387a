"""Reads the calls of published molecular classifiers from the tables that these write in R: CMScaller and CMSclassifier."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from crcjax.data.csv_table import is_missing
from crcjax.errors import InputError

# The column of the call, by classifier: that of CMScaller (Eide et al. 2017), and those of CMSclassifier (Guinney et al. 2015):
# random forest and single sample, each by the nearest class or with unclassified samples.
CALL_COLUMNS = {
    "prediction": "CMScaller",
    "RF.predictedCMS": "CMSclassifier, random forest",
    "SSP.predictedCMS": "CMSclassifier, single sample",
    "RF.nearestCMS": "CMSclassifier, random forest, nearest",
    "SSP.nearestCMS": "CMSclassifier, single sample, nearest",
}
_DELIMITERS = "\t,; "


def read_molecular_calls(path: Path, classes: Sequence[str]) -> dict[str, str]:
    """The call of every sample by its name, which is the first column; samples without a call are left out.

    R's `write.table` leaves the name of the first column out of the header, `write.csv` leaves it empty, and other writers
    name it; all of these are read.

    Args:
      path: the table, as R writes it.
      classes: the valid calls.

    Raises:
      InputError: the file is no such table, or a call is no class.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); give the table that CMScaller or CMSclassifier wrote"
        ) from error
    delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
    lines = [line for line in csv.reader(text.splitlines(), delimiter=delimiter) if line]
    header = lines[0] if lines else []
    if lines[1:] and len(lines[1]) == len(header) + 1:
        header = ["", *header]
    column = next((name for name in CALL_COLUMNS if name in header), None)
    if column is None:
        raise InputError(
            f"{path}: has none of the columns {', '.join(CALL_COLUMNS)}, which CMScaller and CMSclassifier write; its columns "
            f"are {', '.join(header) or 'none'}"
        )
    place, calls = header.index(column), {}
    for number, line in enumerate(lines[1:], 2):
        call = line[place].strip() if len(line) > place else ""
        if is_missing(call):
            continue
        if call not in classes:
            raise InputError(f"{path}, line {number}: {column} must be one of {', '.join(classes)}, got {call!r}")
        calls[line[0].strip()] = call
    return calls
