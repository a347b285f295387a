"""Section 2.3: agreement with the molecular reference, with other molecular calls, and with readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crcjax.errors import InputError
from crcjax.validation.agreement import cohen_kappa, fleiss_kappa, gwet_ac1, krippendorff_alpha
from crcjax.validation.confusion import confusion_matrix
from crcjax.validation.estimate import Estimate
from crcjax.validation.proportions import wilson
from crcjax.validation.readers import compare_with_readers
from crcjax.validation.study.forest import forest_figure
from crcjax.validation.study.molecular_calls import read_molecular_calls
from crcjax.validation.study.readings import Readings
from crcjax.validation.study.section import Section, value_and_interval
from crcjax.validation.study.trial import Cases, Trial


def agreement(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    reference = trial.plan.reference.name
    section.add_sentences(
        f"The reference ({reference}) is itself a classifier with errors. The figures below measure concordance with it: "
        "percent agreement, and agreement beyond chance (kappa). Kappa falls as one class prevails, although the agreement "
        "stays; Gwet's AC1 hardly does."
    )
    table = confusion_matrix(cases.label, cases.call, len(cases.classes))
    correct = cases.label == cases.call
    section.estimate("overall", "overall percent agreement", wilson(int(correct.sum()), len(cases)))
    section.estimate("kappa", "Cohen's kappa", cohen_kappa(table))
    both = np.stack([cases.label, cases.call], axis=1)
    section.estimate("ac1", "Gwet's AC1", gwet_ac1(both, len(cases.classes)))
    section.estimate_table("reference", f"Agreement with the reference ({reference})")
    _marginals(cases, section)
    for kind in ("assay", "confidence"):
        column = getattr(trial.plan.reference, kind)
        if column:
            _by_column(cases, kind, column, section)
    _other_references(trial, cases, section)
    if trial.readings is None:
        section.add_sentences(
            "The plan names no readings (data.readers), so that agreement with readers is not part of this study."
        )
    else:
        _readers(trial, cases, trial.readings, section, stamp)


def _marginals(cases: Cases, section: Section) -> None:
    """Counts of each class by the reference and by the system: the prevalence and bias that kappa depends on."""
    rows = []
    for k, name in enumerate(cases.classes):
        counts = int((cases.label == k).sum()), int((cases.call == k).sum())
        rows.append(
            (name, *(f"{count} ({count / max(1, len(cases)):.0%})" for count in counts), f"{counts[1] - counts[0]:+d}")
        )
    columns = ("class", "reference", "system", "difference")
    section.table("marginals", "Classes by reference and system", columns, rows, columns[1:])


def _by_column(cases: Cases, kind: str, column: str, section: Section) -> None:
    """Overall and per-class agreement by a column of the reference."""
    values, rows = cases.values(column), {}
    for value in sorted(set(values.tolist())):
        chosen, shown = values == value, value or "not stated"
        correct = (cases.label == cases.call) & chosen
        section.estimate(f"{kind}.{shown}.overall", f"{shown}: overall", wilson(int(correct.sum()), int(chosen.sum())))
        for k, of_class in enumerate(cases.classes):
            among = chosen & (cases.label == k)
            estimate = wilson(int((correct & among).sum()), int(among.sum()))
            section.estimate(f"{kind}.{shown}.{of_class}", f"{shown}: {of_class}", estimate)
        rows[shown] = f"{kind}.{shown}.{{}}"
    columns = {"overall": "overall", **{name: name for name in cases.classes}}
    section.estimate_matrix(kind, f"Agreement by {kind} of the reference", kind, rows, columns)


def _other_references(trial: Trial, cases: Cases, section: Section) -> None:
    """Agreement of system and reference with further molecular calls; that of the references bounds what can be reached."""
    rows = {}
    for other in trial.plan.reference.others:
        calls = _calls_by_file(cases, other.file) if other.file else _indices(cases, str(other.column))
        known = calls >= 0
        for who, own in (("system", cases.call), ("reference", cases.label)):
            agree = int((own[known] == calls[known]).sum())
            label, id = f"{who} and {other.name}", f"{other.name}.{who}"
            section.estimate(f"{id}.overall", f"{label}: overall", wilson(agree, int(known.sum())))
            table = confusion_matrix(own[known], calls[known], len(cases.classes))
            section.estimate(f"{id}.kappa", f"{label}: kappa", cohen_kappa(table))
            rows[label] = f"{id}.{{}}"
        missing = int((~known).sum())
        if missing:
            section.add_sentences(
                f"For {missing} of {len(cases)} patients there is no {other.name}; these are left out of its rows."
            )
    if rows:
        footnote = "The agreement of two molecular calls shows how far any call can agree with either."
        columns = {"same call": "overall", "kappa": "kappa"}
        section.estimate_matrix("others", "Agreement with other molecular calls", "", rows, columns, footnote)


def _calls_by_file(cases: Cases, path: Path) -> np.ndarray:
    calls = read_molecular_calls(path, cases.classes)
    return np.array([cases.classes.index(calls[case]) if case in calls else -1 for case in cases.case_ids], int)


def _indices(cases: Cases, column: str) -> np.ndarray:
    places = {name: place for place, name in enumerate(cases.classes)} | {"": -1}
    calls = []
    for patient in cases.patients:
        value = patient.value(column)
        if value not in places:
            raise InputError(
                f"the cohort's column {column} must hold one of {', '.join(cases.classes)}, got {value!r} for case "
                f"{patient.case_id}; correct it, or leave it empty where there is no call"
            )
        calls.append(places[value])
    return np.array(calls, int)


def _readers(trial: Trial, cases: Cases, readings: Readings, section: Section, stamp: str) -> None:
    """Agreement among readers, of each with themselves, and of the system with them."""
    place_of = {case_id: place for place, case_id in enumerate(cases.case_ids)}
    read = [(row, place_of[case]) for row, case in enumerate(readings.case_ids) if case in place_of]
    rows, places = (np.array(part, int) for part in zip(*read, strict=True)) if read else (np.zeros(0, int),) * 2
    first, classes = readings.calls[rows, :, 0], len(cases.classes)
    seed, resamples = trial.plan.seed, trial.plan.resamples
    section.add_sentences(
        f"{len(readings.readers)} readers read {len(rows)} analysed patients. These classes are defined by gene expression; "
        "readers guess them from morphology. The reader study is exploratory."
    )
    names = ["readers.alpha", "readers.ac1"]
    section.estimate(
        "readers.alpha", "readers: Krippendorff's alpha", krippendorff_alpha(first, classes, seed, replicates=resamples)
    )
    section.estimate("readers.ac1", "readers: Gwet's AC1", gwet_ac1(first, classes))
    if len(first) and (first >= 0).all():
        section.estimate(
            "readers.fleiss", "readers: Fleiss' kappa", fleiss_kappa(first, classes, seed, replicates=resamples)
        )
        names.append("readers.fleiss")
    among = compare_with_readers(cases.call[places], first, classes, seed, resamples)
    for name, label, estimate in (
        ("readers.pairwise", "readers with each other: mean pairwise kappa", among.readers),
        ("readers.system", "system with readers: mean pairwise kappa", among.system),
        ("readers.difference", "system with readers minus readers with each other", among.difference),
    ):
        section.estimate(name, label, estimate)
        names.append(name)
    section.estimate_table("readers", "Reader study", names)
    _each_reader(cases, readings, rows, places, section, stamp)


def _each_reader(
    cases: Cases, readings: Readings, rows: np.ndarray, places: np.ndarray, section: Section, stamp: str
) -> None:
    """Kappa of the system and of every reader with the reference; and of readers with their own repeated readings."""
    classes, label = len(cases.classes), cases.label[places]

    def with_reference(calls: np.ndarray) -> Estimate:
        known = calls >= 0
        return cohen_kappa(confusion_matrix(label[known], calls[known], classes))

    entries = [("system", with_reference(cases.call[places]))]
    entries += [(name, with_reference(readings.calls[rows, r, 0])) for r, name in enumerate(readings.readers)]
    section.figures.append(
        forest_figure(
            *("readers", "Agreement with the reference, system and readers", entries, "Cohen's kappa"),
            caption="On the patients that were read.",
            summaries=("system",),
            stamp=stamp,
        )
    )
    repeated = []
    for r, name in enumerate(readings.readers):
        for repeat in range(1, readings.calls.shape[2]):
            first, again = readings.calls[:, r, 0], readings.calls[:, r, repeat]
            both = (first >= 0) & (again >= 0)
            if both.any():
                share = wilson(int((first[both] == again[both]).sum()), int(both.sum()))
                kappa = cohen_kappa(confusion_matrix(first[both], again[both], classes))
                repeated.append((name, str(int(both.sum())), value_and_interval(share), value_and_interval(kappa)))
    if repeated:
        columns = ("reader", "cases", "same call", "kappa")
        section.table("repeats", "Readers with their own repeated readings", columns, repeated, columns[1:])
