"""Reads the tables that a plan names, and refuses tables that contradict each other or the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from crcjax.data.cohort import LABEL, Cohort, load_cohort
from crcjax.data.csv_table import read_table
from crcjax.errors import InputError
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.predictions_table import PredictionRow
from crcjax.validation.study.development import load_embeddings, load_training
from crcjax.validation.study.plan import Plan
from crcjax.validation.study.readings import load_readings
from crcjax.validation.study.trial import Scan, Trial


def load_trial(plan: Plan) -> Trial:
    """Reads the tables that a plan names.

    Raises:
      InputError: a table is not usable, names a column that it lacks, or contradicts another.
    """
    data, classes = plan.data, tuple(plan.classes)
    predictions = load_predictions(data.predictions, classes, plan.columns.predictions)
    column = plan.reference.column or predictions.target_name or LABEL
    cohort, by_case = _load_cohort(data.cohort, classes, column, plan.columns.cohort)
    row_of = {(row.case_id if by_case else row.slide_id): row for row in predictions.rows}
    if by_case:
        _check_one_scan_per_case(data.predictions, data.cohort, predictions.rows)
    scans = tuple(Scan(slide, row_of.get(slide.slide_id)) for slide in cohort.rows)
    used = {scan.slide.slide_id for scan in scans if scan.row}
    if not used:
        first = predictions.rows[0].slide_id if predictions.rows else "none"
        raise InputError(
            f"{data.cohort}: has none of the {len(predictions.rows)} slides of {data.predictions} (first: {first}); check "
            "that the slide ids agree"
        )
    _check_agreement(data.predictions, data.cohort, scans)
    columns = frozenset(name for slide in cohort.rows for name in slide.extra)
    _check_columns(plan, data.cohort, columns)
    further = {
        name: load_predictions(path, classes, getattr(plan.columns, name))
        for name in ("comparator", "without_normalisation", "calibration")
        if (path := getattr(data, name)) is not None
    }
    readings = None if data.readers is None else load_readings(data.readers, classes, plan.columns.readers)
    training = None if data.training is None else load_training(data.training, plan.columns.training)
    embeddings = None if data.embeddings is None else load_embeddings(data.embeddings)
    tables = [predictions, *further.values()]
    synthetic = any(row.synthetic for table in tables for row in table.rows)
    return Trial(
        plan,
        scans,
        len(row_of) - len(used),
        **further,
        readings=readings,
        training=training,
        embeddings=embeddings,
        synthetic=synthetic,
        has_probabilities=predictions.has_probabilities,
    )


def _load_cohort(path: Path, classes: Sequence[str], column: str, names: Mapping[str, str]) -> tuple[Cohort, bool]:
    """The cohort, and whether it has one row per case, without slides; a row's case is then its slide."""
    columns = read_table(path, ("slide_id", "case_id", *names.values())).columns
    by_case = "slide_id" not in (*columns, *names) and "case_id" in (*columns, *names)
    if by_case:
        names = {**names, "slide_id": names.get("case_id", "case_id")}
    return load_cohort(path, classes, column, names), by_case


def _check_one_scan_per_case(predictions: Path, cohort: Path, rows: Sequence[PredictionRow]) -> None:
    cases: set[str] = set()
    for row in rows:
        if row.case_id in cases:
            raise InputError(
                f"{cohort}: has no column slide_id, and case {row.case_id} has several scans in {predictions}; add slide_id, "
                "with one row per scan"
            )
        cases.add(row.case_id)


def _check_agreement(predictions: Path, cohort: Path, scans: Sequence[Scan]) -> None:
    """Raises InputError if the two tables ascribe a slide to different cases, or different reference classes.

    Slides that were predicted without a cohort have their own id as the case, which contradicts nothing.
    """
    for scan in scans:
        slide, row = scan.slide, scan.row
        if row is None:
            continue
        if row.case_id not in ("", row.slide_id, slide.case_id):
            raise InputError(
                f"{predictions}: slide {row.slide_id} has the case_id {row.case_id!r}, and {slide.case_id!r} in {cohort}; "
                "correct the wrong table"
            )
        if row.target and slide.label and row.target != slide.label:
            raise InputError(
                f"{predictions}: slide {row.slide_id} has the target {row.target!r}, and {slide.label!r} in {cohort}; "
                "correct the wrong table"
            )


def _check_columns(plan: Plan, cohort: Path, columns: frozenset[str]) -> None:
    """Raises InputError for a column that the plan names and the cohort lacks."""
    known = {*columns, "site", "scanner", "case_id"}
    for place, name in _named_columns(plan):
        if name is not None and name not in known:
            raise InputError(
                f"{cohort}: has no column {name!r}, which the plan names in {place}; its further columns are "
                f"{', '.join(sorted(columns)) or 'none'}"
            )


def _named_columns(plan: Plan) -> list[tuple[str, str | None]]:
    named: list[tuple[str, str | None]] = [("reference.assay", plan.reference.assay)]
    named += [("reference.confidence", plan.reference.confidence)]
    named += [("reference.others", other.column) for other in plan.reference.others]
    named += [("populations", column) for population in plan.populations for column in population.where]
    for outcome in plan.survival:
        columns = (outcome.time, outcome.event, outcome.score, outcome.arm, *outcome.strata, *outcome.adjust)
        named += [(f"survival {outcome.id}", column) for column in columns]
    if plan.scanners:
        named += [("scanners", plan.scanners.glass_slide), ("scanners", plan.scanners.repeat)]
    named += [("leakage", plan.leakage.block), ("leakage", plan.leakage.date)]
    if plan.subgroups:
        named += [("subgroups", column) for column in plan.subgroups.columns]
    return named
