"""Reads and writes predictions.csv, which has one row per slide."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from crcjax.errors import InputError
from crcjax.slides.tiling.qc_result import QCResult
from crcjax.validation.whole_files import write_whole

_PROB = "p_"
# The text of an empty conformal set.
_NO_CLASS = "none"
_UNCERTAINTY = ("entropy", "expected_entropy", "mutual_information", "vacuity")
# Tables of other systems may lack all other columns.
_REQUIRED = ("slide_id", "case_id", "status", "reason", "model")


@dataclass(frozen=True)
class PredictionRow:
    """The row of one slide in predictions.csv.

    `status` is `ok` for a slide with a prediction. Otherwise `reason` states why it has none, and `subtype`, `probs` and the
    uncertainties are empty. `probs` are in the order of the table's classes. Entropies are in nats. `conformal_set` is None
    without a calibration and may be empty with one. `split` and `fold` state how the model's runs used the case. The `qc_`
    fields are those of the slide's QCResult; tables of other systems and of earlier versions lack them.
    """

    slide_id: str
    case_id: str
    status: str
    reason: str = ""
    model: str = ""
    subtype: str = ""
    probs: tuple[float, ...] = ()
    entropy: float | None = None
    expected_entropy: float | None = None
    mutual_information: float | None = None
    vacuity: float | None = None
    conformal_set: tuple[str, ...] | None = None
    calibration: str = ""
    regions: int | None = None
    seconds: float | None = None
    split: str = ""
    synthetic: bool | None = None
    fold: str = ""
    qc_status: str = ""
    qc_coverage: float | None = None
    qc_reasons: str = ""

    def with_qc(self, result: QCResult) -> PredictionRow:
        """The row with a slide's QC result."""
        reasons = "; ".join(result.reasons)
        return replace(self, qc_status=result.status, qc_coverage=result.coverage, qc_reasons=reasons)

    @property
    def is_ok(self) -> bool:
        """Whether the slide has a prediction."""
        return self.status == "ok"

    def to_csv(self, classes: Sequence[str]) -> dict[str, str]:
        """Returns the row as texts by column.

        Probabilities are written with all digits, so that equal probabilities meet a threshold fitted on the table.
        """
        values = {
            "slide_id": self.slide_id,
            "case_id": self.case_id,
            "subtype": self.subtype,
            **dict(zip(probability_columns(classes) if self.probs else (), map(str, self.probs), strict=True)),
            **{name: _text(getattr(self, name), ".4f") for name in _UNCERTAINTY},
            "set": "" if self.conformal_set is None else "|".join(self.conformal_set) or _NO_CLASS,
            "calibration": self.calibration,
            "regions": _text(self.regions, "d"),
            "status": self.status,
            "reason": self.reason,
            "qc_status": self.qc_status,
            "qc_coverage": _text(self.qc_coverage, ".4f"),
            "qc_reasons": self.qc_reasons,
            "seconds": _text(self.seconds, ".2f"),
            "model": self.model,
            "split": self.split,
            "synthetic": "" if self.synthetic is None else "yes" if self.synthetic else "no",
            "fold": self.fold,
        }
        return {name: values.get(name, "") for name in columns(classes, with_fold=bool(self.fold))}

    @classmethod
    def from_csv(cls, row: Mapping[str, str | None], classes: Sequence[str]) -> PredictionRow:
        """Reads the texts of one line; a missing column reads as empty.

        Without a column `subtype`, the predicted class is the one with the largest probability. Raises ValueError if
        the probabilities of an `ok` row do not sum to 1, or a number cannot be parsed.
        """

        def text(name: str) -> str:
            return (row.get(name) or "").strip()

        def number(name: str) -> float | None:
            return float(text(name)) if text(name) else None

        is_ok = text("status") == "ok"
        probs = _probabilities([text(name) for name in probability_columns(classes)]) if is_ok else ()
        predicted = (text("subtype") or classes[int(np.argmax(probs))]) if is_ok else ""
        set_names = tuple(name for name in text("set").split("|") if name != _NO_CLASS)
        return cls(
            slide_id=text("slide_id"),
            case_id=text("case_id"),
            status=text("status"),
            reason=text("reason"),
            model=text("model"),
            subtype=predicted,
            probs=probs,
            entropy=number("entropy"),
            expected_entropy=number("expected_entropy"),
            mutual_information=number("mutual_information"),
            vacuity=number("vacuity"),
            conformal_set=set_names if text("set") else None,
            calibration=text("calibration"),
            regions=int(text("regions")) if text("regions") else None,
            seconds=number("seconds"),
            split=text("split"),
            synthetic={"yes": True, "no": False}.get(text("synthetic")),
            fold=text("fold"),
            qc_status=text("qc_status"),
            qc_coverage=number("qc_coverage"),
            qc_reasons=text("qc_reasons"),
        )


def columns(classes: Sequence[str], *, with_fold: bool = False) -> list[str]:
    """The columns of predictions.csv in their order; only cross-validation writes the column `fold`."""
    return [
        *("slide_id", "case_id", "subtype", *probability_columns(classes)),
        *(*_UNCERTAINTY, "set", "calibration"),
        *("regions", "status", "reason", "qc_status", "qc_coverage", "qc_reasons"),
        *("seconds", "model", "split", "synthetic"),
        *(("fold",) if with_fold else ()),
    ]


def probability_columns(classes: Sequence[str]) -> list[str]:
    """The column of each class's probability."""
    return [f"{_PROB}{name}" for name in classes]


@dataclass(frozen=True)
class Predictions:
    """The content of predictions.csv."""

    rows: list[PredictionRow]
    classes: tuple[str, ...]

    @property
    def evaluable(self) -> list[PredictionRow]:
        """The rows with a prediction."""
        return [row for row in self.rows if row.is_ok]


def probabilities_of(rows: Sequence[PredictionRow]) -> Float[np.ndarray, "slide class"]:
    """The probabilities of rows with a prediction."""
    return np.array([row.probs for row in rows])


def load_predictions(path: Path) -> Predictions:
    """Reads predictions.csv.

    Raises InputError, which names the line, for missing columns, a slide in two rows, or probabilities that do not sum to 1.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            lines = [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the predictions.csv of crcjax predict") from error
    classes = tuple(name.removeprefix(_PROB) for name in names if name.startswith(_PROB))
    missing = set(_REQUIRED) - set(names)
    if missing or len(classes) < 2:
        wanted = ", ".join(sorted(missing)) or "p_SUBTYPE of each class"
        raise InputError(f"{path}: lacks {wanted}; give the predictions.csv of crcjax predict")
    rows: dict[str, PredictionRow] = {}
    for number, line in lines:
        try:
            row = PredictionRow.from_csv(line, classes)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}; correct it, or predict the slide again") from error
        if row.slide_id in rows:
            raise InputError(f"{path}, line {number}: slide {row.slide_id} is in two rows; keep one")
        if row.is_ok and row.subtype not in classes:
            raise InputError(
                f"{path}, line {number}: subtype must be one of {', '.join(classes)}, got {row.subtype!r}; correct it, or "
                "leave the column out"
            )
        rows[row.slide_id] = row
    return Predictions(list(rows.values()), classes)


def read_partial(path: Path, classes: Sequence[str]) -> dict[str, PredictionRow]:
    """Reads the rows of an earlier run by slide id; that run may have been killed while it wrote the last row.

    Truncated and damaged lines are skipped. A table of other classes counts as empty. Raises OSError.
    """
    try:
        written = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    complete_lines = written[: written.rfind(b"\n") + 1].decode("utf-8", "replace").replace("\0", "")
    reader = csv.DictReader(io.StringIO(complete_lines, newline=""))
    if not set(columns(classes)) <= set(reader.fieldnames or ()):
        return {}
    rows = {}
    for line in reader:
        if None in line or None in line.values():
            continue
        try:
            row = PredictionRow.from_csv(line, classes)
        except ValueError:
            continue
        rows[row.slide_id] = row
    return rows


def write_predictions(path: Path, rows: Sequence[PredictionRow], classes: Sequence[str]) -> None:
    """Writes predictions.csv whole or not at all. Raises OutputError."""
    names = columns(classes, with_fold=any(row.fold for row in rows))
    write_table(path, [row.to_csv(classes) for row in rows], names)


def write_table(path: Path, rows: Sequence[Mapping[str, str]], names: Sequence[str] = ()) -> None:
    """Writes a CSV whole or not at all; arguments as for `table_text`. Raises OutputError."""
    write_whole({path: table_text(rows, names)})


def table_text(rows: Sequence[Mapping[str, str]], names: Sequence[str] = ()) -> str:
    """A CSV with the columns `names`, by default all columns of the rows in order of appearance."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names or list(dict.fromkeys(name for row in rows for name in row)), restval="")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _probabilities(texts: Sequence[str]) -> tuple[float, ...]:
    try:
        values = tuple(float(text) for text in texts)
    except ValueError:
        values = (math.nan,)
    if not all(0 <= value <= 1 for value in values) or abs(sum(values) - 1) > 1e-3:
        raise ValueError(f"{list(texts)} are no probabilities that sum to 1")
    return values


def _text(value: float | int | None, precision: str) -> str:
    return "" if value is None else f"{value:{precision}}"
