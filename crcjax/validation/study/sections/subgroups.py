"""Section 2.11: the system by subgroup of the plan's columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crcjax.errors import InputError
from crcjax.validation.proportions import RARE
from crcjax.validation.ranking import macro_auroc_estimate
from crcjax.validation.study.flow import flow_of
from crcjax.validation.study.forest import Row, forest_figure
from crcjax.validation.study.section import Section, id_part
from crcjax.validation.study.trial import Cases, Patient, Trial
from crcjax.validation.subgroups import Subgroups, holm, subgroup_rates, subgroup_statistic

# A column with more values is no grouping; ages and dates are to be given as bands.
MOST_GROUPS = 20


def subgroups(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section. Raises InputError if a column of the plan is no grouping."""
    plan = trial.plan.subgroups
    if plan is None:
        section.missing = "The plan names no subgroups (subgroups)."
        return
    section.add_sentences(
        f"Each subgroup is compared with all other patients. One with fewer than {RARE} patients is not shown, and missing "
        "entries are not assigned. The p-values of heterogeneity are corrected for their number by Holm's method. "
        "The analyses are exploratory."
    )
    by_column = {column: _of_column(trial, cases, column) for column in plan.columns}
    rows: list[Row] = []
    for column, metrics in by_column.items():
        _keep(column, metrics, section)
        _tables(column, metrics, section)
        groups = metrics["accuracy"].groups
        rows.append((_words(column), None))
        rows += [(name, section.estimates[f"subgroups.{_id('accuracy', column, name)}"][1]) for name in groups]
    parts = {(metric, column): part for column, of_column in by_column.items() for metric, part in of_column.items()}
    tests = holm({_id(metric, column): part.heterogeneity for (metric, column), part in parts.items()})
    for metric, column in parts:
        label = f"{_words(metric)}: no difference by {_words(column)}"
        section.test(_id(metric, column), label, tests[_id(metric, column)])
    section.test_table("heterogeneity", "Heterogeneity")
    gaps = [id.removeprefix("subgroups.") for id in section.estimates if id.startswith("subgroups.accuracy_gap.")]
    section.estimate_table("gaps", "Largest differences of accuracy", gaps)
    caption = "Accuracy of every subgroup with 95 % intervals."
    overall = float((cases.label == cases.call).mean())
    section.figures.append(
        forest_figure(
            "subgroups", "Accuracy by subgroup", rows, "accuracy", caption=caption, reference=overall, stamp=stamp
        )
    )


def _of_column(trial: Trial, cases: Cases, column: str) -> dict[str, Subgroups]:
    """Accuracy, macro AUROC, sensitivity of every class and the share of no-calls, by the groups of a column."""
    group, plan = cases.values(column), trial.plan
    if (count := len(set(group.tolist()))) > MOST_GROUPS:
        raise InputError(
            f"{plan.data.cohort}: column {column}, which the plan names in subgroups, has {count} values; at most "
            f"{MOST_GROUPS} are subgroups: give bands, such as 60-69"
        )
    correct = cases.label == cases.call
    metrics = {"accuracy": subgroup_rates(correct, group, plan.seed, resamples=plan.resamples)}
    if trial.has_probabilities:
        metrics["macro_auroc"] = subgroup_statistic(
            lambda rows: macro_auroc_estimate(cases.label[rows], cases.probs[rows]), group, "logit"
        )
    for place, name in enumerate(cases.classes):
        of_class = cases.label == place
        rates = subgroup_rates(correct[of_class], group[of_class], plan.seed, resamples=plan.resamples)
        metrics[f"sensitivity.{name}"] = rates
    no_calls = flow_of(trial, trial.primary).no_calls
    if no_calls:
        metrics["no_calls"] = _no_calls(trial, cases.patients, no_calls, column)
    return metrics


def _no_calls(trial: Trial, called: Sequence[Patient], no_calls: Sequence[Patient], column: str) -> Subgroups:
    group = np.array([patient.value(column) for patient in (*called, *no_calls)], dtype=str)
    is_no_call = np.arange(len(group)) >= len(called)
    return subgroup_rates(is_no_call, group, trial.plan.seed, resamples=trial.plan.resamples)


def _keep(column: str, metrics: dict[str, Subgroups], section: Section) -> None:
    for metric, result in metrics.items():
        for name, part in result.groups.items():
            label = f"{_words(metric)}, {_words(column)} {name}"
            section.estimate(_id(metric, column, name), label, part.estimate)
            if metric == "accuracy":
                section.estimate(
                    _id("accuracy_difference", column, name), f"{label}, minus the others", part.difference
                )
    accuracy = metrics["accuracy"]
    extremes = f" ({accuracy.highest} minus {accuracy.lowest})" if accuracy.lowest else ""
    section.estimate(_id("accuracy_gap", column), f"by {_words(column)}{extremes}", accuracy.gap)


def _tables(column: str, metrics: dict[str, Subgroups], section: Section) -> None:
    """What all patients give, and the sensitivity for each class."""
    title, rows = _words(column), {name: f"{{}}.{id_part(column)}.{name}" for name in metrics["accuracy"].groups}
    of_classes = [metric for metric in metrics if metric.startswith("sensitivity.")]
    by_class = {_words(metric): _metric_id(metric) for metric in of_classes}
    overall = {_words(metric): metric for metric in metrics if metric not in of_classes}
    overall["accuracy minus the others'"] = "accuracy_difference"
    section.estimate_matrix(f"by_{column}", f"By {title}", title, rows, overall)
    section.estimate_matrix(f"sensitivity_by_{column}", f"Sensitivity by {title}", title, rows, by_class)


def _id(metric: str, column: str, group: str | None = None) -> str:
    """The id of a metric by a column, and of a group: unique, whatever the names of classes and columns hold."""
    return ".".join((_metric_id(metric), id_part(column), *([] if group is None else [group])))


def _metric_id(metric: str) -> str:
    kind, dot, name = metric.partition(".")
    return f"{kind}{dot}{id_part(name)}"


def _words(name: str) -> str:
    return (
        name.replace("_", " ")
        .replace("sensitivity.", "sensitivity for ")
        .replace("macro auroc", "macro AUROC")
        .replace("no calls", "no-calls")
    )
