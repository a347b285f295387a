"""Section 2.12: the precision that was planned and reached, and what an imperfect reference allows."""

from __future__ import annotations

from crcjax.validation.decisions import accuracy
from crcjax.validation.estimate import Estimate
from crcjax.validation.noise_ceiling import accuracy_for_truth
from crcjax.validation.power import SampleSize, size_for_auroc_width, size_for_width
from crcjax.validation.proportions import wilson
from crcjax.validation.ranking import auroc_estimate
from crcjax.validation.study.plan import Precision
from crcjax.validation.study.section import Section, value_and_interval
from crcjax.validation.study.trial import Cases, Trial


def planning(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    reliability = trial.plan.reference.reliability
    aims = [aim for aim in trial.plan.precision if aim.estimate != "auroc" or trial.has_probabilities]
    if not aims and reliability is None:
        section.missing = "The plan states neither a precision (precision) nor the reference's reliability."
        return
    if aims:
        _precision(cases, aims, section)
    if reliability is not None:
        observed = accuracy(cases.label, cases.call)
        implied = accuracy_for_truth(observed, reliability, len(cases.classes))
        section.estimate("accuracy_for_truth", "accuracy for the true class (sensitivity analysis)", implied)
        section.add_sentences(
            f"The plan states that the reference names the true class in {reliability:g} of patients. A perfect system would "
            f"then agree with it in {reliability:g}; the observed agreement is {value_and_interval(observed)}. If the "
            "errors of both are independent and fall on each other class equally often, the accuracy for the true class is "
            f"{value_and_interval(implied)}."
        )
        section.estimate_table("noise_ceiling", "What an imperfect reference hides", ["accuracy_for_truth"])


def _precision(cases: Cases, aims: list[Precision], section: Section) -> None:
    rows = []
    for aim in aims:
        name = aim.estimate if aim.target is None else f"{aim.estimate} {aim.target}"
        size, observed = _needed(aim, cases), _observed(aim, cases)
        reached = (observed.ci_high - observed.ci_low) / 2
        verdict = "not determined" if reached != reached else "reached" if reached <= aim.half_width else "not reached"
        section.estimate(f"precision.{name.replace(' ', '.')}", name, observed)
        rows.append(
            (
                name,
                f"{aim.expected:g} ± {aim.half_width:g}",
                f"{size.n:,} {'of the class' if aim.estimate == 'sensitivity' else 'patients'}",
                f"{observed.n:,}",
                value_and_interval(observed),
                f"{reached:.3f}",
                verdict,
            )
        )
    columns = ("", "planned", "needed", "analysed", "observed", "half-width", "precision")
    footnote = "The number needed follows from the planned value; the half-width reached depends on the observed one."
    section.table("precision", "Precision", columns, rows, ("analysed", "observed", "half-width"), footnote)


def _needed(aim: Precision, cases: Cases) -> SampleSize:
    if aim.estimate == "auroc":
        share = float((cases.label == _place(aim, cases)).mean())
        return size_for_auroc_width(aim.expected, min(max(share, 0.01), 0.99), aim.half_width)
    return size_for_width(aim.expected, aim.half_width)


def _observed(aim: Precision, cases: Cases) -> Estimate:
    if aim.estimate == "accuracy":
        return accuracy(cases.label, cases.call)
    of_class = cases.label == _place(aim, cases)
    if aim.estimate == "auroc":
        return auroc_estimate(of_class, cases.probs[:, _place(aim, cases)])
    return wilson(int((of_class & (cases.call == cases.label)).sum()), int(of_class.sum()))


def _place(aim: Precision, cases: Cases) -> int:
    assert aim.target is not None
    return cases.classes.index(aim.target)
