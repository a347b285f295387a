"""Section 2.2: how well the probabilities rank the cases."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from crcjax.pages.render import Figure
from crcjax.pages.svg import COLOURS, drawing, to_figure
from crcjax.validation.precision_recall import average_precision
from crcjax.validation.ranking import auroc_estimate, hand_till, macro_auroc_estimate
from crcjax.validation.study.section import Section, value_and_interval
from crcjax.validation.study.trial import Cases, Trial

_GRID = np.linspace(0, 1, 101)
# Enough for bands whose pointwise limits are read by eye.
_BANDS = 500


def ranking(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    section.add_sentences(
        "The AUROC is the probability that a patient of the class has a higher probability of it than one of another class; "
        "0.5 is chance. The macro AUROC is the mean over the classes."
    )
    seed, label, probs = trial.plan.seed, cases.label, cases.probs
    section.estimate("macro_auroc", "macro AUROC", macro_auroc_estimate(label, probs))
    section.estimate(
        "weighted_auroc", "AUROC weighted by prevalence", macro_auroc_estimate(label, probs, weighted=True)
    )
    section.estimate("hand_till", "mean over pairs of classes (Hand and Till)", hand_till(label, probs))
    for k, name in enumerate(cases.classes):
        section.estimate(f"auroc.{name}", f"AUROC of {name}", auroc_estimate(label == k, probs[:, k]))
        precision = average_precision(label == k, probs[:, k], seed, replicates=trial.plan.resamples)
        section.estimate(f"average_precision.{name}", f"average precision of {name}", precision.area)
        section.estimate(f"prevalence.{name}", f"share of {name}: average precision by chance", precision.baseline)
    scans, of_scan = _scans(cases)
    if len(of_scan) > len(cases):
        title = "macro AUROC, every scan, clustered by patient (secondary)"
        section.estimate("macro_auroc_by_scan", title, macro_auroc_estimate(label[of_scan], scans, of_scan))
    overall = [
        name for name in ("macro_auroc", "weighted_auroc", "hand_till", "macro_auroc_by_scan") if section.has(name)
    ]
    section.estimate_table("overall", "All classes", overall)
    rows = {name: f"{{}}.{name}" for name in cases.classes}
    columns = {"AUROC": "auroc", "average precision": "average_precision", "by chance": "prevalence"}
    footnote = "Average precision depends on the prevalence: do not compare it between sites of different prevalence."
    section.estimate_matrix("classes", "Each class against the rest", "class", rows, columns, footnote)
    for k in range(len(cases.classes)):
        section.figures += [_roc_figure(cases, k, section, seed, stamp), _precision_figure(cases, k, section, stamp)]


def roc_points(
    positive: Bool[np.ndarray, " case"],
    score: Float[np.ndarray, " case"],
    weights: Float[np.ndarray, "sample case"] | None = None,
) -> Float[np.ndarray, "2 sample point"]:
    """False-positive rates and sensitivities at every threshold, from the strictest on; ties share a point.

    Args:
      positive: whether each case is of the class.
      score: its score.
      weights: how often each case counts, in one sample or many; by default once.
    """
    weights = np.ones((1, len(score))) if weights is None else weights
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(score[order]) != 0))
    rates = []
    for group in (~positive, positive):
        counts = np.add.reduceat(weights[:, order] * group[order], starts, axis=1).cumsum(axis=1)
        shares = counts / np.maximum(counts[:, -1:], 1)
        rates.append(np.concatenate([np.zeros((len(weights), 1)), shares], axis=1))
    return np.array(rates)


def roc_band(
    positive: Bool[np.ndarray, " case"], score: Float[np.ndarray, " case"], seed: int
) -> Float[np.ndarray, "2 point"]:
    """Pointwise limits of the sensitivity over a grid of false-positive rates, from resampled patients."""
    rng, n = np.random.default_rng([seed, 30]), len(score)
    weights = rng.multinomial(n, np.full(n, 1 / n), _BANDS).astype(float)
    is_usable = (weights[:, positive].sum(axis=1) > 0) & (weights[:, ~positive].sum(axis=1) > 0)
    rates, sensitivities = roc_points(positive, score, weights[is_usable])
    sampled = [np.interp(_GRID, rate, sensitivity) for rate, sensitivity in zip(rates, sensitivities, strict=True)]
    return np.quantile(sampled, [0.025, 0.975], axis=0)


def _scans(cases: Cases) -> tuple[Float[np.ndarray, "scan class"], np.ndarray]:
    """The probabilities of every scan, and the place of its patient."""
    pairs = [(scan.row.probs, i) for i, p in enumerate(cases.patients) for scan in p.evaluable if scan.row]
    return np.array([probs for probs, _ in pairs]), np.array([place for _, place in pairs])


def _roc_figure(cases: Cases, k: int, section: Section, seed: int, stamp: str) -> Figure:
    name, positive, score = cases.classes[k], cases.label == k, cases.probs[:, k]
    estimate = section.estimates[f"ranking.auroc.{name}"][1]
    words = f"AUROC {value_and_interval(estimate)}"
    with drawing() as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#999999", lw=1, ls="--")
        if positive.any() and not positive.all():
            low, high = roc_band(positive, score, seed)
            axes.fill_between(_GRID, low, high, color=COLOURS[k % len(COLOURS)], alpha=0.2, lw=0)
            axes.plot(*roc_points(positive, score)[:, 0], color=COLOURS[k % len(COLOURS)], lw=1.8)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="1 - specificity", ylabel="sensitivity")
        axes.set_title(f"{name}: {words}")
        caption = f"{int(positive.sum())} of {len(positive)} patients are of the class; the band is pointwise, 95 %."
        return to_figure(figure, f"roc_{k + 1}", f"ROC curve of {name}", f"ROC curve, {words}", caption, stamp=stamp)


def _precision_figure(cases: Cases, k: int, section: Section, stamp: str) -> Figure:
    """Precision over recall in steps, without interpolation; the line is what chance would give."""
    name, positive, score = cases.classes[k], cases.label == k, cases.probs[:, k]
    estimate = section.estimates[f"ranking.average_precision.{name}"][1]
    words = f"average precision {value_and_interval(estimate)}"
    with drawing() as figure:
        axes = figure.subplots()
        if positive.any():
            thresholds = np.unique(score)[::-1]
            called = [score >= threshold for threshold in thresholds]
            recall = np.array([(positive & of_call).sum() / positive.sum() for of_call in called])
            precision = np.array([positive[of_call].mean() for of_call in called])
            axes.step(
                np.append(0, recall),
                np.append(precision[0], precision),
                where="pre",
                color=COLOURS[k % len(COLOURS)],
                lw=1.8,
            )
            axes.axhline(positive.mean(), color="#999999", lw=1, ls="--")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.04), xlabel="recall (sensitivity)", ylabel="precision (PPV)")
        axes.set_title(f"{name}: {words}")
        caption = "The dashed line is the class's share of the patients: precision by chance."
        title = f"Precision and recall of {name}"
        return to_figure(figure, f"precision_{k + 1}", title, f"{title}, {words}", caption, stamp=stamp)
