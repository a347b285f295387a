"""Prediction, calibration and validation in the Python API."""

from __future__ import annotations

import html
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crcjax.api.bundles import Bundle, open_bundle
from crcjax.api.display import Picture, Table, heading
from crcjax.api.runs import Run
from crcjax.api.stores import Store
from crcjax.audit.commands import audited
from crcjax.data.cohort import Cohort, SlideRow, load_cohort
from crcjax.data.slide_selection import named_slides
from crcjax.errors import InputError
from crcjax.progress import progress_bar
from crcjax.runs.bundle import is_bundle
from crcjax.runs.trained_model import TrainedModel
from crcjax.slides.jobs.worker_pool import check_main_guard
from crcjax.slides.store.tile_store import tiled_slides
from crcjax.validation.calibration import Calibration, load_calibration
from crcjax.validation.calibration import calibrate as _calibrate
from crcjax.validation.limits import SHARE
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.predictions_table import ALPHA, PROBABILITY, SECONDS
from crcjax.validation.report import validate as _validate

if TYPE_CHECKING:
    import pandas as pd

AnyPath = str | PathLike[str]
_NUMBERS = ("entropy", "expected_entropy", "mutual_information", "vacuity", "qc_coverage")


@audited("predict")
def predict(
    run: Run | Bundle | AnyPath | Iterable[Run | AnyPath],
    slides_or_store: Store | AnyPath | Iterable[AnyPath],
    out: AnyPath | None = None,
    *,
    cohort: AnyPath | None = None,
    calibration: CalibrationFile | AnyPath | None = None,
) -> Predictions:
    """Predicts the subtype of slides.

    Args:
      run: a trained run or a bundle, or several runs that differ by their seed, as an ensemble.
      slides_or_store: slide files, folders to search, a cohort CSV, or a tile store.
      out: the folder of predictions.csv, heatmaps/ and attention/; by default a new temporary folder, `Predictions.path`.
      cohort: CSV with the cases and sites of the slides; if given, only its slides are predicted.
      calibration: the result of `calibrate`, or its file; a bundle may have its own.

    Returns:
      The predictions. A slide that cannot be predicted does not stop the others: its row has the status and the reason.

    Raises:
      InputError: the run or the calibration is not usable, or there are no slides.
      OutputError: the folder cannot be written.
    """
    check_main_guard()
    members, own_calibration = _models(run)
    if own_calibration and calibration is not None:
        raise InputError("the bundle has a calibration of its own; leave calibration out")
    folder = Path(tempfile.mkdtemp(prefix="crcjax-predictions-") if out is None else out)
    fitted = own_calibration if calibration is None else Path(calibration)
    table = None if cohort is None else Path(cohort)
    store = _store_path(slides_or_store)
    if store is not None:
        _predict_store(members, store, folder, table, fitted)
    else:
        assert not isinstance(slides_or_store, Store)
        _predict_slides(members, slides_or_store, folder, table, fitted)
    return Predictions(folder)


def calibrate(
    predictions: Predictions | AnyPath,
    cohort: AnyPath,
    out: AnyPath | None = None,
    *,
    method: str = "lac",
    error: float = 0.1,
    by_site: bool = False,
    reject: float = SHARE,
) -> CalibrationFile:
    """Fits a temperature, conformal sets and limits for evaluable slides on calibration or validation cases.

    Args:
      predictions: predictions of the run's validation slides.
      cohort: CSV with the reference labels.
      out: the file; by default calibration.json beside predictions.csv.
      method: "lac" for the smallest sets, "aps" for sets that grow with the uncertainty.
      error: the share of sets that may miss the true subtype.
      by_site: fits a separate threshold for each site with enough cases.
      reject: the share of slides like these that each limit may refuse; 0 sets no limits.

    Raises:
      InputError: there are no validation cases, or an argument is out of range.
    """
    table = _predictions_csv(predictions)
    path = table.parent / "calibration.json" if out is None else Path(out)
    fitted = _calibrate(table, Path(cohort), path, method=method, error=error, by_site=by_site, reject=reject)
    return CalibrationFile(path, fitted)


def validate(
    predictions: Predictions | AnyPath, cohort: AnyPath, out: AnyPath, *, truth: AnyPath | None = None
) -> Report:
    """Compares predictions with reference labels; cases that the run was trained or chosen on are left out.

    Args:
      predictions: the predictions.
      cohort: CSV with slide_id, case_id and the target that the predictions name, such as `subtype`.
      out: the folder of metrics.json and report.html.
      truth: the folder of synthetic slides with their ground truth.

    Raises:
      InputError: no held-out case has both a prediction and a reference label.
      OutputError: the folder cannot be written.
    """
    _validate(_predictions_csv(predictions), Path(cohort), Path(out), None if truth is None else Path(truth))
    return Report(out)


class Predictions:
    """The folder of predictions.csv, with the heatmaps beside it."""

    def __init__(self, path: AnyPath):
        path = Path(path)
        self.path = path.parent if path.suffix == ".csv" else path
        self.csv = self.path / "predictions.csv"
        self._table = load_predictions(self.csv)

    @property
    def classes(self) -> tuple[str, ...]:
        """The subtypes, in the order of the probabilities."""
        return self._table.classes

    @property
    def rows(self) -> Table:
        """The rows of predictions.csv, with numbers as float or int and empty fields as None."""
        texts = (row.to_csv(self.classes) for row in self._table.rows)
        return Table({name: _value(name, text) for name, text in row.items()} for row in texts)

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a DataFrame. Raises InputError without the extra `notebook`."""
        return self.rows.to_pandas()

    def heatmap(self, slide_id: str) -> Picture:
        """The heatmap of a slide. Raises InputError if there is none."""
        path = self.path / "heatmaps" / f"{slide_id}.png"
        try:
            return Picture(path.read_bytes(), f"{slide_id}: heatmap")
        except OSError as error:
            existing = ", ".join(sorted(p.stem for p in path.parent.glob("*.png"))[:5]) or "none"
            raise InputError(f"{path}: there is no heatmap of {slide_id!r}; there are: {existing}") from error

    def __len__(self) -> int:
        return len(self._table.rows)

    def __fspath__(self) -> str:
        return os.fspath(self.csv)

    def __repr__(self) -> str:
        return f"Predictions({str(self.path)!r}, {len(self)} slides)"

    def _repr_html_(self) -> str:
        probabilities = (f"p_{name}" for name in self.classes)
        columns = ("slide_id", "case_id", "call", *probabilities, "conformal_set", "status", "reason", "qc_verdict")
        table = Table({name: row.get(name) for name in columns} for row in self.rows)
        return heading(f"{len(self)} predictions in {self.csv}; research use only") + table._repr_html_()


class CalibrationFile:
    """A fitted calibration and its file: a temperature and the thresholds of conformal sets."""

    def __init__(self, path: Path, values: Calibration):
        self.path, self.values = path, values
        self.temperature = values.temperature

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __repr__(self) -> str:
        return f"CalibrationFile({str(self.path)!r}, temperature {self.temperature:.3f})"

    def _repr_html_(self) -> str:
        values = self.values
        rows = [
            {"site": site or "all", "cases": values.cases.get(site), "threshold": threshold}
            for site, threshold in values.thresholds.items()
        ]
        return heading(f"Temperature {self.temperature:.3f}; sets miss {values.error:.0%}") + Table(rows)._repr_html_()


class Report:
    """The folder of metrics.json and report.html."""

    def __init__(self, path: AnyPath):
        self.path = Path(path)
        self.html = self.path / "report.html"
        self.metrics: dict[str, Any] = json.loads((self.path / "metrics.json").read_text())

    @property
    def statistics(self) -> Table:
        """One row per statistic: the value and the 95 % interval."""
        rows = []
        for name, estimate in self.metrics["statistics"].items():
            if isinstance(estimate, dict) and "value" in estimate:
                rows.append({"statistic": name} | {k: estimate.get(k) for k in ("value", "ci_low", "ci_high", "n")})
            elif isinstance(estimate, int | float):
                rows.append({"statistic": name, "value": estimate})
        return Table(rows)

    def __repr__(self) -> str:
        accuracy = self.metrics["statistics"]["balanced_accuracy"]["value"]
        return f"Report({str(self.html)!r}, balanced accuracy {accuracy:.3f})"

    def _repr_html_(self) -> str:
        stamp = "Synthetic slides: no evidence about patients. " if self.metrics["synthetic"] else ""
        link = (
            f'<p>{stamp}The full report: <a href="{html.escape(str(self.html))}">{html.escape(str(self.html))}</a></p>'
        )
        return heading("Validation") + link + self.statistics._repr_html_()


def _models(
    run: Run | Bundle | AnyPath | Iterable[Run | AnyPath],
) -> tuple[Sequence[Path | TrainedModel], Calibration | None]:
    """The models to predict with, and the calibration that a bundle holds."""
    if isinstance(run, str | PathLike) and not isinstance(run, Run | Bundle) and is_bundle(Path(run)):
        run = open_bundle(run)
    if isinstance(run, Bundle):
        return run.models, run.calibration
    runs = [run] if isinstance(run, Run | str | PathLike) else list(run)
    opened = [item if isinstance(item, Run) else Run(item) for item in runs]
    return [member for trained in opened for member in trained.members], None


def _predict_slides(
    members: Sequence[Path | TrainedModel],
    slides: AnyPath | Iterable[AnyPath],
    out: Path,
    cohort: Path | None,
    calibration: Path | Calibration | None,
) -> None:
    from crcjax.predict.predict_slides import PredictJob, predict_slides
    from crcjax.predict.predictor import Predictor

    paths: list[Path] | None = [Path(slides)] if isinstance(slides, str | PathLike) else [Path(path) for path in slides]
    if paths and len(paths) == 1 and paths[0].suffix.lower() == ".csv":
        cohort = paths[0]
        paths = None
    predictor = Predictor(*members)
    jobs = [
        PredictJob(s.slide_id, s.case_id, s.path, s.mpp, s.site, scanner=s.scanner, target=s.label)
        for s in named_slides(paths, cohort, label=predictor.target)
    ]
    fitted = load_calibration(calibration, predictor.model_id, predictor.classes) if calibration else None
    with progress_bar(quiet=True) as bar:
        task = bar.add_task("predict", total=len(jobs))
        predict_slides(predictor, jobs, out, calibration=fitted, on_row=lambda row: bar.advance(task))


def _predict_store(
    members: Sequence[Path | TrainedModel],
    store: Path,
    out: Path,
    cohort: Path | None,
    calibration: Path | Calibration | None,
) -> None:
    from crcjax.predict.member import opened_models
    from crcjax.predict.predict_store import predict_stored

    models = opened_models(members)
    slides = tuple(SlideRow(slide_id, slide_id) for slide_id in tiled_slides(store))
    chosen = load_cohort(cohort, None, models[0].config.data.label) if cohort else Cohort(slides, ())
    predict_stored(models, store, chosen, calibration, out=out)


def _store_path(slides_or_store: Store | AnyPath | Iterable[AnyPath]) -> Path | None:
    if isinstance(slides_or_store, Store):
        return slides_or_store.path
    if isinstance(slides_or_store, str | PathLike) and tiled_slides(Path(slides_or_store)):
        return Path(slides_or_store)
    return None


def _predictions_csv(predictions: Predictions | AnyPath) -> Path:
    if isinstance(predictions, Predictions):
        return predictions.csv
    path = Path(predictions)
    return path / "predictions.csv" if path.is_dir() else path


def _value(name: str, text: str | None) -> Any:
    if not text:
        return None
    if name.startswith((PROBABILITY, ALPHA, SECONDS)) or name in _NUMBERS:
        return float(text)
    return int(text) if name == "regions" and text.isdigit() else text
