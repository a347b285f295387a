"""Section 2.9: whether uncertainty finds the errors, and whether sets of classes contain the reference."""

from __future__ import annotations

import numpy as np

from crcjax.pages.render import Figure
from crcjax.pages.svg import COLOURS, drawing, to_figure
from crcjax.validation.conformal import conformal_performance, coverage_range, fit_conformal, require_separate
from crcjax.validation.proportions import proportion
from crcjax.validation.risk_coverage import rates_by_group, risk_coverage_curve, selective_accuracies, selective_risk
from crcjax.validation.study.section import Section, value_and_interval
from crcjax.validation.study.trial import Cases, Patient, Scan, Trial, combine_scans

_MEASURES = ("entropy", "expected_entropy", "mutual_information", "vacuity")


def uncertainty(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    plan, wrong = trial.plan.uncertainty, cases.label != cases.call
    measures = {
        name: values for name in _MEASURES if np.isfinite(values := cases.measure(name)).all() and np.ptp(values) > 0
    }
    if plan.measure not in measures:
        section.add_sentences(
            f"The predictions state no {plan.measure.replace('_', ' ')}; the plan sets cases aside by it."
        )
    parts = {
        "area under risk and coverage (AURC)": "area",
        "above a perfect order (E-AURC)": "excess",
        "generalised (AUGRC)": "generalised",
        "AUROC for errors": "failure_auroc",
    }
    for name, values in measures.items():
        risk = selective_risk(values, wrong, trial.plan.seed, replicates=trial.plan.resamples)
        for label, part in parts.items():
            section.estimate(f"{part}.{name}", f"{name.replace('_', ' ')}: {label}", getattr(risk, part))
    if measures:
        rows = {name.replace("_", " "): f"{{}}.{name}" for name in measures}
        section.estimate_matrix("measures", "Measures of uncertainty", "", rows, parts, "Smaller areas are better.")
        section.figures.append(_risk_coverage_figure(measures, wrong, stamp))
    if plan.measure in measures:
        _selective(trial, cases, measures[plan.measure], wrong, section)
    _stated_sets(cases, section)
    _conformal(trial, cases, section)


def _selective(trial: Trial, cases: Cases, values: np.ndarray, wrong: np.ndarray, section: Section) -> None:
    """The accuracy of the patients that are kept, and who is deferred."""
    plan, names = trial.plan.uncertainty, []
    accuracies = selective_accuracies(
        values, wrong, trial.plan.seed, coverages=plan.coverages, replicates=trial.plan.resamples
    )
    for coverage, estimate in zip(plan.coverages, accuracies, strict=True):
        section.estimate(
            f"accuracy_at.{coverage:g}", f"accuracy of the {coverage:.0%} least uncertain patients", estimate
        )
        names.append(f"accuracy_at.{coverage:g}")
    section.estimate_table(
        "selective", f"Accuracy if uncertain patients are set aside, by {plan.measure.replace('_', ' ')}", names
    )
    coverage = min(plan.coverages)
    deferred = values > np.quantile(values, coverage, method="inverted_cdf")
    rows = []
    groups = {"reference": [cases.classes[k] for k in cases.label]}
    groups |= {column: cases.values(column).tolist() for column in ("site", "scanner")}
    for by, group in groups.items():
        for name, estimate in rates_by_group(deferred, group).items():
            rows.append((by, str(name) or "not stated", str(estimate.n), value_and_interval(estimate)))
    columns = ("by", "group", "patients", "deferred, with 95 % interval")
    title = f"Who is deferred at a coverage of {coverage:.0%}"
    section.table("deferred", title, columns, rows, columns[2:], "Deferral can hide an unfairness: compare the groups.")


def _stated_sets(cases: Cases, section: Section) -> None:
    """Sets that the table of predictions states, of patients with one scan each."""
    sets = [patient.evaluable[0].row.conformal_set for patient in cases.patients if patient.evaluable[0].row]
    if any(names is None for names in sets):
        return
    inside = np.array([[name in (names or ()) for name in cases.classes] for names in sets])
    covered = inside[np.arange(len(cases)), cases.label]
    section.estimate("stated_coverage", "sets of the table: coverage of the first scan's set", proportion(covered))
    section.estimate_table("stated", "Sets that the predictions state", ["stated_coverage"])


def _conformal(trial: Trial, cases: Cases, section: Section) -> None:
    """Sets by thresholds that were fitted on the calibration cases: for all, by class, and by site."""
    if trial.calibration is None:
        section.add_sentences(
            "The plan names no calibration cases (data.calibration), so that no sets of classes are fitted."
        )
        return
    fitted_on = calibration_cases(trial)
    require_separate(fitted_on.case_ids, cases.case_ids)
    error, rows = trial.plan.uncertainty.error, dict[str, str]()
    low, high = coverage_range(len(fitted_on), error)
    section.add_sentences(
        f"Sets of classes are fitted on {len(fitted_on)} calibration patients so that they miss the reference in at most "
        f"{error:.0%} of exchangeable patients. Over calibration sets of this size the coverage varies from {low:.3f} to "
        f"{high:.3f}. At a new site nothing is guaranteed."
    )
    rng = np.random.default_rng([trial.plan.seed, 32])
    uniforms, own = rng.random(len(fitted_on)), rng.random(len(cases))
    site, of_site = fitted_on.values("site").tolist(), cases.values("site").tolist()
    kinds = {"all": {}, "by_class": {"by_class": True}, "by_site": {"group": site}}
    for kind, options in kinds.items():
        rule = fit_conformal(fitted_on.label, fitted_on.probs, error, uniforms, method="aps", **options)  # type: ignore[arg-type]
        sets = rule.sets(cases.probs, own, of_site if kind == "by_site" else None)
        result = conformal_performance(sets, cases.label, group=of_site)
        title = {"all": "one threshold", "by_class": "threshold by class", "by_site": "threshold by site"}[kind]
        parts = [("coverage", "coverage", result.coverage), ("size", "mean size", result.mean_size)]
        parts += [("single", "sets of one class", result.single), ("empty", "empty sets", result.empty)]
        parts += [(f"coverage.{n}", f"coverage of {n}", e) for n, e in zip(cases.classes, result.by_class, strict=True)]
        parts += [(f"coverage.site.{n}", f"coverage at {n}", e) for n, e in result.by_group.items() if n]
        parts += [(f"coverage.size.{n}", f"coverage of sets of {n}", e) for n, e in result.by_size.items()]
        for name, label, estimate in parts:
            section.estimate(f"sets.{kind}.{name}", f"{title}: {label}", estimate)
            rows[label] = f"sets.{{}}.{name}"
        for warning in rule.warnings:
            section.add_sentences(f"{title}: {section.named(warning)}.".capitalize())
    columns = {"one threshold": "all", "threshold by class": "by_class", "threshold by site": "by_site"}
    section.estimate_matrix("sets", "Conformal sets (APS)", "", rows, columns)


def calibration_cases(trial: Trial) -> Cases:
    """The calibration patients with a target, combined as the study's are."""
    assert trial.calibration is not None
    from crcjax.data.cohort import SlideRow

    scans: dict[str, list[Scan]] = {}
    for row in trial.calibration.evaluable:
        if row.target:
            slide = SlideRow(row.slide_id, row.case_id, label=row.target, site=row.site or None)
            scans.setdefault(row.case_id, []).append(Scan(slide, row))
    patients = [Patient(case_id, tuple(of_case)) for case_id, of_case in scans.items()]
    return combine_scans(patients, trial.classes, trial.plan.patients.aggregation)


def _risk_coverage_figure(measures: dict[str, np.ndarray], wrong: np.ndarray, stamp: str) -> Figure:
    with drawing() as figure:
        axes = figure.subplots()
        for place, (name, values) in enumerate(measures.items()):
            curve = risk_coverage_curve(values, wrong)
            axes.plot(
                curve.coverage, curve.risk, color=COLOURS[place], label=name.replace("_", " "), drawstyle="steps-post"
            )
        coverage = np.arange(1, len(wrong) + 1) / len(wrong)
        perfect = np.maximum(0, np.arange(1, len(wrong) + 1) - (~wrong).sum()) / np.arange(1, len(wrong) + 1)
        axes.plot(coverage, perfect, color="#999999", ls="--", lw=1, label="perfect order")
        axes.axhline(wrong.mean(), color="#999999", ls=":", lw=1)
        axes.set(xlim=(0, 1.01), ylim=(0, None), xlabel="coverage: patients kept", ylabel="risk: misclassified of them")
        axes.legend(loc="upper left")
        caption = "The most uncertain patients are set aside first. The dotted line is the risk of all."
        title = "Risk and coverage"
        return to_figure(figure, "risk_coverage", title, f"{title} by {', '.join(measures)}", caption, stamp=stamp)
