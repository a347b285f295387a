"""predictions.csv read back, and checked."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crcjax.errors import InputError


@dataclass(frozen=True)
class Predictions:
    """predictions.csv read back; `probs` only of the rows whose status is ok."""

    rows: list[dict[str, str]]
    classes: tuple[str, ...]

    @property
    def evaluable(self) -> list[dict[str, str]]:
        return [row for row in self.rows if row["status"] == "ok"]

    def probs(self, rows: list[dict[str, str]]) -> np.ndarray:
        return np.array([[float(row[f"p_{name}"]) for name in self.classes] for row in rows])


def load_predictions(path: Path) -> Predictions:
    """Reads predictions.csv. Raises InputError naming the line: missing columns, doubled slides, no probabilities."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            lines = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the predictions.csv of crcjax predict") from error
    classes = tuple(name.removeprefix("p_") for name in columns if name.startswith("p_"))
    missing = {"slide_id", "case_id", "status", "reason", "model"} - set(columns)
    if missing or len(classes) < 2:
        wanted = ", ".join(sorted(missing)) or "p_SUBTYPE of each class"
        raise InputError(f"{path}: lacks {wanted}; give the predictions.csv of crcjax predict")
    seen: set[str] = set()
    for number, row in lines:
        if row["slide_id"] in seen:
            raise InputError(f"{path}, line {number}: slide {row['slide_id']} stands there twice; keep one row")
        seen.add(row["slide_id"])
        if row["status"] == "ok":
            _check_probabilities(path, number, [row[f"p_{name}"] for name in classes])
    return Predictions([row for _, row in lines], classes)


def _check_probabilities(path: Path, number: int, texts: list[str]) -> None:
    try:
        values = [float(text) for text in texts]
    except (TypeError, ValueError):
        values = [math.nan]
    if not all(0 <= value <= 1 for value in values) or abs(sum(values) - 1) > 1e-3:
        raise InputError(f"{path}, line {number}: {texts} are no probabilities that sum to 1; predict the slide again")
