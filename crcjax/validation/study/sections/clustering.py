"""Section 2.4: what several scans of a patient are worth."""

from __future__ import annotations

from collections import Counter

import numpy as np

from crcjax.validation.decisions import accuracy
from crcjax.validation.proportions import effective_units
from crcjax.validation.ranking import macro_auroc_estimate
from crcjax.validation.study.section import Section, value_and_interval
from crcjax.validation.study.trial import Cases, Trial


def clustering(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    scans = [
        (scan.row, place) for place, patient in enumerate(cases.patients) for scan in patient.evaluable if scan.row
    ]
    of_scan = np.array([place for _, place in scans])
    per_patient = Counter(np.bincount(of_scan, minlength=len(cases)).tolist())
    columns = ("scans", "patients")
    rows = [(str(count), str(patients)) for count, patients in sorted(per_patient.items())]
    section.table("scans", "Analysed scans of a patient", columns, rows, columns)
    if len(scans) == len(cases):
        section.add_sentences("Every analysed patient has one scan, so that scans are independent.")
        return
    label, calls = cases.label[of_scan], np.array([cases.classes.index(row.call) for row, _ in scans])
    probs = np.array([row.probs for row, _ in scans])
    pairs = (
        ("accuracy", accuracy(label, calls), accuracy(label, calls, of_scan)),
        ("macro AUROC", macro_auroc_estimate(label, probs), macro_auroc_estimate(label, probs, of_scan)),
    )
    table = []
    for name, naive, clustered in pairs:
        widths = [estimate.ci_high - estimate.ci_low for estimate in (naive, clustered)]
        table.append(
            (name, value_and_interval(naive), value_and_interval(clustered), f"{(widths[1] / widths[0]) ** 2:.2f}")
        )
    effective = effective_units(label == calls, of_scan)
    section.add_sentences(
        f"{len(scans)} scans of {len(cases)} patients are worth {effective:.0f} independent ones for the accuracy: a design "
        f"effect of {len(scans) / effective:.2f}. Intervals that take scans as independent are too narrow; primary statistics "
        f"combine the scans of each patient ({trial.plan.patients.aggregation.replace('_', ' ')})."
    )
    names = ("", "as if independent", "clustered by patient", "ratio of variances")
    section.table("naive", "Every scan counted", names, table, names[1:])
