"""Section 2.8: whether the probabilities are what they say."""

from __future__ import annotations

import numpy as np

from crcjax.pages.render import Figure
from crcjax.pages.svg import COLOURS, drawing, to_figure
from crcjax.validation.calibration_error import (
    CalibrationBin,
    CalibrationError,
    classwise_error,
    reliability_bins,
    top_label_error,
)
from crcjax.validation.estimate import Estimate
from crcjax.validation.probability_scores import (
    brier_decomposition,
    brier_score,
    brier_skill,
    log_loss,
    spiegelhalter_test,
)
from crcjax.validation.recalibration import recalibrate_class, temperature
from crcjax.validation.study.section import Section, p_text, value_and_interval
from crcjax.validation.study.trial import Cases, Trial


def calibration(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    label, probs, seed = cases.label, cases.probs, trial.plan.seed
    bins, samples = trial.plan.calibration.bins, trial.plan.resamples
    top = top_label_error(label, probs, seed, bins=bins, samples=samples)
    section.add_sentences(
        f"The expected calibration error (ECE) of a finite sample is above zero even if the model is calibrated: with {len(cases)} "
        f"patients and {bins} bins a calibrated model would have {top.null_mean:.3f} on average, and up to {top.null_high:.3f} "
        f"in 95 % of samples. The observed error is {value_and_interval(top.error)}; the test against calibration has "
        f"p = {p_text(top.test.p_value)}."
    )
    errors = (
        ("ece", "ECE of the predicted class", top),
        (
            "ece_mass",
            "ECE, bins of equal mass",
            top_label_error(label, probs, seed, bins=bins, binning="mass", samples=samples),
        ),
        ("ece_classwise", "ECE, mean over classes", classwise_error(label, probs, seed, bins=bins, samples=samples)),
    )
    for name, title, error in errors:
        _keep_error(section, name, title, error)
    section.estimate("brier", "Brier score (0 to 2)", brier_score(label, probs))
    section.estimate("brier_skill", "Brier skill over the prevalence", brier_skill(label, probs))
    section.estimate("log_loss", "log loss (nats)", log_loss(label, probs))
    section.estimate_table("errors", "Errors and scores")
    for k, name in enumerate(cases.classes):
        parts = brier_decomposition(label == k, probs[:, k], seed, replicates=trial.plan.resamples)
        for part in ("brier", "reliability", "resolution", "uncertainty", "residual"):
            section.estimate(f"{part}.{name}", f"{name}: {part}", getattr(parts, part))
        section.test(
            f"spiegelhalter.{name}", f"{name}: calibrated (Spiegelhalter)", spiegelhalter_test(label == k, probs[:, k])
        )
    footnote = (
        "Brier = reliability - resolution + uncertainty + residual, over bins; reliability of 0 is perfect calibration."
    )
    _recalibrated(trial, cases, section)
    section.test_table("tests", "Tests of calibration")
    rows = {part: f"{part}.{{}}" for part in ("brier", "reliability", "resolution", "uncertainty", "residual")}
    columns = {name: name for name in cases.classes}
    section.estimate_matrix("decomposition", "Brier score of each class, decomposed", "", rows, columns, footnote)
    confidence, correct = probs.max(axis=1), cases.label == probs.argmax(axis=1)
    section.figures.append(
        _reliability_figure(
            "top", "the predicted class", reliability_bins(confidence, correct, seed, bins=10, samples=samples), stamp
        )
    )
    for k, name in enumerate(cases.classes):
        filled = reliability_bins(probs[:, k], label == k, seed, bins=10, samples=samples)
        section.figures.append(_reliability_figure(f"{k + 1}", name, filled, stamp))


def _recalibrated(trial: Trial, cases: Cases, section: Section) -> None:
    """Calibration in the large and slope of every class against the rest, and the temperature that fits best."""
    for k, name in enumerate(cases.classes):
        result = recalibrate_class(cases.label == k, cases.probs[:, k])
        section.estimate(f"in_the_large.{name}", f"{name}: calibration in the large", result.in_the_large[0])
        section.estimate(f"slope.{name}", f"{name}: calibration slope", result.slopes[0])
        section.test(f"recalibration.{name}", f"{name}: intercept 0 and slope 1", result.test)
    rows = {name: f"{{}}.{name}" for name in cases.classes}
    columns = {"calibration in the large (ideal 0)": "in_the_large", "calibration slope (ideal 1)": "slope"}
    footnote = "A slope below 1: the probabilities are too extreme. An intercept above 0: the class is more frequent than stated."
    section.estimate_matrix(
        "recalibration", "Recalibration of each class against the rest", "class", rows, columns, footnote
    )
    label = "temperature that fits these patients best; it is not applied"
    section.estimate(
        "temperature", label, temperature(cases.label, cases.probs, trial.plan.seed, replicates=trial.plan.resamples)
    )
    section.estimate_table("temperature", "Temperature", ["temperature"], "Above 1: the probabilities are too extreme.")


def _keep_error(section: Section, name: str, title: str, error: CalibrationError) -> None:
    section.estimate(name, title, error.error)
    description = Estimate(
        error.null_mean, np.nan, error.null_high, "mean and 95th percentile under calibration", error.error.n
    )
    section.estimate(f"{name}.null", f"{title}, if the model were calibrated", description)
    section.estimate(f"{name}.excess", f"{title}, excess over a calibrated model", error.excess)
    section.test(f"{name}.calibrated", f"{title}: calibrated", error.test)


def _reliability_figure(id: str, of: str, filled: list[CalibrationBin], stamp: str) -> Figure:
    """Observed shares over mean confidence with intervals, and the band of a calibrated model."""
    confidence, observed = np.array([b.confidence for b in filled]), np.array([b.accuracy.value for b in filled])
    low, high = (np.array([getattr(b.accuracy, part) for b in filled]) for part in ("ci_low", "ci_high"))
    with drawing() as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#999999", lw=1, ls="--")
        bands = [np.array([getattr(b, part) for b in filled]) for part in ("consistent_low", "consistent_high")]
        axes.fill_between(
            confidence, bands[0], bands[1], color="#999999", alpha=0.25, lw=0, label="calibrated model, 95 %"
        )
        axes.errorbar(
            *(confidence, observed),
            yerr=np.maximum(0, [observed - low, high - observed]),
            fmt="o",
            ms=5,
            color=COLOURS[0],
            lw=1.3,
        )
        for b in filled:
            axes.text(b.confidence, -0.09, str(b.cases), ha="center", va="center", fontsize=7.5, color="#5b6676")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.14, 1.04), xlabel="probability", ylabel="observed share")
        axes.legend(loc="upper left")
        words = "; ".join(f"{b.confidence:.2f}: {b.accuracy.value:.2f} of {b.cases}" for b in filled)
        caption = "Points with 95 % intervals; the numbers at the bottom count patients in the bins."
        title = f"Reliability of {of}"
        return to_figure(figure, f"reliability_{id}", title, f"{title}. {words}", caption, stamp=stamp)
