"""Reads tables of predictions from CSV or Parquet: crcjax's own, earlier ones, and those of other systems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crcjax.data.csv_table import is_missing, parse_number, read_table, renamed
from crcjax.errors import InputError
from crcjax.validation.predictions_table import EARLIER_NAMES, PROBABILITY, PredictionRow, columns

# A single number per scan, from which the probabilities of two classes follow: of the second class.
SCORES = ("probability", "logit")
_READ = (*columns((), with_fold=True), *EARLIER_NAMES, *SCORES)


@dataclass(frozen=True)
class Predictions:
    """The content of a table of predictions.

    `has_probabilities` is False for a table of calls alone: the probability of each call is then 1.
    """

    rows: list[PredictionRow]
    classes: tuple[str, ...]
    has_probabilities: bool = True

    @property
    def target_name(self) -> str:
        """The name of what is predicted; empty in tables of other systems and of earlier versions."""
        return next((row.target_name for row in self.rows if row.target_name), "")

    @property
    def evaluable(self) -> list[PredictionRow]:
        """The rows with a prediction."""
        return [row for row in self.rows if row.is_ok]


def load_predictions(
    path: Path, classes: Sequence[str] | None = None, names: Mapping[str, str] | None = None
) -> Predictions:
    """Reads a table of predictions, one row per scan.

    `case_id` and a column `p_CLASS` for each class are enough. Two classes may have the column `probability` or `logit` of the
    second one instead. With `classes`, a table may have calls alone.

    Args:
      path: CSV or Parquet (`read_table`).
      classes: the classes in their order; by default those of the columns `p_CLASS`.
      names: for each column that the table calls otherwise, the table's name by crcjax's.

    Raises:
      InputError, naming the line: a column is missing, a scan is in two rows, probabilities do not sum to 1, a call or target
        is no class.
    """
    table = renamed(path, read_table(path, (*_READ, *(names or {}).values())), names or {})
    stated = tuple(name.removeprefix(PROBABILITY) for name in table.columns if name.startswith(PROBABILITY))
    known = tuple(classes) if classes is not None else stated
    score = next((name for name in SCORES if name in table.columns), None)
    derived = score is not None and len(known) == 2 and not set(known) & set(stated)
    calls_alone = classes is not None and not stated and not derived and "call" in table.columns
    missing = [name for name in ("case_id",) if name not in table.columns]
    missing += [] if derived or calls_alone else [f"{PROBABILITY}{name}" for name in known if name not in stated]
    if missing or len(known) < 2:
        wanted = ", ".join(missing or [f"{PROBABILITY}CLASS of each class"])
        raise InputError(
            f"{path}: has no column {wanted}; its columns are {', '.join(table.columns) or 'none'}: rename them, name them in "
            "the plan's [columns], or give the predictions.csv of crcjax predict"
        )
    rows: dict[str, PredictionRow] = {}
    for line in table.rows:
        cells = {name: "" if is_missing(text) else text for name, text in line.cells.items()}
        try:
            if derived:
                cells |= _two_classes(known, str(score), cells[str(score)])
            elif calls_alone:
                cells |= _certain(known, cells["call"])
            row = PredictionRow.from_csv(cells | {"slide_id": cells.get("slide_id") or cells["case_id"]}, known)
        except ValueError as error:
            raise InputError(f"{path}, line {line.line}: {error}; correct it, or predict the slide again") from error
        _check_row(path, line.line, row, known, rows, "slide_id" in table.columns)
        rows[row.slide_id] = row
    return Predictions(list(rows.values()), known, not calls_alone)


def _certain(classes: Sequence[str], call: str) -> dict[str, str]:
    """The probabilities of a call without any; none if there is no call. Raises ValueError for a call that is no class."""
    if call and call not in classes:
        raise ValueError(f"call must be one of {', '.join(classes)}, got {call!r}")
    return {f"{PROBABILITY}{name}": str(float(name == call)) for name in classes} if call else {}


def _two_classes(classes: Sequence[str], score: str, text: str) -> dict[str, str]:
    """The probabilities of two classes by the one number that the table states. Raises ValueError."""
    if not text:
        return {}
    value = parse_number(text)
    second = value if score == "probability" else 1 / (1 + math.exp(-value)) if value > -700 else 0.0
    return {f"{PROBABILITY}{classes[0]}": str(1 - second), f"{PROBABILITY}{classes[1]}": str(second)}


def _check_row(
    path: Path,
    line: int,
    row: PredictionRow,
    classes: Sequence[str],
    earlier: Mapping[str, PredictionRow],
    has_slides: bool,
) -> None:
    if not row.case_id:
        raise InputError(f"{path}, line {line}: case_id is empty; fill it in")
    if row.slide_id in earlier:
        remedy = "keep one" if has_slides else "add a column slide_id that tells the case's scans apart, or keep one"
        raise InputError(f"{path}, line {line}: slide {row.slide_id} is in two rows; {remedy}")
    for name, value, remedy in (
        ("call", row.call, "correct it, or leave the column out"),
        ("target", row.target, "correct it, or leave it empty if it is unknown"),
    ):
        if value and value not in classes:
            raise InputError(
                f"{path}, line {line}: {name} must be one of {', '.join(classes)}, got {value!r}; {remedy}"
            )
