"""Proper scores of predicted probabilities with intervals: Brier score, log loss, skill, and their decompositions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats
from scipy.optimize import isotonic_regression

from crcjax.validation.bootstrap import Resamples, number_patients
from crcjax.validation.calibration_error import BINS, Binning, bins_of
from crcjax.validation.estimate import Estimate, TestResult, undetermined
from crcjax.validation.influence import clustered_error, count_clusters, wald_estimate

# Probabilities below it count as this, so that one certain error does not make the log loss infinite.
CLIP = 1e-15
Labels = Int[np.ndarray, " unit"]
Probs = Float[np.ndarray, "unit class"]
Clusters = Int[np.ndarray, " unit"] | None


def brier_score(label: Labels, probs: Probs, cluster: Clusters = None) -> Estimate:
    """The mean squared error of the probabilities, summed over classes: 0 to 2, and twice the binary form."""
    if len(label) == 0:
        return undetermined("mean", 0, "no cases")
    scores = ((probs - np.eye(probs.shape[1])[label]) ** 2).sum(axis=1)
    return _mean(scores, "sum over classes", cluster, (0.0, 2.0))


def log_loss(label: Labels, probs: Probs, cluster: Clusters = None) -> Estimate:
    """The mean negative log-probability of the reference class, in nats; a warning counts clipped probabilities."""
    if len(label) == 0:
        return undetermined("mean", 0, "no cases")
    of_label = probs[np.arange(len(label)), label]
    clipped = int((of_label < CLIP).sum())
    estimate = _mean(-np.log(np.maximum(of_label, CLIP)), "natural logarithm", cluster, (0.0, np.inf))
    warnings = (f"{clipped} probabilities below {CLIP:g} are clipped",) if clipped else ()
    return replace(estimate, warnings=estimate.warnings + warnings)


def brier_skill(label: Labels, probs: Probs, cluster: Clusters = None) -> Estimate:
    """1 less the Brier score over that of always predicting the study's prevalence; 0 is no skill, 1 is perfect."""
    n, classes = len(label), probs.shape[1]
    share = np.bincount(label, minlength=classes) / max(n, 1)
    reference = float(1 - (share**2).sum())
    if n == 0 or reference <= 0:
        return undetermined("delta", n, "all cases are of one class", count_clusters(cluster))
    scores = ((probs - np.eye(classes)[label]) ** 2).sum(axis=1)
    ratio = float(scores.mean()) / reference
    # The prevalence is estimated too: the derivative of 1 - sum of squared shares is -2 share.
    reference_influence = -2 * (share[label] - (share**2).sum())
    influence = -((scores - scores.mean()) - ratio * reference_influence) / reference
    return wald_estimate(1 - ratio, influence, "delta", cluster, (-np.inf, 1.0))


@dataclass(frozen=True)
class BrierDecomposition:
    """The Brier score of one class's probability as reliability - resolution + uncertainty (Murphy 1973).

    Attributes:
      brier: the score of the binary event, 0 to 1.
      reliability: the mean squared gap between the probabilities and the frequencies; 0 is calibrated.
      resolution: the variance of the frequencies; more is better.
      uncertainty: the variance of the event, which the model cannot change.
      residual: the score less the sum of the parts: the variation of probabilities within bins; 0 without bins.
    """

    brier: Estimate
    reliability: Estimate
    resolution: Estimate
    uncertainty: Estimate
    residual: Estimate


def brier_decomposition(
    event: Bool[np.ndarray, " unit"],
    prob: Float[np.ndarray, " unit"],
    seed: int,
    cluster: Clusters = None,
    *,
    bins: int | None = BINS,
    binning: Binning = "mass",
    replicates: int = 2000,
) -> BrierDecomposition:
    """Decomposes the Brier score of a binary event.

    Args:
      event: whether each unit is of the class.
      prob: the probability of it.
      seed: the seed of the bootstrap.
      cluster: the patient of each unit.
      bins: the number of bins within which the frequency is constant. None: the frequency is the isotonic regression of the
        events, which needs no bins and leaves no residual (CORP, Dimitriadis, Gneiting and Jordan 2021).
      binning: equal width or equal mass.
      replicates: the number of resamples.
    """
    if len(event) == 0:
        nothing = undetermined("bootstrap", 0, "no cases")
        return BrierDecomposition(nothing, nothing, nothing, nothing, nothing)
    patient = number_patients(cluster, event, prob)
    resamples = Resamples.sample(patient, seed, replicates)
    order = np.argsort(prob, kind="stable")
    place = bins_of(prob, bins, binning)[0] if bins is not None else np.unique(prob, return_inverse=True)[1]
    ordered_place, probs, events = place[order], prob[order], event[order].astype(float)
    starts = np.flatnonzero(np.append(True, np.diff(ordered_place) != 0))
    columns = np.stack([np.ones(len(prob)), events, probs, (probs - events) ** 2])

    def parts(weights: Float[np.ndarray, "patient replicate"]) -> Float[np.ndarray, "5 replicate"]:
        units = weights[patient[order]]
        # Rows are bins in rising order of the probability.
        size, events_in, probs_in, squares = (np.add.reduceat(units * column[:, None], starts) for column in columns)
        n, base = size.sum(axis=0), events_in.sum(axis=0) / size.sum(axis=0)
        filled = np.maximum(size, 1)
        frequency, mean_prob = events_in / filled, probs_in / filled
        if bins is None:
            frequency = np.column_stack([_isotonic(*pair) for pair in zip(frequency.T, size.T, strict=True)])
        brier = squares.sum(axis=0) / n
        uncertainty = base * (1 - base)
        if bins is None:
            recalibrated = (events_in * (1 - frequency) ** 2 + (size - events_in) * frequency**2).sum(axis=0) / n
            reliability, resolution = brier - recalibrated, uncertainty - recalibrated
        else:
            reliability = (size * (mean_prob - frequency) ** 2).sum(axis=0) / n
            resolution = (size * (frequency - base) ** 2).sum(axis=0) / n
        return np.stack([brier, reliability, resolution, uncertainty, brier - reliability + resolution - uncertainty])

    # Squared distances are larger in every resample.
    is_distance = (False, True, True, False, False)
    brier, reliability, resolution, uncertainty, residual = (
        replace(resamples.estimate(values, centred=centred), n_clusters=count_clusters(cluster))
        for values, centred in zip(resamples.evaluate(parts), is_distance, strict=True)
    )
    return BrierDecomposition(
        brier,
        replace(reliability, ci_low=max(0.0, reliability.ci_low)),
        replace(resolution, ci_low=max(0.0, resolution.ci_low)),
        uncertainty,
        residual,
    )


def spiegelhalter_test(
    event: Bool[np.ndarray, " unit"], prob: Float[np.ndarray, " unit"], cluster: Clusters = None
) -> TestResult:
    """Spiegelhalter's test (1986) that the probabilities are calibrated; z is above 0 if they are too extreme.

    With clusters, the variance is that of the patients' sums in place of the one that the probabilities imply.
    """
    method = "Spiegelhalter" if cluster is None else "Spiegelhalter, clustered by patient"
    terms = (event - prob) * (1 - 2 * prob)
    variance = ((1 - 2 * prob) ** 2 * prob * (1 - prob)).sum()
    if cluster is not None:
        variance = (clustered_error(terms, cluster) * len(terms)) ** 2 if len(terms) else 0.0
    return _normal_test(terms.sum(), variance, method)


def multiclass_spiegelhalter_test(label: Labels, probs: Probs) -> TestResult:
    """The same test of the Brier score over all classes: its distance from the score that the probabilities imply."""
    squares = (probs**2).sum(axis=1)
    # A unit's score with label k is 1 + squares - 2 p_k.
    deviation = 2 * (squares - probs[np.arange(len(label)), label])
    variance = 4 * ((probs**3).sum(axis=1) - squares**2).sum()
    return _normal_test(deviation.sum(), variance, "Spiegelhalter, all classes")


def _normal_test(total: float, variance: float, method: str) -> TestResult:
    if not variance > 1e-18:
        return TestResult(np.nan, np.nan, method, warnings=("the probabilities imply no variance",))
    z = float(total / np.sqrt(variance))
    return TestResult(z, float(2 * stats.norm.sf(abs(z))), method)


def _mean(scores: Float[np.ndarray, " unit"], method: str, cluster: Clusters, bounds: tuple[float, float]) -> Estimate:
    return wald_estimate(float(scores.mean()), scores - scores.mean(), f"mean, {method}", cluster, bounds)


def _isotonic(frequency: Float[np.ndarray, " bin"], size: Float[np.ndarray, " bin"]) -> Float[np.ndarray, " bin"]:
    """The rising frequencies that fit best; bins that the resample lacks are 0."""
    fitted, used = np.zeros(len(size)), size > 0
    fitted[used] = isotonic_regression(frequency[used], weights=size[used]).x
    return fitted
