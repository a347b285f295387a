"""A reader study: who called what, for the same cases as the system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from crcjax.data.csv_table import is_missing, read_table, renamed
from crcjax.errors import InputError


@dataclass(frozen=True)
class Readings:
    """The readings of a reader study: class indices by case, reader and repeat; -1 where there is none."""

    case_ids: tuple[str, ...]
    readers: tuple[str, ...]
    calls: Int[np.ndarray, "case reader repeat"]


def load_readings(path: Path, classes: Sequence[str], names: Mapping[str, str]) -> Readings:
    """Reads a reader study: case_id, reader, call, and optionally repeat.

    Raises InputError, naming the line: a column is missing, a call is no class, a reading is there twice.
    """
    known = ("case_id", "reader", "call", "repeat")
    table = renamed(path, read_table(path, (*known, *names.values())), names)
    for name in known[:3]:
        if name not in table.columns:
            raise InputError(f"{path}: has no column {name!r}; its columns are {', '.join(table.columns) or 'none'}")
    rows = [(row.line, [row.cells.get(name, "") for name in known]) for row in table.rows]
    cases, readers, repeats = (tuple(dict.fromkeys(cells[place] for _, cells in rows)) for place in (0, 1, 3))
    calls = np.full((len(cases), len(readers), len(repeats)), -1)
    for line, (case, reader, call, repeat) in rows:
        if is_missing(call):
            continue
        if call not in classes:
            raise InputError(f"{path}, line {line}: call must be one of {', '.join(classes)}, got {call!r}; correct it")
        place = cases.index(case), readers.index(reader), repeats.index(repeat)
        if calls[place] >= 0:
            raise InputError(f"{path}, line {line}: {reader} read case {case} twice; keep one, or add a column repeat")
        calls[place] = list(classes).index(call)
    return Readings(cases, readers, calls)
