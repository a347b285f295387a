"""The table of predictions: one row per scan, as crcjax predict writes it and as tables of other systems are read."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from crcjax.slides.tiling.qc_result import QCResult
from crcjax.validation.whole_files import write_whole

PROBABILITY, ALPHA, SECONDS = "p_", "alpha_", "seconds_"
# A prediction; a slide that quality control or tiling refused; anything else that left the slide without a prediction.
OK, NOT_EVALUABLE, FAILED = STATUSES = ("ok", "not_evaluable", "failed")
# The stages whose seconds crcjax predict writes; `wait` is the part of decoding that encoding did not hide.
STAGES = ("total", "plan", "stain", "read", "encode", "pool", "pictures")
# The text of an empty conformal set.
_NO_CLASS = "none"
_MEASURES = ("entropy", "expected_entropy", "mutual_information", "vacuity", "ood")
_STAIN = ("stain_red", "stain_green", "stain_blue")
# Names of columns and statuses in tables of earlier versions.
_EARLIER_COLUMNS = {"call": "subtype", "conformal_set": "set", "qc_verdict": "qc_status"}
_EARLIER_REFUSALS = ("no_tissue", "too_coarse", "unsupported", "corrupt", "mpp_missing")
EARLIER_NAMES = (*_EARLIER_COLUMNS.values(), "seconds")


@dataclass(frozen=True)
class PredictionRow:
    """The row of one scan.

    Attributes:
      slide_id: names the scan; unique in the table.
      case_id: the patient.
      status: `ok`; `not_evaluable` for a slide that quality control or tiling refused, or that exceeds a limit of the
        calibration; `failed`. Without `ok`, `reason` says why, and `call` is empty; only a slide that exceeds a limit has
        probabilities and uncertainties then.
      site, scanner, target: what the cohort says of the slide; `target` is the reference class.
      target_name: the name of the predicted property, such as subtype; the labels are in the cohort's column of that name.
      call: the predicted class.
      probs: in the order of the table's classes, after calibration.
      alpha: the Dirichlet parameters of an evidential head, before calibration; empty for other heads.
      entropy, expected_entropy, mutual_information: in nats (docs/uncertainty.md).
      conformal_set: None without a calibration; may be empty with one.
      qc_verdict, qc_coverage, qc_reasons: the slide's QCResult; tables of other systems lack them.
      seconds: the duration of each stage.
      slide_sha256: the slide's content hash (`slides.wsi.discovery.content_hash`).
      bundle_id: the bundle that predicted; empty for a run directory.
      pipeline_id: a hash of all that decides a prediction besides the parameters and the slide.
      split, fold: how the model's runs used the case.
      model, calibration: ids of the parameters and of the calibration.
      regions: regions with tissue.
      ood: the feature density's excess, 0 in-distribution; None for heads without a density.
      stain: the median optical densities of the tissue in red, green and blue; empty if unknown.
    """

    slide_id: str
    case_id: str
    status: str
    reason: str = ""
    model: str = ""
    call: str = ""
    probs: tuple[float, ...] = ()
    alpha: tuple[float, ...] = ()
    entropy: float | None = None
    expected_entropy: float | None = None
    mutual_information: float | None = None
    vacuity: float | None = None
    conformal_set: tuple[str, ...] | None = None
    calibration: str = ""
    regions: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    split: str = ""
    synthetic: bool | None = None
    fold: str = ""
    qc_verdict: str = ""
    qc_coverage: float | None = None
    qc_reasons: str = ""
    site: str = ""
    scanner: str = ""
    target: str = ""
    target_name: str = ""
    slide_sha256: str = ""
    bundle_id: str = ""
    pipeline_id: str = ""
    ood: float | None = None
    stain: tuple[float, ...] = ()

    def with_qc(self, result: QCResult) -> PredictionRow:
        """The row with a slide's QC result."""
        reasons = "; ".join(result.reasons)
        return replace(self, qc_verdict=result.status, qc_coverage=result.coverage, qc_reasons=reasons)

    @property
    def is_ok(self) -> bool:
        """Whether the slide has a prediction and is evaluable."""
        return self.status == OK

    @property
    def has_prediction(self) -> bool:
        """Whether the row has probabilities, also of a slide that exceeds a limit."""
        return bool(self.probs)

    def to_csv(self, classes: Sequence[str]) -> dict[str, str]:
        """Returns the row as texts by column.

        Probabilities are written with all digits, so that equal probabilities meet a threshold fitted on the table.
        """
        texts = (
            "slide_id",
            "case_id",
            "site",
            "scanner",
            "target",
            "call",
            "status",
            "reason",
            "qc_verdict",
            "qc_reasons",
        )
        ids = ("target_name", "slide_sha256", "bundle_id", "pipeline_id", "split", "model", "calibration", "fold")
        values = {
            **{name: getattr(self, name) for name in (*texts, *ids)},
            **dict(zip(probability_columns(classes) if self.probs else (), map(str, self.probs), strict=True)),
            **dict(zip(alpha_columns(classes) if self.alpha else (), map(str, self.alpha), strict=True)),
            **{name: _text(getattr(self, name), ".4f") for name in _MEASURES},
            **{name: f"{value:.4f}" for name, value in zip(_STAIN, self.stain, strict=False)},
            "conformal_set": "" if self.conformal_set is None else "|".join(self.conformal_set) or _NO_CLASS,
            "regions": _text(self.regions, "d"),
            "qc_coverage": _text(self.qc_coverage, ".4f"),
            **{f"{SECONDS}{stage}": f"{duration:.2f}" for stage, duration in self.seconds.items()},
            "synthetic": "" if self.synthetic is None else "yes" if self.synthetic else "no",
        }
        return {name: values.get(name, "") for name in columns(classes, with_fold=bool(self.fold))}

    @classmethod
    def from_csv(cls, row: Mapping[str, str | None], classes: Sequence[str]) -> PredictionRow:
        """Reads the texts of one line; a missing column reads as empty.

        Without a column `call`, the predicted class is the one with the largest probability; without a column `status`, a
        row with probabilities is `ok`. Raises ValueError if the probabilities of an `ok` row do not sum to 1, or a number
        cannot be parsed.
        """

        def text(name: str) -> str:
            return (row.get(name) or row.get(_EARLIER_COLUMNS.get(name, "")) or "").strip()

        def number(name: str) -> float | None:
            return float(text(name)) if text(name) else None

        def numbers(names: Sequence[str]) -> list[str]:
            return [text(name) for name in names]

        status, reason = _status(text("status"), text("reason"), any(numbers(probability_columns(classes))))
        is_ok = status == OK
        texts, alpha, stain = (
            numbers(names) for names in (probability_columns(classes), alpha_columns(classes), _STAIN)
        )
        has_prediction = is_ok or (status == NOT_EVALUABLE and all(texts))
        probs = _probabilities(texts) if has_prediction else ()
        entropy = number("entropy")
        seconds = {name.removeprefix(SECONDS): float(value) for name, value in row.items() if value and _is_stage(name)}
        set_names = tuple(name for name in text("conformal_set").split("|") if name != _NO_CLASS)
        return cls(
            slide_id=text("slide_id"),
            case_id=text("case_id"),
            status=status,
            reason=reason,
            model=text("model"),
            call=(text("call") or classes[int(np.argmax(probs))]) if is_ok else "",
            probs=probs,
            alpha=tuple(map(float, alpha)) if has_prediction and all(alpha) else (),
            entropy=_entropy(probs) if entropy is None and is_ok else entropy,
            expected_entropy=number("expected_entropy"),
            mutual_information=number("mutual_information"),
            vacuity=number("vacuity"),
            conformal_set=set_names if text("conformal_set") else None,
            calibration=text("calibration"),
            regions=int(text("regions")) if text("regions") else None,
            seconds=seconds or ({"total": float(text("seconds"))} if text("seconds") else {}),
            split=text("split"),
            synthetic={"yes": True, "true": True, "no": False, "false": False}.get(text("synthetic").lower()),
            fold=text("fold"),
            qc_verdict=text("qc_verdict"),
            qc_coverage=number("qc_coverage"),
            qc_reasons=text("qc_reasons"),
            site=text("site"),
            scanner=text("scanner"),
            target=text("target"),
            target_name=text("target_name"),
            slide_sha256=text("slide_sha256"),
            bundle_id=text("bundle_id"),
            pipeline_id=text("pipeline_id"),
            ood=number("ood"),
            stain=tuple(map(float, stain)) if all(stain) else (),
        )


def columns(classes: Sequence[str], *, with_fold: bool = False) -> list[str]:
    """The columns that crcjax writes, in their order; only cross-validation writes the column `fold`."""
    return [
        *("slide_id", "case_id", "site", "scanner", "target", "call"),
        *(*probability_columns(classes), *alpha_columns(classes)),
        *("vacuity", "mutual_information", "conformal_set"),
        *("status", "reason", "qc_verdict", "qc_coverage", "qc_reasons"),
        *(f"{SECONDS}{stage}" for stage in STAGES),
        *("slide_sha256", "bundle_id", "pipeline_id", "split", "synthetic"),
        *("model", "calibration", "entropy", "expected_entropy", "regions", "target_name"),
        *("ood", *_STAIN),
        *(("fold",) if with_fold else ()),
    ]


def probability_columns(classes: Sequence[str]) -> list[str]:
    """The column of each class's probability."""
    return [f"{PROBABILITY}{name}" for name in classes]


def alpha_columns(classes: Sequence[str]) -> list[str]:
    """The column of each class's Dirichlet parameter."""
    return [f"{ALPHA}{name}" for name in classes]


def probabilities_of(rows: Sequence[PredictionRow]) -> Float[np.ndarray, "slide class"]:
    """The probabilities of rows with a prediction."""
    return np.array([row.probs for row in rows])


def read_partial(path: Path, classes: Sequence[str]) -> dict[str, PredictionRow]:
    """Reads the rows of an earlier run by slide id; that run may have been killed while it wrote the last row.

    Truncated and damaged lines are skipped. A table of other classes, or of an earlier version, counts as empty. Raises
    OSError.
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


def _status(status: str, reason: str, has_probabilities: bool) -> tuple[str, str]:
    """One of STATUSES and the reason; the statuses of earlier versions and of other systems become part of the reason."""
    if not status:
        return (OK, reason) if has_probabilities else (NOT_EVALUABLE, reason or "the table has no probabilities of it")
    if status in STATUSES:
        return status, reason
    known = NOT_EVALUABLE if status in _EARLIER_REFUSALS else FAILED
    return known, ": ".join(filter(None, (status, reason)))


def _is_stage(name: str | None) -> bool:
    return bool(name) and str(name).startswith(SECONDS)


def _probabilities(texts: Sequence[str]) -> tuple[float, ...]:
    try:
        values = tuple(float(text) for text in texts)
    except ValueError:
        values = (math.nan,)
    if not all(0 <= value <= 1 for value in values) or abs(sum(values) - 1) > 1e-3:
        raise ValueError(f"{list(texts)} are no probabilities that sum to 1")
    return values


def _entropy(probs: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


def _text(value: float | int | None, precision: str) -> str:
    return "" if value is None else f"{value:{precision}}"
