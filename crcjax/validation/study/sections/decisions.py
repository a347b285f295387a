"""Section 2.1: the decisions, against the reference classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crcjax.pages.render import Figure
from crcjax.pages.svg import COLOURS, drawing, to_figure
from crcjax.validation.confusion import confusion_matrix
from crcjax.validation.decisions import (
    accuracy,
    balanced_accuracy,
    class_rates,
    macro_f1,
    matthews_correlation,
    no_information_rate,
)
from crcjax.validation.predictive_values import predictive_value_curve, predictive_values
from crcjax.validation.proportions import wilson
from crcjax.validation.ranking import macro_auroc_estimate
from crcjax.validation.study.flow import flow_of
from crcjax.validation.study.section import Section, value_and_interval
from crcjax.validation.study.trial import Cases, Patient, Trial


def decisions(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    label, call, classes = cases.label, cases.call, len(cases.classes)
    no_calls = flow_of(trial, trial.primary).no_calls
    section.add_sentences(
        "One row is one patient. Read sensitivity and specificity as positive and negative percent agreement: the reference "
        "may be wrong. A patient with a slide and no prediction is a no-call; the accuracy of all comers counts it as wrong."
    )
    section.estimate("accuracy", "accuracy, evaluable patients", accuracy(label, call))
    section.estimate(
        "accuracy_all_comers",
        "accuracy, no-calls counted as wrong",
        wilson(int((label == call).sum()), len(cases) + len(no_calls)),
    )
    section.estimate("no_call_rate", "no-calls", wilson(len(no_calls), len(cases) + len(no_calls)))
    no_information = no_information_rate(label, call)
    section.estimate("no_information_rate", "share of the most frequent class", no_information.rate)
    section.test("no_information", "accuracy exceeds the share of the most frequent class", no_information.test)
    section.estimate("balanced_accuracy", "balanced accuracy", balanced_accuracy(label, call, classes))
    section.estimate("macro_f1", "macro F1", macro_f1(label, call, classes))
    section.estimate("mcc", "Matthews' correlation", matthews_correlation(label, call, classes))
    scans = [
        (scan.row, place) for place, patient in enumerate(cases.patients) for scan in patient.evaluable if scan.row
    ]
    of_scan = np.array([place for _, place in scans])
    if len(scans) > len(cases):
        calls = np.array([cases.classes.index(row.call) for row, _ in scans])
        section.estimate(
            "accuracy_by_scan",
            "accuracy, every scan, clustered by patient (secondary)",
            accuracy(label[of_scan], calls, of_scan),
        )
    section.estimate_table("overall", "All classes")
    section.test_table("tests", "Against the most frequent class")
    _by_class(trial, cases, section)
    section.figures += [_confusion_figure(cases, stamp), _predictive_value_figure(cases, stamp)]
    _no_calls(cases, no_calls, section)
    _other_populations(trial, section)


def _by_class(trial: Trial, cases: Cases, section: Section) -> None:
    """Rates of every class, and predictive values at the plan's prevalence."""
    titles = {
        "sensitivity": "sensitivity",
        "specificity": "specificity",
        "ppv": "PPV at the study's prevalence",
        "npv": "NPV at the study's prevalence",
        "f1": "F1",
        "prevalence": "share of the reference",
    }
    rates = class_rates(cases.label, cases.call, len(cases.classes))
    for name, rate in zip(cases.classes, rates, strict=True):
        for kind, title in titles.items():
            section.estimate(f"{kind}.{name}", f"{name}: {title}", getattr(rate, kind))
    prevalence = trial.plan.prevalence
    if prevalence:
        shares = np.array([prevalence[name] for name in cases.classes])
        titles |= {
            "ppv_at_prevalence": "PPV at the plan's prevalence",
            "npv_at_prevalence": "NPV at the plan's prevalence",
        }
        for name, values in zip(cases.classes, predictive_values(cases.label, cases.call, shares), strict=True):
            for kind, estimate in (("ppv_at_prevalence", values.ppv), ("npv_at_prevalence", values.npv)):
                section.estimate(f"{kind}.{name}", f"{name}: {titles[kind]}", estimate)
    stated = ", ".join(f"{name} {share:g}" for name, share in prevalence.items())
    footnote = (
        f"The plan's prevalence: {stated}."
        if stated
        else "The plan states no prevalence to adjust predictive values to."
    )
    rows = {title: f"{kind}.{{}}" for kind, title in titles.items()}
    section.estimate_matrix("classes", "By class", "", rows, {name: name for name in cases.classes}, footnote)


def _confusion_figure(cases: Cases, stamp: str) -> Figure:
    """Counts with row percents."""
    counts = confusion_matrix(cases.label, cases.call, len(cases.classes))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with drawing() as figure:
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(counts.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
            axes.text(column, row, text, ha="center", va="center", color=colour)
        axes.set_xticks(range(len(cases.classes)), cases.classes, rotation=0 if len(cases.classes) < 5 else 40)
        axes.set_yticks(range(len(cases.classes)), cases.classes)
        axes.set(xlabel="call", ylabel="reference")
        words = "; ".join(
            f"of {counts[k].sum()} {name}: "
            + ", ".join(f"{n} called {c}" for n, c in zip(counts[k], cases.classes, strict=True))
            for k, name in enumerate(cases.classes)
        )
        caption = "Patients by reference (rows) and call (columns), with the percent of the row."
        return to_figure(figure, "confusion", "Confusion matrix", words, caption, stamp=stamp)


def _predictive_value_figure(cases: Cases, stamp: str) -> Figure:
    """The PPV of each class over its prevalence, with the study's own marked."""
    with drawing() as figure:
        axes = figure.subplots()
        for k, name in enumerate(cases.classes):
            curve = predictive_value_curve(cases.label, cases.call, len(cases.classes), k)
            ppv, low, high = (
                np.array([getattr(values.ppv, part) for values in curve.values])
                for part in ("value", "ci_low", "ci_high")
            )
            colour = COLOURS[k % len(COLOURS)]
            axes.plot(curve.prevalence, ppv, color=colour, label=name)
            axes.fill_between(curve.prevalence, low, high, color=colour, alpha=0.15, lw=0)
            own = float((cases.label == k).mean())
            axes.plot(own, np.interp(own, curve.prevalence, ppv), "o", color=colour)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="prevalence of the class", ylabel="positive predictive value")
        axes.legend(loc="lower right")
        caption = "The dot is the study's own prevalence; the band is pointwise, 95 %."
        title = "Predictive value by prevalence"
        return to_figure(figure, "predictive_values", title, f"{title} of each class", caption, stamp=stamp)


def _no_calls(cases: Cases, no_calls: Sequence[Patient], section: Section) -> None:
    """No-calls by reference class, site and scanner."""
    if not no_calls:
        section.add_sentences("Every patient with a slide has a prediction.")
        return
    rows = []
    for title, column in (("reference", ""), ("site", "site"), ("scanner", "scanner")):
        missing = [patient.value(column) if column else patient.target for patient in no_calls]
        called = [p.value(column) for p in cases.patients] if column else [cases.classes[k] for k in cases.label]
        for value in sorted({*missing, *called} - {""}):
            count, total = missing.count(value), missing.count(value) + called.count(value)
            rows.append((title, value, str(count), str(total), value_and_interval(wilson(count, total))))
    columns = ("by", "group", "no-calls", "patients", "rate with 95 % interval")
    section.table("no_calls", "No-calls", columns, rows, columns[2:])


def _other_populations(trial: Trial, section: Section) -> None:
    """The main statistics in every further population of the plan."""
    rows, columns = {}, {"accuracy": "accuracy", "balanced accuracy": "balanced_accuracy", "macro AUROC": "macro_auroc"}
    for population in trial.plan.populations[1:]:
        cases, title = trial.cases(population), population.title or population.id
        estimates = (
            accuracy(cases.label, cases.call),
            balanced_accuracy(cases.label, cases.call, len(cases.classes)),
            macro_auroc_estimate(cases.label, cases.probs),
        )
        for (label, name), estimate in zip(columns.items(), estimates, strict=True):
            section.estimate(f"population.{population.id}.{name}", f"{title}: {label}", estimate)
        rows[title] = f"population.{population.id}.{{}}"
    if rows:
        section.estimate_matrix("populations", "Further populations", "population", rows, columns)
