"""Section 2.5: the system and a comparator on the same patients."""

from __future__ import annotations

import numpy as np

from crcjax.validation.load_predictions import Predictions
from crcjax.validation.paired import mcnemar, non_inferiority, paired_difference
from crcjax.validation.proportions import wilson
from crcjax.validation.ranking import compare_aurocs, macro_auroc_estimate
from crcjax.validation.study.section import Section
from crcjax.validation.study.trial import Cases, Patient, Scan, Trial, combine_scans


def comparison(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    plan = trial.plan.comparison
    if trial.comparator is None or plan is None:
        section.missing = "The plan names no comparator (data.comparator and comparison)."
        return
    other = paired_cases(trial.comparator, trial, cases)
    if not len(other):
        section.missing = f"No analysed patient has a prediction of the {plan.name}."
        return
    own = cases.subset(np.isin(cases.case_ids, other.case_ids))
    left_out = len(cases) - len(own)
    section.add_sentences(
        f"{len(own)} patients have a prediction of both the system and the {plan.name}"
        + (f"; {left_out} have none of the {plan.name} and are left out." if left_out else ".")
    )
    correct = own.label == own.call, own.label == other.call
    section.estimate("accuracy.system", "system: accuracy", wilson(int(correct[0].sum()), len(own)))
    section.estimate("accuracy.comparator", f"{plan.name}: accuracy", wilson(int(correct[1].sum()), len(own)))
    discordant = int((correct[0] & ~correct[1]).sum()), int((correct[1] & ~correct[0]).sum())
    difference = paired_difference(*discordant, len(own))
    section.estimate("accuracy.difference", "difference of accuracies", difference)
    section.test("mcnemar", "accuracies are equal", mcnemar(*discordant))
    for who, of_who in (("system", own), ("comparator", other)):
        label = "system" if who == "system" else plan.name
        section.estimate(f"macro_auroc.{who}", f"{label}: macro AUROC", macro_auroc_estimate(own.label, of_who.probs))
    for k, name in enumerate(cases.classes):
        compared = compare_aurocs(own.label == k, own.probs[:, k], other.probs[:, k])
        section.estimate(f"auroc.{name}.difference", f"difference of AUROCs of {name}", compared.difference)
        section.test(f"auroc.{name}", f"AUROCs of {name} are equal", compared.test)
    section.estimate_table("estimates", f"System and {plan.name}", footnote="Differences are system minus comparator.")
    section.test_table("tests", "Tests of equality", footnote="A large p-value does not show equivalence.")
    if plan.margin is not None:
        shown = non_inferiority(difference, plan.margin)
        section.add_sentences(
            f"Non-inferiority of the accuracy with a margin of {plan.margin:g}: "
            f"{'shown' if shown.is_shown else 'not shown'}; the lower limit of the difference is {difference.ci_low:.3f} and "
            f"must exceed {-plan.margin:g}. {plan.rationale}"
        )


def paired_cases(predictions: Predictions, trial: Trial, cases: Cases) -> Cases:
    """Other predictions of the analysed patients, in the same order; patients without one are left out."""
    row_of = {row.slide_id: row for row in predictions.rows if row.is_ok}
    row_of_case = {row.case_id: row for row in predictions.rows if row.is_ok}
    patients = []
    for patient in cases.patients:
        scans = tuple(
            Scan(scan.slide, row_of[scan.slide.slide_id]) for scan in patient.evaluable if scan.slide.slide_id in row_of
        )
        if not scans and patient.case_id in row_of_case:
            # A comparator such as clinical practice decides by case, not by scan.
            scans = (Scan(patient.scans[0].slide, row_of_case[patient.case_id]),)
        if scans:
            patients.append(Patient(patient.case_id, scans))
    return combine_scans(patients, cases.classes, trial.plan.patients.aggregation)
