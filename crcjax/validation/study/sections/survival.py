"""Section 2.10: outcome by subtype, by the reference and by the system, on the same patients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crcjax.data.csv_table import parse_number
from crcjax.environment import require_extra
from crcjax.errors import InputError
from crcjax.pages.render import Figure
from crcjax.pages.svg import COLOURS, FULL_WIDTH, drawing, to_figure
from crcjax.validation.added_value import added_to_survival
from crcjax.validation.cox import indicators, proportional_hazards_test
from crcjax.validation.estimate import Estimate, undetermined
from crcjax.validation.outcome import prognosis, treatment_by_subtype
from crcjax.validation.study.forest import Row, forest_figure
from crcjax.validation.study.plan import Survival
from crcjax.validation.study.section import Section, value_and_interval
from crcjax.validation.study.trial import Cases, Trial
from crcjax.validation.survival import (
    FollowUp,
    kaplan_meier,
    log_rank,
    median_follow_up,
    median_survival,
    numbers_at_risk,
    restricted_mean,
    survival_at,
)

SOURCES = ("reference", "predicted")
# Enough for the mean optimism of a difference of C.
_OPTIMISM_RESAMPLES = 200


def survival(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    if not trial.plan.survival:
        section.missing = "The plan names no outcome (survival)."
        return
    require_extra("statsmodels.duration.survfunc", "stats", "the outcome section")
    section.add_sentences(
        "The system was not trained on outcome. Subtypes by the system have errors, which move hazard ratios towards 1; the "
        "reference's are shown beside them, on the same patients."
    )
    for outcome in trial.plan.survival:
        _outcome(trial, cases, outcome, section, stamp)


def follow_up_of(cases: Cases, outcome: Survival) -> tuple[Cases, FollowUp]:
    """The patients whose time and event are known, and their follow-up. Raises InputError for other values."""
    time, event = cases.numbers(outcome.time), cases.numbers(outcome.event)
    known = np.isfinite(time) & np.isfinite(event)
    if not np.isin(event[known], (0, 1)).all():
        wrong = event[known][~np.isin(event[known], (0, 1))][0]
        raise InputError(
            f"the cohort's column {outcome.event} must be 1 for an event and 0 for none, got {wrong:g}; recode it"
        )
    return cases.subset(known), FollowUp(time[known], event[known] == 1)


def covariates_of(cases: Cases, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Numbers of every column; a column of texts becomes indicators of its values after the first."""
    covariates: dict[str, np.ndarray] = {}
    for column in columns:
        values = cases.values(column)
        known = sorted(set(values.tolist()) - {""})
        try:
            covariates[column] = np.array([parse_number(value) if value else np.nan for value in values.tolist()])
        except ValueError:
            for name in known[1:]:
                covariates[f"{column} {name}"] = np.where(values == "", np.nan, values == name).astype(float)
    return covariates


def _outcome(trial: Trial, cases: Cases, outcome: Survival, section: Section, stamp: str) -> None:
    cases, follow_up = follow_up_of(cases, outcome)
    observed = section.estimate(
        f"{outcome.id}.follow_up", f"{outcome.title}: median follow-up", median_follow_up(follow_up)
    )
    section.add_sentences(
        f"{outcome.title}: {follow_up.events} events of {len(follow_up)} patients, from {outcome.time_zero}, in {outcome.unit}; "
        f"median follow-up {value_and_interval(observed)}."
    )
    strata, rows = _strata(cases, outcome), dict[str, str]()
    for source, subtype in zip(SOURCES, (cases.label, cases.call), strict=True):
        for k, name in enumerate(cases.classes):
            of_class = follow_up.of(subtype == k)
            for part, estimate in (
                ("median", median_survival(of_class)),
                ("survival", survival_at(of_class, outcome.horizon)),
                ("rmst", _restricted_mean(of_class, outcome.horizon)),
            ):
                section.estimate(
                    f"{outcome.id}.{part}.{source}.{name}", f"{outcome.title}: {part}, {name}, {source}", estimate
                )
            rows[f"{name}, {source}"] = f"{outcome.id}.{{}}.{source}.{name}"
        title = f"same survival, subtypes by {source}"
        section.test(
            f"{outcome.id}.log_rank.{source}", f"{outcome.title}: {title}", log_rank(follow_up, subtype, strata)
        )
        section.figures.append(_curves(follow_up, subtype, cases.classes, outcome, source, stamp))
    at = f"{outcome.horizon:g} {outcome.unit}"
    columns = {"median": "median", f"without event at {at}": "survival", f"restricted mean to {at}": "rmst"}
    section.estimate_matrix(f"{outcome.id}_survival", f"{outcome.title} by subtype", "subtype", rows, columns)
    _hazards(cases, follow_up, strata, outcome, section, stamp)
    if outcome.score:
        _added_value(trial.plan.seed, cases, follow_up, strata, outcome, section)
    if outcome.arm:
        _treatment(cases, follow_up, strata, outcome, section, stamp)
    prefix = f"{section.id}.{outcome.id}."
    tests = {
        id.removeprefix(f"{section.id}."): label.removeprefix(f"{outcome.title}: ")
        for id, (label, _) in section.tests.items()
        if id.startswith(prefix)
    }
    section.test_table(f"{outcome.id}_tests", f"{outcome.title}: tests", tests)


def _strata(cases: Cases, outcome: Survival) -> np.ndarray | None:
    if not outcome.strata:
        return None
    values = np.stack([cases.values(column) for column in outcome.strata], axis=1)
    return np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)


def _restricted_mean(follow_up: FollowUp, horizon: float) -> Estimate:
    try:
        return restricted_mean(follow_up, horizon)
    except InputError as error:
        return undetermined(f"restricted mean to {horizon:g}", len(follow_up), str(error))


def _hazards(
    cases: Cases, follow_up: FollowUp, strata: np.ndarray | None, outcome: Survival, section: Section, stamp: str
) -> None:
    """Cox models by both sources, each adjusted, and the tests of proportional hazards."""
    first = cases.classes.index(outcome.reference_class) if outcome.reference_class else 0
    order = [first, *(k for k in range(len(cases.classes)) if k != first)]
    classes, place = [cases.classes[k] for k in order], np.argsort(order)
    subtype = {source: place[labels] for source, labels in zip(SOURCES, (cases.label, cases.call), strict=True)}
    models = {"hazard ratio": prognosis(follow_up, subtype, classes, None, strata)}
    if outcome.adjust:
        covariates = covariates_of(cases, outcome.adjust)
        models["adjusted hazard ratio"] = prognosis(follow_up, subtype, classes, covariates, strata)
    rows, forest = {f"{name} against {classes[0]}": f"{outcome.id}.{{}}.{name}" for name in classes[1:]}, list[Row]()
    columns = {}
    for kind, model in models.items():
        forest.append((f"{kind}, against {classes[0]}", None))
        for source in SOURCES:
            part = f"{kind.replace(' ', '_')}.{source}"
            columns[f"{kind}, {source}"] = part
            for name in classes[1:]:
                estimate = model.by_source[source].coefficients[f"{name}, {source}"].hazard_ratio
                label = f"{outcome.title}: {kind} of {name} against {classes[0]}, {source}"
                forest.append((f"{name}, {source}", section.estimate(f"{outcome.id}.{part}.{name}", label, estimate)))
    for source, result in models["hazard ratio"].added.items():
        section.test(
            f"{outcome.id}.added.{source}", f"{outcome.title}: {source} subtype adds nothing to the other", result
        )
    adjusted = ", ".join(outcome.adjust)
    footnote = "Cox, ties by Efron's rule." + (f" Adjusted for {adjusted}." if adjusted else "")
    section.estimate_matrix(f"{outcome.id}_hazards", f"{outcome.title}: hazard ratios", "", rows, columns, footnote)
    for source in SOURCES:
        tests = proportional_hazards_test(follow_up, indicators(subtype[source], classes), strata)
        title = f"{outcome.title}: hazards are proportional, {source}"
        section.test(f"{outcome.id}.proportional.{source}", title, tests["all covariates"])
    title = f"{outcome.title}: hazard ratios by subtype"
    section.figures.append(
        forest_figure(
            *(f"hazard_{outcome.id}", title, forest, "hazard ratio"),
            reference=1.0,
            log=True,
            caption=footnote,
            stamp=stamp,
        )
    )


def _added_value(
    seed: int, cases: Cases, follow_up: FollowUp, strata: np.ndarray | None, outcome: Survival, section: Section
) -> None:
    """What the subtype adds to the clinical score: the likelihood ratio test, and Harrell's C with and without it."""
    assert outcome.score is not None
    score = covariates_of(cases, [outcome.score])
    if not score:
        section.add_sentences(
            f"{outcome.title}: all patients have the same {outcome.score}, to which nothing is added."
        )
        return
    labels: dict[str, str] = {}

    def keep(name: str, label: str, estimate: Estimate) -> None:
        section.estimate(f"{outcome.id}.{name}", f"{outcome.title}: {label}", estimate)
        labels[f"{outcome.id}.{name}"] = label

    for source, subtype in zip(SOURCES, (cases.label, cases.call), strict=True):
        subtypes = {f"{source} {name}": of_class for name, of_class in indicators(subtype, cases.classes).items()}
        added = added_to_survival(follow_up, score, subtypes, seed, strata, replicates=_OPTIMISM_RESAMPLES)
        keep("c.score", "Harrell's C, clinical score", added.before)
        keep(f"c.score_and_{source}", f"Harrell's C, clinical score and {source} subtype", added.after)
        keep(f"c_difference.{source}", f"difference by the {source} subtype", added.difference)
        keep(f"c_corrected.{source}", f"difference by the {source} subtype, less its optimism", added.corrected)
        title = f"{outcome.title}: {source} subtype adds nothing to the clinical score"
        section.test(f"{outcome.id}.added_to_score.{source}", title, added.test)
    footnote = (
        "The test of the addition is the likelihood ratio. C of a model on its own patients is optimistic, that of the larger "
        "model more; the difference less its optimism, by a bootstrap, is what to expect in other patients."
    )
    section.estimate_table(f"{outcome.id}_added", f"{outcome.title}: added to the clinical score", labels, footnote)


def _treatment(
    cases: Cases, follow_up: FollowUp, strata: np.ndarray | None, outcome: Survival, section: Section, stamp: str
) -> None:
    """Treatment by subtype; exploratory."""
    assert outcome.arm is not None
    arm = cases.values(outcome.arm)
    arms = sorted(set(arm.tolist()) - {""})
    if len(arms) != 2 or (arm == "").any():
        section.add_sentences(
            f"{outcome.title}: the arm must have two values for all patients, got {', '.join(arms) or 'none'}."
        )
        return
    section.add_sentences(
        f"Treatment by subtype ({arms[1]} against {arms[0]}) is exploratory; no treatment follows from it."
    )
    rows, forest = {}, list[Row]()
    for source, labels in zip(SOURCES, (cases.label, cases.call), strict=True):
        result = treatment_by_subtype(
            follow_up, arm == arms[1], labels, cases.classes, strata=strata, horizon=outcome.horizon
        )
        title = f"{outcome.title}: same treatment effect in all subtypes, {source} (exploratory)"
        section.test(f"{outcome.id}.interaction.{source}", title, result.interaction)
        if result.restricted_mean_interaction:
            test = result.restricted_mean_interaction
            section.test(f"{outcome.id}.rmst_interaction.{source}", f"{title}, restricted means", test)
        forest.append((f"{arms[1]} against {arms[0]}, subtypes by {source}", None))
        for name, estimate in result.hazard_ratio.items():
            label = f"{outcome.title}: hazard ratio of {arms[1]} in {name}, {source} (exploratory)"
            stored = section.estimate(f"{outcome.id}.treatment.{source}.{name}", label, estimate)
            forest.append((f"{name} ({result.events[name]} events)", stored))
            rows[name] = f"{outcome.id}.treatment.{{}}.{name}"
    heading, columns = f"{outcome.title}: treatment by subtype (exploratory)", {source: source for source in SOURCES}
    section.estimate_matrix(f"{outcome.id}_treatment", heading, "hazard ratio", rows, columns)
    title = f"{outcome.title}: treatment by subtype (exploratory)"
    section.figures.append(
        forest_figure(*(f"treatment_{outcome.id}", title, forest, "hazard ratio"), reference=1.0, log=True, stamp=stamp)
    )


def _curves(
    follow_up: FollowUp, subtype: np.ndarray, classes: Sequence[str], outcome: Survival, source: str, stamp: str
) -> Figure:
    """Kaplan-Meier curves with pointwise bands, and the numbers at risk below them."""
    latest = float(follow_up.time.max()) if len(follow_up) else 1.0
    times = _ticks(latest)
    with drawing(FULL_WIDTH / 2, 3.4 + 0.25 * len(classes)) as figure:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 0.45 * len(classes)])
        for k, name in enumerate(classes):
            of_class, colour = follow_up.of(subtype == k), COLOURS[k % len(COLOURS)]
            if len(of_class):
                curve = kaplan_meier(of_class)
                time = np.append(0, curve.time)
                axes.step(time, np.append(1, curve.survival), where="post", color=colour, label=name, lw=1.6)
                low, high = (
                    np.append(1, np.where(np.isfinite(v), v, curve.survival)) for v in (curve.ci_low, curve.ci_high)
                )
                axes.fill_between(time, low, high, step="post", color=colour, alpha=0.13, lw=0)
            for at, count in zip(times, numbers_at_risk(of_class, times), strict=True):
                below.text(at, -k, str(count), ha="center", va="center", fontsize=8.5, color=colour)
        axes.set(ylim=(0, 1.02), ylabel="without event", xlim=(0, latest * 1.04))
        axes.legend(loc="upper right")
        below.set(ylim=(-len(classes) + 0.4, 0.7), xlabel=f"{outcome.unit} from {outcome.time_zero}")
        below.set_yticks([-k for k in range(len(classes))], classes, fontsize=8.5)
        below.set_xticks(times)
        below.tick_params(axis="y", length=0, pad=12)
        for side in ("left", "top"):
            below.spines[side].set_visible(False)
        below.set_title("at risk", fontsize=8.5, loc="left")
        title = f"{outcome.title}, subtypes by {source}"
        words = f"Kaplan-Meier curves, {title}; numbers at risk below"
        caption = "Kaplan-Meier with pointwise 95 % bands (log-log)."
        return to_figure(figure, f"km_{outcome.id}_{source}", title, words, caption, stamp=stamp)


def _ticks(latest: float) -> list[float]:
    """About six round times from 0 to the latest."""
    raw = max(latest, 1e-9) / 5
    scale = 10 ** np.floor(np.log10(raw))
    step = scale * next(factor for factor in (1, 2, 2.5, 5, 10, 12) if factor * scale >= raw)
    if 10 < latest < 200:
        step = next(months for months in (6, 12, 24, 36, 60) if months >= raw)
    return np.arange(0, latest + 1e-9, step).tolist()
