"""Compares predictions with a cohort's reference labels: metrics.json, cases.csv and a self-contained report.html."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

import crcjax
from crcjax.data.cohort import CALIBRATION, LABEL, SlideRow, load_cohort
from crcjax.errors import InputError, writing
from crcjax.slides.tiling.qc_result import REFUSED
from crcjax.validation.attention_truth import attention_auroc, slide_truth
from crcjax.validation.estimate import Estimate
from crcjax.validation.figures import confusion_figure, reliability_figure, roc_figure
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.predictions_table import (
    PredictionRow,
    probabilities_of,
    probability_columns,
    table_text,
)
from crcjax.validation.selective import uncertainty_statistics
from crcjax.validation.statistics import aggregate_cases, evaluate
from crcjax.validation.whole_files import write_whole

# Heatmaps on the page.
HEATMAPS = 6
# Cases on the page, misclassified ones first; OUT/cases.csv has all.
LISTED_CASES = 100
ALL_SUBTYPES = "all subtypes"


def validate(
    predictions_csv: Path, cohort_csv: Path, out: Path, truth: Path | None = None, seed: int = 0, label_column: str = ""
) -> dict:
    """Compares predictions with reference labels; writes OUT/metrics.json, OUT/report.html and OUT/cases.csv.

    Cases in the split `train` or `val` of the cohort, or of the run that predicted them, are not evaluated: the model was
    fitted or selected on them. Cases that cross-validation predicted are evaluated, since other runs predicted them.
    The three files are replaced together, each whole or not at all.

    Args:
      predictions_csv: predictions.csv of crcjax predict, or another system's table with its columns.
      cohort_csv: the table with the reference labels; its case ids decide which slides belong together.
      out: the folder.
      truth: the folder of synthetic slides with their ground truth.
      seed: the seed of the bootstrap.
      label_column: the cohort's column of the labels; by default the target that the predictions name, or `subtype`.

    Returns:
      The content of metrics.json.

    Raises:
      InputError: the tables are not usable, contradict each other, or share no held-out slide with a reference label.
      OutputError: the folder cannot be written.
    """
    predictions = load_predictions(predictions_csv)
    column = label_column or predictions.target_name or LABEL
    cohort = {row.slide_id: row for row in load_cohort(cohort_csv, predictions.classes, column).rows}
    if not any(row.label for row in cohort.values()):
        raise InputError(
            f"{cohort_csv}: no slide has a reference label; add the column {column} with the values "
            f"{', '.join(predictions.classes)}"
        )
    in_cohort = [row for row in predictions.rows if row.slide_id in cohort]
    if not in_cohort:
        raise InputError(
            f"{cohort_csv}: has none of the {len(predictions.rows)} slides of {predictions_csv} (first: "
            f"{predictions.rows[0].slide_id if predictions.rows else 'none'}); check that the slide ids agree"
        )
    _check_cases(in_cohort, cohort, predictions_csv, cohort_csv)

    def case_of(row: PredictionRow) -> str:
        return cohort[row.slide_id].case_id

    cross_validated = {case_of(row) for row in in_cohort if row.fold}
    fitted = {row.case_id for row in cohort.values() if row.split in ("train", "val", CALIBRATION)} - cross_validated
    fitted |= {case_of(row) for row in in_cohort if row.split in ("train", "val")}
    held_out = [row for row in in_cohort if case_of(row) not in fitted]
    with_reference = [row for row in held_out if cohort[row.slide_id].label is not None]
    evaluated = [row for row in with_reference if row.is_ok]
    if not evaluated:
        raise InputError(
            f"{predictions_csv}: no slide has both a prediction and a reference label outside train and val in "
            f"{cohort_csv}; predict held-out slides, and fill in their {column}"
        )
    cases, probs = aggregate_cases([case_of(row) for row in evaluated], probabilities_of(evaluated))
    subtype_of = {row.case_id: row.label for row in cohort.values()}
    label = np.array([predictions.classes.index(subtype_of[case] or "") for case in cases])
    no_calls = {case_of(row) for row in with_reference} - set(cases)
    not_predicted = {row.case_id for row in cohort.values() if row.label and row.case_id not in fitted}
    not_predicted -= {case_of(row) for row in in_cohort}
    statistics = evaluate(label, probs, predictions.classes, seed, len(no_calls))
    uncertainty = uncertainty_statistics(evaluated, [cohort[row.slide_id] for row in evaluated])
    attention = _attention(truth, predictions_csv.parent, evaluated, cohort, predictions.classes)
    result = {
        "synthetic": truth is not None or any(row.synthetic for row in predictions.rows),
        "flow": {
            "slides in predictions": len(predictions.rows),
            "slides not in the cohort": len(predictions.rows) - len(in_cohort),
            "slides of training and validation cases, not evaluated": len(in_cohort) - len(held_out),
            "slides without a reference": len(held_out) - len(with_reference),
            "slides without a prediction": len(with_reference) - len(evaluated),
            "slides that tiling refused": sum(row.qc_verdict == REFUSED for row in with_reference),
            "slides evaluated": len(evaluated),
            "evaluated slides with the QC status reject": sum(row.qc_verdict == "reject" for row in evaluated),
            "evaluated slides with the QC status review": sum(row.qc_verdict == "review" for row in evaluated),
            "cases evaluated": len(cases),
            "cases without any prediction (no-calls)": len(no_calls),
            "cases of the cohort that were not given to crcjax predict": len(not_predicted),
        },
        "statistics": {name: asdict(v) if isinstance(v, Estimate) else v for name, v in statistics.items()},
        "uncertainty": {name: asdict(v) if isinstance(v, Estimate) else v for name, v in uncertainty.items()},
        "attention": attention,
        "no-calls by subtype": {
            name: sum(subtype_of[case] == name for case in no_calls) for name in predictions.classes
        },
        "provenance": {
            "crcjax": crcjax.__version__,
            "model": sorted({row.model for row in predictions.rows if row.model}),
            "predictions sha256": hashlib.sha256(predictions_csv.read_bytes()).hexdigest(),
            "cohort sha256": hashlib.sha256(cohort_csv.read_bytes()).hexdigest(),
            "bootstrap seed": seed,
        },
    }
    table = _case_table(cases, label, probs, predictions.classes)
    failed = Counter((row.status, row.reason) for row in with_reference if not row.is_ok)
    heatmaps = predictions_csv.parent / "heatmaps"
    pictures = _chosen([row for row in evaluated if (heatmaps / f"{row.slide_id}.png").exists()], cohort)
    not_accepted = [row for row in with_reference if row.qc_verdict not in ("", "accept")]
    not_accepted.sort(key=lambda row: (row.qc_coverage or 0.0, row.slide_id))
    page = _page(result, predictions.classes, label, probs, table, failed, not_accepted, heatmaps, pictures, cohort)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_whole(
        {
            out / "cases.csv": table_text([_case_texts(row, predictions.classes) for row in table]),
            # JSON has no NaN; a value that the data do not determine is null.
            out / "metrics.json": json.dumps(_without_nan(result), indent=1) + "\n",
            out / "report.html": page,
        }
    )
    return result


def _check_cases(
    rows: Sequence[PredictionRow], cohort: dict[str, SlideRow], predictions_csv: Path, cohort_csv: Path
) -> None:
    """Raises InputError if the two tables ascribe a slide to different cases.

    Slides that were predicted without a cohort have their own id as the case, which contradicts nothing.
    """
    differing = [row for row in rows if row.case_id not in ("", row.slide_id, cohort[row.slide_id].case_id)]
    if differing:
        first = differing[0]
        raise InputError(
            f"{predictions_csv}: {len(differing)} slides have another case_id than in {cohort_csv} (first: slide "
            f"{first.slide_id} has {first.case_id!r} and {cohort[first.slide_id].case_id!r}); correct the wrong table"
        )


def _attention(
    truth: Path | None,
    folder: Path,
    rows: Sequence[PredictionRow],
    cohort: dict[str, SlideRow],
    classes: tuple[str, ...],
) -> dict | None:
    """Mean AUROC of attention for the tissue that carries the subtype, over correctly classified slides, by subtype."""
    if truth is None:
        return None
    values: dict[str, list[float]] = {name: [] for name in classes}
    for row in rows:
        ground_truth = slide_truth(truth, row.slide_id)
        if ground_truth is not None and row.call == cohort[row.slide_id].label:
            value = attention_auroc(ground_truth, folder / "attention" / f"{row.slide_id}.npz")
            if math.isfinite(value):
                values[row.call].append(value)
    groups = values | {ALL_SUBTYPES: [value for class_values in values.values() for value in class_values]}
    return {name: {"slides": len(v), "mean AUROC": float(np.mean(v)) if v else math.nan} for name, v in groups.items()}


def _case_table(
    cases: Sequence[str], label: np.ndarray, probs: np.ndarray, classes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """One row per case, misclassified cases first."""
    predicted = probs.argmax(axis=1)
    table = [
        {"case": case, "reference": classes[label[i]], "predicted": classes[predicted[i]], "probs": probs[i]}
        for i, case in enumerate(cases)
    ]
    return sorted(table, key=lambda row: (row["reference"] == row["predicted"], row["case"]))


def _case_texts(row: dict[str, Any], classes: tuple[str, ...]) -> dict[str, str]:
    probabilities = dict(zip(probability_columns(classes), map(str, row["probs"]), strict=True))
    return {"case_id": row["case"], "reference": row["reference"], "predicted": row["predicted"], **probabilities}


def _page(
    result: dict,
    classes: tuple[str, ...],
    label: np.ndarray,
    probs: np.ndarray,
    table: list[dict[str, Any]],
    failed: Mapping[tuple[str, str], int],
    not_accepted: Sequence[PredictionRow],
    heatmaps: Path,
    pictures: Sequence[PredictionRow],
    cohort: dict[str, SlideRow],
) -> str:
    synthetic = result["synthetic"]
    figures = {
        "Confusion matrix": confusion_figure(result["statistics"]["confusion matrix"], classes, synthetic),
        "Reliability": reliability_figure(label, probs, synthetic),
        "One subtype against the rest": roc_figure(label, probs, classes, synthetic),
    }
    shown = [
        {"row": row, "reference": cohort[row.slide_id].label, "png": _base64(heatmaps / f"{row.slide_id}.png")}
        for row in pictures
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crcjax.validation", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = _number
    environment.filters["interval"] = _interval
    return environment.get_template("report.html").render(
        result=result,
        classes=classes,
        estimates={k: v for k, v in result["statistics"].items() if isinstance(v, dict)},
        uncertainty=result["uncertainty"],
        numbers={k: v for k, v in result["statistics"].items() if isinstance(v, float)},
        failed=failed,
        not_accepted=[{"row": row, "reference": cohort[row.slide_id].label} for row in not_accepted[:LISTED_CASES]],
        all_not_accepted=len(not_accepted),
        no_calls={name: count for name, count in result["no-calls by subtype"].items() if count},
        figures={name: base64.b64encode(png).decode() for name, png in figures.items()},
        table=table[:LISTED_CASES],
        cases=len(table),
        pictures=shown,
    )


def _chosen(rows: Sequence[PredictionRow], cohort: dict[str, SlideRow]) -> list[PredictionRow]:
    """Slides for the page: two misclassified ones, which show where the model errs, then correct ones, subtypes in turn."""
    correct: dict[str, list[PredictionRow]] = {}
    misclassified = []
    for row in rows:
        if row.call == cohort[row.slide_id].label:
            correct.setdefault(row.call, []).append(row)
        else:
            misclassified.append(row)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*correct.values()))
    return [row for row in (*misclassified[:2], *in_turn) if row is not None][:HEATMAPS]


def _number(value: float | None) -> str:
    return "not determined" if value is None or value != value else f"{value:.3f}"


def _interval(estimate: dict[str, Any]) -> str:
    low, high = _number(estimate["ci_low"]), _number(estimate["ci_high"])
    return low if low == high == _number(None) else f"{low} to {high}"


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
