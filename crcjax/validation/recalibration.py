"""Recalibration: how probabilities would have to be changed to be right, with intervals.

A regression of the reference classes on the logits of the probabilities has intercepts of 0 and slopes of 1 if the model is
calibrated (Cox 1958; for several classes Van Hoorde et al. 2014). A slope below 1 means probabilities that are too extreme; an
intercept above 0, a class that is more frequent than predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special, stats

from crcjax.validation.bootstrap import Resamples, Weights, number_patients
from crcjax.validation.calibration import HOTTEST
from crcjax.validation.estimate import Estimate, TestResult, undetermined
from crcjax.validation.influence import Z, clustered_error, count_clusters
from crcjax.validation.probability_scores import CLIP

Clusters = Int[np.ndarray, " unit"] | None
_STEPS, _TOLERANCE = 60, 1e-10
# Coefficients beyond it mean that the probabilities separate the classes.
_LARGEST = 1e3


@dataclass(frozen=True)
class Recalibration:
    """The coefficients of a recalibration, for every class but the first.

    Attributes:
      in_the_large: the intercepts where the slopes are 1: calibration in the large.
      intercepts: the intercepts where the slopes are free.
      slopes: the slopes.
      test: that all intercepts are 0 and all slopes 1.
    """

    in_the_large: list[Estimate]
    intercepts: list[Estimate]
    slopes: list[Estimate]
    test: TestResult


def recalibrate_class(
    event: Bool[np.ndarray, " unit"], prob: Float[np.ndarray, " unit"], cluster: Clusters = None
) -> Recalibration:
    """The recalibration of one class against the rest, which has one intercept and one slope.

    Errors are those of maximum likelihood; with clusters, those of the patients' sums of scores (sandwich), and the test is
    Wald's in place of the likelihood ratio's.

    Args:
      event: whether each unit is of the class.
      prob: the probability of it.
      cluster: the patient of each unit.
    """
    return recalibrate(event.astype(int), np.column_stack([1 - prob, prob]), cluster)


def recalibrate(
    label: Int[np.ndarray, " unit"], probs: Float[np.ndarray, "unit class"], cluster: Clusters = None
) -> Recalibration:
    """The multinomial recalibration of all classes: log P(class k) / P(class 0) is regressed on log p_k / p_0."""
    n, others = len(label), probs.shape[1] - 1
    method = "maximum likelihood" if cluster is None else "maximum likelihood, clustered by patient"
    counts = np.bincount(label, minlength=others + 1)
    clusters = count_clusters(cluster)

    def nothing(reason: str) -> Recalibration:
        lacking = [undetermined(method, n, reason, clusters)] * others
        return Recalibration(lacking, lacking, lacking, TestResult(np.nan, np.nan, method, warnings=(reason,)))

    if (counts == 0).any():
        return nothing(f"class {np.flatnonzero(counts == 0)[0]} has no case")
    if clusters is not None and clusters < 2:
        return nothing("all units are of one patient")
    clipped = np.log(np.maximum(probs, CLIP))
    logits = clipped[:, 1:] - clipped[:, :1]
    warnings = (f"probabilities below {CLIP:g} are clipped",) if (probs < CLIP).any() else ()
    calibrated = np.append(np.zeros(others), np.ones(others))
    large = _fit(label, logits, calibrated, free=np.arange(others))
    full = _fit(label, logits, calibrated, free=np.arange(2 * others))
    if large is None or full is None:
        return nothing("the probabilities separate the classes, or do not vary, which determines no coefficient")

    def estimates(fit: _Fit, rows: range) -> list[Estimate]:
        results = []
        for row in rows:
            value = float(fit.coefficients[row])
            if cluster is None:
                error = float(np.sqrt(fit.covariance[row, row]))
            else:
                error = clustered_error(n * (fit.scores @ fit.covariance[:, row]), cluster)
            limits = (value - Z * error, value + Z * error)
            results.append(Estimate(value, *limits, method, n, warnings=warnings, n_clusters=clusters))
        return results

    slopes = range(others, 2 * others)
    test = _test(full, calibrated, _log_likelihood(label, logits, calibrated), cluster, warnings)
    return Recalibration(estimates(large, range(others)), estimates(full, range(others)), estimates(full, slopes), test)


@dataclass(frozen=True)
class _Fit:
    """Maximum-likelihood coefficients; `covariance` and `scores` are those of the free ones."""

    coefficients: Float[np.ndarray, " coefficient"]
    covariance: Float[np.ndarray, "free free"]
    scores: Float[np.ndarray, "unit free"]
    log_likelihood: float


def _fit(
    label: np.ndarray, logits: Float[np.ndarray, "unit other"], start: np.ndarray, free: np.ndarray
) -> _Fit | None:
    """Newton's method with halved steps; None if the coefficients diverge or the information is singular."""
    coefficients, others = start.copy(), logits.shape[1]
    likelihood = _log_likelihood(label, logits, coefficients)
    event = (label[:, None] == np.arange(1, others + 1)).astype(float)
    for _ in range(_STEPS):
        prob = _predicted(logits, coefficients)[:, 1:]
        residual = event - prob
        scores = np.concatenate([residual, residual * logits], axis=1)[:, free]
        spread = prob[:, :, None] * (np.eye(others) - prob[:, None, :])
        blocks = [
            [spread, spread * logits[:, None, :]],
            [spread * logits[:, :, None], spread * logits[:, :, None] * logits[:, None, :]],
        ]
        information = np.block([[block.sum(axis=0) for block in row] for row in blocks])[np.ix_(free, free)]
        if np.linalg.cond(information) > 1e12 or np.abs(coefficients).max() > _LARGEST:
            return None
        step = np.linalg.solve(information, scores.sum(axis=0))
        if np.abs(step).max() < _TOLERANCE * (1 + np.abs(coefficients).max()):
            return _Fit(coefficients, np.linalg.inv(information), scores, likelihood)
        for _ in range(30):
            proposed = coefficients.copy()
            proposed[free] += step
            new = _log_likelihood(label, logits, proposed)
            if new >= likelihood - 1e-12 * abs(likelihood):
                break
            step = step / 2
        coefficients, likelihood = proposed, new
    return None


def _predicted(logits: np.ndarray, coefficients: np.ndarray) -> Float[np.ndarray, "unit class"]:
    others = logits.shape[1]
    scaled = coefficients[:others] + coefficients[others:] * logits
    return special.softmax(np.column_stack([np.zeros(len(logits)), scaled]), axis=1)


def _log_likelihood(label: np.ndarray, logits: np.ndarray, coefficients: np.ndarray) -> float:
    others = logits.shape[1]
    scaled = np.column_stack([np.zeros(len(logits)), coefficients[:others] + coefficients[others:] * logits])
    return float((scaled[np.arange(len(label)), label] - special.logsumexp(scaled, axis=1)).sum())


def _test(
    fit: _Fit, calibrated: np.ndarray, calibrated_likelihood: float, cluster: Clusters, warnings: tuple[str, ...]
) -> TestResult:
    df = len(calibrated)
    if cluster is None:
        statistic, method = 2 * (fit.log_likelihood - calibrated_likelihood), "likelihood ratio"
    else:
        _, place = np.unique(cluster, return_inverse=True)
        totals = np.stack([np.bincount(place, score) for score in fit.scores.T])
        method = "Wald, clustered by patient"
        if totals.shape[1] <= df:
            return TestResult(np.nan, np.nan, method, df, (*warnings, "too few patients for the test"))
        gap, covariance = fit.coefficients - calibrated, fit.covariance @ (totals @ totals.T) @ fit.covariance
        statistic = float(gap @ np.linalg.solve(covariance, gap))
    return TestResult(max(statistic, 0.0), float(stats.chi2.sf(statistic, df)), method, df, warnings)


def temperature(
    label: Int[np.ndarray, " unit"],
    probs: Float[np.ndarray, "unit class"],
    seed: int,
    cluster: Clusters = None,
    *,
    replicates: int = 2000,
) -> Estimate:
    """The temperature of the log-probabilities with the least negative log-likelihood, with a percentile interval.

    Above 1 the model is overconfident. It changes no ranking of classes. Fit it on other patients than those evaluated;
    `calibration.fit_temperature` gives the value alone.
    """
    n = len(label)
    if n == 0:
        return undetermined("bootstrap", 0, "no cases", count_clusters(cluster))
    resamples = Resamples.sample(number_patients(cluster, label, probs), seed, replicates)
    logits = np.log(np.maximum(probs, CLIP))
    logits = logits - logits[np.arange(n), label][:, None]

    def temperatures(weights: Weights) -> Float[np.ndarray, " replicate"]:
        return 1 / _inverse_temperature(logits, weights[resamples.patient])

    estimate = replace(resamples.estimate(resamples.evaluate(temperatures)), n_clusters=count_clusters(cluster))
    limit = HOTTEST * (1 - 1e-6)
    if not 1 / limit < estimate.value < limit:
        reason = f"the temperature is at the limit of its range, {1 / HOTTEST:g} to {HOTTEST:g}"
        estimate = replace(estimate, warnings=(*estimate.warnings, reason))
    return estimate


def _inverse_temperature(
    logits: Float[np.ndarray, "unit class"], weights: Float[np.ndarray, "unit replicate"]
) -> Float[np.ndarray, " replicate"]:
    """The root of the derivative of the loss, which rises with the inverse temperature, within its range.

    `logits` are relative to that of the reference class, whose derivative is then 0.
    """
    low = np.full(weights.shape[1], 1 / HOTTEST)
    high, inverse = np.full(weights.shape[1], HOTTEST), np.ones(weights.shape[1])
    for _ in range(_STEPS):
        prob = special.softmax(inverse[None, :, None] * logits[:, None, :], axis=2)
        mean = (prob * logits[:, None, :]).sum(axis=2)
        gradient = (weights * mean).sum(axis=0)
        curvature = (weights * ((prob * logits[:, None, :] ** 2).sum(axis=2) - mean**2)).sum(axis=0)
        low, high = np.where(gradient < 0, inverse, low), np.where(gradient >= 0, inverse, high)
        newton = inverse - gradient / np.maximum(curvature, 1e-300)
        # A step out of the bracket is replaced by its middle on the logarithmic scale.
        inside = (newton > low) & (newton < high)
        following = np.where(inside, newton, np.sqrt(low * high))
        if np.abs(following / inverse - 1).max() < 1e-9:
            break
        inverse = following
    return inverse
