"""predictions.csv: one typed row a slide, written and read in one place."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from crcjax.errors import InputError, writing

_PROB = "p_"
_NO_CLASS = "none"  # how an empty conformal set is written
_UNCERTAINTY = ("entropy", "expected_entropy", "mutual_information", "vacuity")
# Other systems' tables may lack every other column.
_REQUIRED = ("slide_id", "case_id", "status", "reason", "model")


@dataclass(frozen=True)
class PredictionRow:
    """What predictions.csv says about one slide.

    `status` is `ok` for a slide with a prediction; otherwise `reason` says why it has none, and `subtype`, `probs` and the
    uncertainties are empty. `probs` are in the order of the table's classes. Entropies are in nats. `conformal_set` is None
    without a calibration and may be empty with one. `split` and `fold` say how the model's runs used the case.
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

    @property
    def is_ok(self) -> bool:
        """Whether the slide has a prediction."""
        return self.status == "ok"

    def to_csv(self, classes: Sequence[str]) -> dict[str, str]:
        """The row as texts by column.

        Probabilities keep every bit, so that a threshold fitted on the table is met by equal probabilities.
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
            "seconds": _text(self.seconds, ".2f"),
            "model": self.model,
            "split": self.split,
            "synthetic": "" if self.synthetic is None else "yes" if self.synthetic else "no",
            "fold": self.fold,
        }
        return {name: values.get(name, "") for name in columns(classes, with_fold=bool(self.fold))}

    @classmethod
    def from_csv(cls, row: Mapping[str, str | None], classes: Sequence[str]) -> PredictionRow:
        """Reads the texts of one line; a column that is absent reads as empty.

        Without a column `subtype`, the predicted class is the one with the largest probability. Raises ValueError for
        probabilities of an `ok` row that do not sum to 1, and for texts that are no numbers.
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
        )


def columns(classes: Sequence[str], *, with_fold: bool = False) -> list[str]:
    """The columns of predictions.csv in their order; only cross-validation has the fold."""
    return [
        *("slide_id", "case_id", "subtype", *probability_columns(classes)),
        *(*_UNCERTAINTY, "set", "calibration"),
        *("regions", "status", "reason", "seconds", "model", "split", "synthetic"),
        *(("fold",) if with_fold else ()),
    ]


def probability_columns(classes: Sequence[str]) -> list[str]:
    """The column of each class's probability."""
    return [f"{_PROB}{name}" for name in classes]


@dataclass(frozen=True)
class Predictions:
    """predictions.csv read back."""

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

    Raises InputError naming the line: missing columns, a slide in two rows, probabilities that do not sum to 1.
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
    """The rows by slide id that an earlier run has written, even if it was killed while it wrote the last one.

    Lines that are cut off or damaged are left out; a table of other classes has no rows.
    """
    try:
        written = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    whole_lines = written[: written.rfind(b"\n") + 1].decode("utf-8", "replace").replace("\0", "")
    reader = csv.DictReader(io.StringIO(whole_lines, newline=""))
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
    """Writes predictions.csv, replacing an older one at once. Raises OutputError."""
    names = columns(classes, with_fold=any(row.fold for row in rows))
    write_table(path, [row.to_csv(classes) for row in rows], names)


def write_table(path: Path, rows: Sequence[Mapping[str, str]], names: Sequence[str] = ()) -> None:
    """Writes a CSV with the columns `names`, by default those of its rows, replacing an older one at once. Raises OutputError."""
    partial = path.with_name(f".{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", newline="") as file:
            table = csv.DictWriter(file, names or list(dict.fromkeys(name for row in rows for name in row)), restval="")
            table.writeheader()
            table.writerows(rows)
        partial.replace(path)


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
