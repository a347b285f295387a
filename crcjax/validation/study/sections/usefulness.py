"""Section 2.10: the net benefit of the decisions that the plan names."""

from __future__ import annotations

import numpy as np

from crcjax.pages.render import Figure
from crcjax.pages.svg import COLOURS, drawing, to_figure
from crcjax.validation.decision_curve import DecisionCurve, decision_curve
from crcjax.validation.study.plan import Decision
from crcjax.validation.study.section import Section
from crcjax.validation.study.trial import Cases, Trial

_THRESHOLDS = 11


def usefulness(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    if not trial.plan.decisions:
        section.missing = "The plan names no clinical decision (decisions): without one, a net benefit means nothing."
        return
    section.add_sentences(
        "The net benefit is in true positives per patient: true positives minus false positives, weighted by the odds of the "
        "threshold. A system is useful where its curve is above those of acting on everybody and on nobody."
    )
    for decision in trial.plan.decisions:
        place, (low, high) = cases.classes.index(decision.target), decision.thresholds
        threshold = np.linspace(low, high, _THRESHOLDS)
        curve = decision_curve(
            cases.label == place, cases.probs[:, place], threshold, trial.plan.seed, replicates=trial.plan.resamples
        )
        section.add_sentences(
            f"{decision.target}: {decision.decision}, at probabilities from {low:g} to {high:g}. {decision.rationale}"
        )
        _keep(decision, curve, section)
        section.figures.append(_figure(decision, curve, stamp))


def _keep(decision: Decision, curve: DecisionCurve, section: Section) -> None:
    columns = {
        "system": "net_benefit",
        "acting on everybody": "treat_all",
        "system minus the better of all and none": "advantage",
    }
    rows = {}
    for place, threshold in enumerate(curve.threshold.tolist()):
        for label, part in columns.items():
            id = f"{part}.{decision.target}.{threshold:.3g}"
            title = f"net benefit for {decision.target} at {threshold:.3g}: {label}"
            section.estimate(id, title, getattr(curve, part)[place])
        rows[f"{threshold:.3g}"] = f"{{}}.{decision.target}.{threshold:.3g}"
    section.estimate_matrix(
        f"decision_{decision.target}", f"{decision.target}: {decision.decision}", "threshold", rows, columns
    )


def _figure(decision: Decision, curve: DecisionCurve, stamp: str) -> Figure:
    with drawing() as figure:
        axes = figure.subplots()
        for estimates, label, colour in (
            (curve.net_benefit, "system", COLOURS[0]),
            (curve.treat_all, "everybody", COLOURS[1]),
        ):
            value, low, high = (
                np.array([getattr(e, part) for e in estimates]) for part in ("value", "ci_low", "ci_high")
            )
            axes.plot(curve.threshold, value, color=colour, label=label)
            if label == "system":
                axes.fill_between(curve.threshold, low, high, color=colour, alpha=0.15, lw=0)
        axes.axhline(0, color="#777777", lw=1, label="nobody")
        lowest = min(estimate.value for estimate in (*curve.net_benefit, *curve.treat_all))
        highest = max(estimate.ci_high for estimate in curve.net_benefit)
        # Acting on everybody soon falls so low that it would flatten the other curves.
        axes.set_ylim(max(lowest, -0.3) - 0.02, highest + 0.1)
        axes.set(xlabel=f"threshold probability of {decision.target}", ylabel="net benefit")
        axes.legend()
        title = f"Decision curve, {decision.target}"
        words = f"{title}: net benefit over the threshold, of the system, of acting on everybody and on nobody"
        caption = f"{decision.decision[0].upper()}{decision.decision[1:]}. The band is pointwise, 95 %."
        return to_figure(figure, f"decision_{decision.target}", title, words, caption, stamp=stamp)
