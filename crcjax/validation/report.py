"""Predictions and a cohort to metrics.json and a self-contained report.html."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import jinja2
import numpy as np

import crcjax
from crcjax.data.cohort import SlideRow, load_cohort
from crcjax.errors import InputError, writing
from crcjax.validation.attention_truth import attention_auroc, truth_of
from crcjax.validation.figures import confusion_figure, reliability_figure, roc_figure
from crcjax.validation.predictions_table import Predictions, load_predictions
from crcjax.validation.selective import doubt_statistics
from crcjax.validation.statistics import Estimate, aggregate_cases, evaluate

HEATMAPS = 6


def validate(predictions_csv: Path, cohort_csv: Path, out: Path, truth: Path | None = None, seed: int = 0) -> dict:
    """Writes OUT/metrics.json and OUT/report.html; returns what metrics.json holds.

    Cases that are train or val in the cohort, or were so in the run that predicted them, are not evaluated, since the
    model was fitted and chosen on them; but those that cross-validation predicted are, by runs that never saw them. `truth` is a folder of painted slides' truths. `seed` is the bootstrap's. Raises
    InputError, OutputError.
    """
    predictions = load_predictions(predictions_csv)
    cohort = {row.slide_id: row for row in load_cohort(cohort_csv, predictions.classes).rows}
    known = [row for row in predictions.rows if row["slide_id"] in cohort]
    held_out = {cohort[row["slide_id"]].case_id for row in known if row.get("fold")}
    seen = {row.case_id for row in cohort.values() if row.split in ("train", "val")} - held_out
    seen |= {cohort[row["slide_id"]].case_id for row in known if row.get("split") in ("train", "val")}
    test = [row for row in known if cohort[row["slide_id"]].case_id not in seen]
    with_reference = [row for row in test if cohort[row["slide_id"]].subtype is not None]
    referenced = [row for row in with_reference if row["status"] == "ok"]
    if not referenced:
        raise InputError(
            f"{predictions_csv}: no slide has both a prediction and a reference subtype outside train and val in "
            f"{cohort_csv}; check that the slide ids agree"
        )
    cases, probs = aggregate_cases(
        [cohort[row["slide_id"]].case_id for row in referenced], predictions.probs(referenced)
    )
    subtype_of = {row.case_id: row.subtype for row in cohort.values()}
    label = np.array([predictions.classes.index(subtype_of[case] or "") for case in cases])
    no_calls = {cohort[row["slide_id"]].case_id for row in with_reference} - set(cases)
    absent = {row.case_id for row in cohort.values() if row.subtype and row.case_id not in seen}
    absent -= {cohort[row["slide_id"]].case_id for row in known}
    statistics = evaluate(label, probs, predictions.classes, seed, len(no_calls))
    doubt = doubt_statistics(referenced, [cohort[row["slide_id"]] for row in referenced])
    attention = _attention(truth, predictions_csv.parent, referenced, cohort, predictions)
    synthetic = truth is not None or any(row.get("synthetic") == "yes" for row in predictions.rows)
    result = {
        "synthetic": synthetic,
        "flow": {
            "slides in predictions": len(predictions.rows),
            "slides not in the cohort": len(predictions.rows) - len(known),
            "slides of training and validation cases, not evaluated": len(known) - len(test),
            "slides without a reference": len(test) - len(with_reference),
            "slides without a prediction": len(with_reference) - len(referenced),
            "slides evaluated": len(referenced),
            "cases evaluated": len(cases),
            "cases without any prediction (no-calls)": len(no_calls),
            "cases of the cohort that were not given to crcjax predict": len(absent),
        },
        "statistics": {name: asdict(v) if isinstance(v, Estimate) else v for name, v in statistics.items()},
        "doubt": {name: asdict(v) if isinstance(v, Estimate) else v for name, v in doubt.items()},
        "attention": attention,
        "provenance": {
            "crcjax": crcjax.__version__,
            "model": sorted({row["model"] for row in predictions.rows if row["model"]}),
            "predictions sha256": hashlib.sha256(predictions_csv.read_bytes()).hexdigest(),
            "cohort sha256": hashlib.sha256(cohort_csv.read_bytes()).hexdigest(),
            "bootstrap seed": seed,
        },
    }
    page = _page(result, predictions, cases, label, probs, predictions_csv.parent / "heatmaps", referenced, cohort)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        # NaN is no JSON: what the data do not determine is null.
        (out / "metrics.json").write_text(json.dumps(_without_nan(result), indent=1) + "\n")
        (out / "report.html").write_text(page)
    return result


def _attention(
    truth: Path | None, folder: Path, rows: list[dict], cohort: dict[str, SlideRow], predictions: Predictions
) -> dict | None:
    """AUROC of attention against the carriers, over correctly called slides of each subtype."""
    if truth is None:
        return None
    values: dict[str, list[float]] = {name: [] for name in predictions.classes}
    for row in rows:
        painted = truth_of(truth, row["slide_id"])
        if painted is not None and row["subtype"] == cohort[row["slide_id"]].subtype:
            value = attention_auroc(painted, folder / "attention" / f"{row['slide_id']}.npz")
            if math.isfinite(value):
                values[row["subtype"]].append(value)
    means = {name: {"slides": len(v), "mean AUROC": float(np.mean(v)) if v else math.nan} for name, v in values.items()}
    carried = values.get("immune", []) + values.get("stromal", [])
    both = {"slides": len(carried), "mean AUROC": float(np.mean(carried)) if carried else math.nan}
    return means | {"immune and stromal": both}


def _page(
    result: dict,
    predictions: Predictions,
    cases: list[str],
    label: np.ndarray,
    probs: np.ndarray,
    heatmaps: Path,
    rows: list[dict],
    cohort: dict[str, SlideRow],
) -> str:
    classes, synthetic = predictions.classes, result["synthetic"]
    confusion = result["statistics"]["confusion matrix"]
    figures = {
        "Confusion matrix": confusion_figure(confusion, classes, synthetic),
        "Reliability": reliability_figure(label, probs, synthetic),
        "One subtype against the rest": roc_figure(label, probs, classes, synthetic),
    }
    called = probs.argmax(axis=1)
    table = [
        {"case": case, "reference": classes[label[i]], "called": classes[called[i]], "probs": probs[i]}
        for i, case in enumerate(cases)
    ]
    table.sort(key=lambda row: (row["reference"] == row["called"], row["case"]))
    pictures = [
        {"row": row, "reference": cohort[row["slide_id"]].subtype, "png": _base64(heatmaps / f"{row['slide_id']}.png")}
        for row in _chosen([row for row in rows if (heatmaps / f"{row['slide_id']}.png").exists()], cohort)
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crcjax.validation", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = lambda value: (
        "not determined" if value is None or value != value else f"{value:.3f}"
    )
    return environment.get_template("report.html").render(
        result=result,
        classes=classes,
        estimates={k: v for k, v in result["statistics"].items() if isinstance(v, dict)},
        doubt=result["doubt"],
        numbers={k: v for k, v in result["statistics"].items() if isinstance(v, float)},
        failed=Counter((row["status"], row["reason"]) for row in predictions.rows if row["status"] != "ok"),
        figures={name: base64.b64encode(png).decode() for name, png in figures.items()},
        table=table,
        pictures=pictures,
    )


def _chosen(rows: list[dict], cohort: dict[str, SlideRow]) -> list[dict]:
    """Two wrong calls, then right ones of the subtypes in turn: a reader should see where the model errs, and what it looks at."""
    right: dict[str, list[dict]] = {}
    wrong = []
    for row in rows:
        if row["subtype"] == cohort[row["slide_id"]].subtype:
            right.setdefault(row["subtype"], []).append(row)
        else:
            wrong.append(row)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*right.values()))
    return [row for row in (*wrong[:2], *in_turn) if row is not None][:HEATMAPS]


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
