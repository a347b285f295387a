"""Validates a system by a pre-specified plan: tables in, results.json, tables, figures and a report out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from crcjax.errors import InputError, writing
from crcjax.pages.pdf import write_pdf
from crcjax.validation.estimate import Estimate, TestResult
from crcjax.validation.predictions_table import table_text
from crcjax.validation.study.flow import flow_figure, flow_of
from crcjax.validation.study.gates import compare_hypotheses, decide_gates
from crcjax.validation.study.load_trial import load_trial
from crcjax.validation.study.plan_lock import plan_state
from crcjax.validation.study.read_plan import PlanFile, read_plan
from crcjax.validation.study.report import SYNTHETIC, report_page
from crcjax.validation.study.results import StudyResults, to_json
from crcjax.validation.study.section import Section
from crcjax.validation.study.sections import NO_PROBABILITIES, OF_PROBABILITIES, SECTIONS
from crcjax.validation.study.trial import Cases, Trial
from crcjax.validation.whole_files import write_whole

# Below this, a class is described only.
_RARE = 10
_PREDICTED_BY = ("bundle_id", "model", "pipeline_id", "calibration")


class EPOCValidator:
    """Validates predictions by an analysis plan.

        validator = EPOCValidator("plan.toml")
        results = validator.run()
        validator.write("REPORT")

    Args:
      plan: the plan's TOML file.
      paths: tables that replace the plan's, by their field of `data`.

    Raises:
      InputError: the plan has mistakes.
    """

    def __init__(self, plan: str | Path, **paths: str | Path | None):
        located = {name: None if path is None else Path(path) for name, path in paths.items()}
        self.plan: PlanFile = read_plan(Path(plan), **located)
        self._results: StudyResults | None = None

    def run(self, on_section: Callable[[str], None] = lambda title: None) -> StudyResults:
        """Computes every section. Raises InputError if a table is not usable; `on_section` hears each section's title."""
        trial = load_trial(self.plan.plan)
        flow, cases = flow_of(trial, trial.primary), trial.cases(trial.primary)
        if not len(cases):
            raise InputError(
                f"{trial.plan.data.cohort}: no patient of the population {trial.primary.id} has a prediction and a reference "
                "outside the model's development; see the flow: "
                + "; ".join(f"{step.label} {step.patients}" for step in flow.steps)
            )
        stamp = SYNTHETIC if trial.synthetic else ""
        sections = []
        for number, name, title, fill in SECTIONS:
            on_section(title)
            section = Section(name, number, title, trial.classes)
            if name in OF_PROBABILITIES and not trial.has_probabilities:
                section.missing = NO_PROBABILITIES
            else:
                fill(trial, cases, section, stamp)
            sections.append(section)
        estimates: dict[str, Estimate] = {id: e for s in sections for id, (_, e) in s.estimates.items()}
        tests: dict[str, TestResult] = {id: t for s in sections for id, (_, t) in s.tests.items()}
        self._flow_figure, self._cases, self._trial = flow_figure(flow, stamp), cases, trial
        self._results = StudyResults(
            self.plan,
            plan_state(self.plan),
            flow,
            tuple(sections),
            tuple(decide_gates(trial.plan, estimates, tests)),
            tuple(compare_hypotheses(trial.plan, estimates)),
            (*messages_of(trial, cases), *(message for section in sections for message in section.messages)),
            trial.synthetic,
            _predicted_by(trial),
        )
        return self._results

    def write(self, out: str | Path, *, pdf: bool = False) -> Path:
        """Writes OUT/results.json, report.html, cases.csv, tables/*.csv and figures/*.svg; returns the report's path.

        Args:
          out: the folder.
          pdf: whether to write report.pdf too, which needs the extra `pdf`.

        Raises:
          InputError: a table is not usable, or the extra is missing.
          OutputError: the folder cannot be written.
        """
        results, out = self._results or self.run(), Path(out)
        page = report_page(results, self._flow_figure, case_rows(self._cases, self._trial))
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        texts = {out / "results.json": json.dumps(to_json(results), indent=1) + "\n", out / "report.html": page}
        texts[out / "cases.csv"] = table_text(case_rows(self._cases, self._trial))
        texts[out / "tables" / "estimates.csv"] = table_text(_estimate_rows(results))
        for section in results.sections:
            for table in section.tables:
                names = [name or "quantity" for name in table.columns]
                rows = [dict(zip(names, (cell.replace("\n", "; ") for cell in row), strict=True)) for row in table.rows]
                texts[out / "tables" / f"{table.id}.csv"] = table_text(rows, names)
        figures = [self._flow_figure, *(figure for section in results.sections for figure in section.figures)]
        texts |= {out / "figures" / f"{figure.id}.svg": figure.svg for figure in figures}
        write_whole(texts)
        if pdf:
            write_pdf(page, out / "report.pdf")
        return out / "report.html"


def messages_of(trial: Trial, cases: Cases) -> list[str]:
    """What a reader must know before the numbers."""
    messages = []
    counts = np.bincount(cases.label, minlength=len(cases.classes))
    for name, count in zip(cases.classes, counts.tolist(), strict=True):
        if count == 0:
            messages.append(
                f"No analysed patient has the reference class {name}: statistics over all classes are not determined."
            )
        elif count < _RARE:
            messages.append(
                f"Only {count} analysed patients have the reference class {name}: its figures are descriptive."
            )
    sites = sorted(set(cases.values("site").tolist()) - {""})
    if len(sites) == 1:
        messages.append(f"All analysed patients are of one site ({sites[0]}): nothing follows for other sites.")
    if trial.not_in_cohort:
        messages.append(f"{trial.not_in_cohort} predicted scans are not in the cohort and are left out.")
    pipelines = {scan.row.pipeline_id for scan in trial.scans if scan.row and scan.row.pipeline_id}
    if len(pipelines) > 1:
        messages.append(f"The predictions are of {len(pipelines)} different pipelines.")
    return messages


def case_rows(cases: Cases, trial: Trial) -> list[dict[str, str]]:
    """One row per analysed patient, misclassified ones first."""
    rows = []
    for place, patient in enumerate(cases.patients):
        label, call = cases.classes[cases.label[place]], cases.classes[cases.call[place]]
        row = {
            "case_id": patient.case_id,
            "reference": label,
            "call": call,
            "is_correct": "yes" if label == call else "no",
        }
        row |= {f"p_{name}": str(p) for name, p in zip(cases.classes, cases.probs[place], strict=True)}
        row |= {"site": patient.value("site"), "scans": str(len(patient.evaluable))}
        row |= {"slides": "|".join(scan.slide.slide_id for scan in patient.evaluable)}
        rows.append(row)
    return sorted(rows, key=lambda row: (row["is_correct"] == "yes", row["case_id"]))


def _predicted_by(trial: Trial) -> dict[str, tuple[str, ...]]:
    rows = [scan.row for scan in trial.scans if scan.row]
    return {name: tuple(sorted({getattr(row, name) for row in rows} - {""})) for name in _PREDICTED_BY}


def _estimate_rows(results: StudyResults) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for section in results.sections:
        for id, (label, estimate) in section.estimates.items():
            values: dict[str, Any] = {"id": id, "label": label}
            values |= {name: getattr(estimate, name) for name in ("value", "ci_low", "ci_high", "level", "method", "n")}
            values |= {"n_clusters": "" if estimate.n_clusters is None else estimate.n_clusters}
            values |= {"n_excluded": estimate.n_excluded, "warnings": "; ".join(estimate.warnings)}
            rows.append({name: str(value) for name, value in values.items()})
    return rows
