"""Who was analysed, and who was not and why: from the cohort to the cases of the primary analysis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crcjax.pages.render import Figure
from crcjax.pages.svg import FULL_WIDTH, drawing, to_figure
from crcjax.validation.predictions_table import NOT_EVALUABLE
from crcjax.validation.study.plan import Population
from crcjax.validation.study.trial import Patient, Trial

_BOX = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": "#24507a"}
_SIDE_BOX = _BOX | {"edgecolor": "#999999"}


@dataclass(frozen=True)
class FlowStep:
    """One step: what remains, and the patients that it removed by reason."""

    label: str
    patients: int
    scans: int
    removed: dict[str, int]


@dataclass(frozen=True)
class Flow:
    """The steps, and the patients with a slide and a reference that got no prediction: no-calls."""

    steps: tuple[FlowStep, ...]
    no_calls: tuple[Patient, ...]


def flow_of(trial: Trial, population: Population) -> Flow:
    """Follows the patients of the cohort into the analysis of a population."""
    enrolled, included = trial.patients(), trial.patients(population)
    steps = [FlowStep("in the cohort", len(enrolled), sum(len(patient.scans) for patient in enrolled), {})]
    outside = len(enrolled) - len(included)
    title = population.title or population.id
    steps.append(_step(f"in the population: {title}", included, {"not in the population": outside} if outside else {}))
    remaining = included
    for label, reason_of in (
        ("not used in the model's development", _development),
        ("slide available", _without_slide),
        ("accepted by quality control", _refused),
        ("evaluable", _failed),
    ):
        remaining, removed = _divided(remaining, reason_of)
        steps.append(_step(label, remaining, removed))
    analysed, removed = _divided(remaining, _without_reference)
    steps.append(_step("reference available: analysed", analysed, removed))
    no_calls = [
        patient
        for patient in included
        if not (_development(patient) or _without_slide(patient) or _without_reference(patient))
        and not patient.evaluable
    ]
    return Flow(tuple(steps), tuple(no_calls))


def flow_figure(flow: Flow, stamp: str) -> Figure:
    """The flow diagram: remaining patients on the left, removed ones with the reason on the right."""
    steps = flow.steps
    with drawing(FULL_WIDTH, 0.95 * len(steps)) as figure:
        axes = figure.subplots()
        axes.set(xlim=(0, 10), ylim=(-len(steps) + 0.5, 0.5))
        axes.axis("off")
        for place, step in enumerate(steps):
            text = f"{step.label}\n{_count(step.patients, 'patient')}, {_count(step.scans, 'scan')}"
            axes.text(2.6, -place, text, ha="center", va="center", fontsize=10, bbox=_BOX)
            if place:
                arrow = {"arrowstyle": "-|>", "color": "#24507a"}
                axes.annotate("", (2.6, -place + 0.31), (2.6, -place + 0.69), arrowprops=arrow)
            if step.removed:
                reasons = "\n".join(
                    f"{_count(count, 'patient')}: {_short(reason)}" for reason, count in step.removed.items()
                )
                axes.text(5.6, -place + 0.5, reasons, ha="left", va="center", fontsize=9, bbox=_SIDE_BOX)
                axes.annotate(
                    "", (5.45, -place + 0.5), (2.6, -place + 0.5), arrowprops={"arrowstyle": "->", "color": "#999999"}
                )
        words = "; ".join(f"{step.label}: {step.patients} patients" for step in steps)
        caption = "From the cohort to the analysed cases. A patient counts as long as one scan remains."
        return to_figure(figure, "flow", "Flow of patients", words, caption, stamp=stamp)


def _step(label: str, patients: Sequence[Patient], removed: dict[str, int]) -> FlowStep:
    return FlowStep(label, len(patients), sum(len(patient.scans) for patient in patients), removed)


def _divided(
    patients: Sequence[Patient], reason_of: Callable[[Patient], str]
) -> tuple[tuple[Patient, ...], dict[str, int]]:
    """The patients without a reason to be removed, and the others counted by reason, the most frequent first."""
    reasons = [reason_of(patient) for patient in patients]
    remaining = tuple(patient for patient, reason in zip(patients, reasons, strict=True) if not reason)
    return remaining, dict(Counter(filter(None, reasons)).most_common())


def _development(patient: Patient) -> str:
    return "training or validation case of the model" if patient.is_of_development else ""


def _without_slide(patient: Patient) -> str:
    return "" if any(scan.row for scan in patient.scans) else "no slide was given to the model"


def _refused(patient: Patient) -> str:
    rows = [scan.row for scan in patient.scans if scan.row]
    if patient.evaluable or not all(row.status == NOT_EVALUABLE for row in rows):
        return ""
    return f"refused: {rows[0].reason}"


def _failed(patient: Patient) -> str:
    if patient.evaluable:
        return ""
    return next(f"failed: {scan.row.reason}" for scan in patient.scans if scan.row and scan.row.status != NOT_EVALUABLE)


def _without_reference(patient: Patient) -> str:
    return "" if patient.target else "no reference class"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def _short(reason: str, most: int = 64) -> str:
    return reason if len(reason) <= most else f"{reason[: most - 1]}…"
