"""Areas under ROC curves with intervals: DeLong's for one score, for two on the same cases, and for several classes.

DeLong, DeLong and Clarke-Pearson 1988; placements by midranks after Sun and Xu 2014; clusters after Obuchowski 1997.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from crcjax.validation.estimate import LEVEL, Estimate, TestResult, undetermined

_Z = float(stats.norm.ppf((1 + LEVEL) / 2))


def placements(
    positive: Bool[np.ndarray, " case"], score: Float[np.ndarray, " case"]
) -> tuple[float, Float[np.ndarray, " case"]]:
    """The AUROC, and for each case the fraction of the other group that it is ranked correctly against; ties count half.

    The AUROC is the mean placement of the positives, and of the negatives.
    """
    count, positives = len(score), int(positive.sum())
    negatives = count - positives
    rank = stats.rankdata(score)
    own_rank = np.empty(count)
    own_rank[positive], own_rank[~positive] = stats.rankdata(score[positive]), stats.rankdata(score[~positive])
    below = rank - own_rank
    placement = np.where(positive, below / negatives, 1 - below / positives)
    return float(placement[positive].mean()), placement


def auroc_estimate(
    positive: Bool[np.ndarray, " case"],
    score: Float[np.ndarray, " case"],
    cluster: Int[np.ndarray, " case"] | None = None,
) -> Estimate:
    """The AUROC with an interval that is symmetric on the logit scale, so that it stays within 0 and 1.

    Args:
      positive: whether each unit belongs to the class.
      score: the score of each unit.
      cluster: the patient of each unit, if patients have several; the variance is then Obuchowski's.
    """
    method = "DeLong, logit interval" if cluster is None else "influence function, clustered by patient, logit interval"
    clusters = None if cluster is None else len(np.unique(cluster))
    if positive.all() or not positive.any():
        return undetermined(method, len(score), "all units are of one class", clusters)
    value, placement = placements(positive, score)
    if cluster is None:
        groups = (placement[positive], placement[~positive])
        if min(map(len, groups)) < 2:
            return undetermined(method, len(score), "a class has a single unit, which determines no interval")
        variance = sum(group.var(ddof=1) / len(group) for group in groups)
    elif clusters == 1:
        return undetermined(method, len(score), "all units are of one patient", clusters)
    else:
        variance = _clustered_variance(_influence(positive, placement, value), cluster)
    return _logit_interval(value, float(variance), method, len(score), clusters)


@dataclass(frozen=True)
class AurocComparison:
    """The difference of two AUROCs on the same cases, and the test that it is zero."""

    difference: Estimate
    test: TestResult


def compare_aurocs(
    positive: Bool[np.ndarray, " case"], first: Float[np.ndarray, " case"], second: Float[np.ndarray, " case"]
) -> AurocComparison:
    """Compares two scores of the same cases: AUROC of `first` minus AUROC of `second`, with DeLong's covariance."""
    method = "DeLong, paired"
    if min(positive.sum(), (~positive).sum()) < 2:
        reason = "a class has fewer than two cases"
        return AurocComparison(
            undetermined(method, len(first), reason), TestResult(np.nan, np.nan, method, warnings=(reason,))
        )
    values, scored = zip(*(placements(positive, score) for score in (first, second)), strict=True)
    difference = scored[0] - scored[1]
    variance = sum(group.var(ddof=1) / len(group) for group in (difference[positive], difference[~positive]))
    value, error = values[0] - values[1], float(np.sqrt(variance))
    if error == 0:
        warning = "the two scores rank every pair alike, so that the interval has no width"
        estimate = Estimate(value, value, value, method, len(first), warnings=(warning,))
        return AurocComparison(estimate, TestResult(0.0, 1.0, method, warnings=(warning,)))
    estimate = Estimate(value, value - _Z * error, value + _Z * error, method, len(first))
    z = value / error
    return AurocComparison(estimate, TestResult(z, float(2 * stats.norm.sf(abs(z))), method))


def macro_auroc_estimate(
    label: Int[np.ndarray, " case"],
    probs: Float[np.ndarray, "case class"],
    cluster: Int[np.ndarray, " case"] | None = None,
) -> Estimate:
    """The mean AUROC of every class against the rest, with the interval of its influence function.

    Args:
      label: the class of each unit.
      probs: its probabilities.
      cluster: the patient of each unit; None if each unit is a patient of its own.
    """
    units = np.arange(len(label)) if cluster is None else cluster
    method = f"influence function{'' if cluster is None else ', clustered by patient'}, logit interval"
    clusters = None if cluster is None else len(np.unique(units))
    values, influences = [], []
    for k in range(probs.shape[1]):
        positive = label == k
        # The placement of a single case has no variance that the data show.
        if min(len(np.unique(units[positive])), len(np.unique(units[~positive]))) < 2:
            return undetermined(
                method, len(label), f"class {k} or its complement has fewer than two patients", clusters
            )
        value, placement = placements(positive, probs[:, k])
        values.append(value)
        influences.append(_influence(positive, placement, value))
    variance = _clustered_variance(np.mean(influences, axis=0), units)
    return _logit_interval(float(np.mean(values)), variance, method, len(label), clusters)


def _influence(positive: np.ndarray, placement: np.ndarray, value: float) -> Float[np.ndarray, " case"]:
    """The influence of each unit on the AUROC."""
    share = positive.mean()
    return (placement - value) / np.where(positive, share, 1 - share)


def _clustered_variance(influence: Float[np.ndarray, " case"], cluster: Int[np.ndarray, " case"]) -> float:
    _, place = np.unique(cluster, return_inverse=True)
    return float((np.bincount(place, influence) ** 2).sum() / len(influence) ** 2)


def _logit_interval(value: float, variance: float, method: str, n: int, clusters: int | None) -> Estimate:
    if not 0 < value < 1 or variance == 0:
        warning = f"the AUROC is {value:g} without variance, which determines no interval"
        return Estimate(value, np.nan, np.nan, method, n, warnings=(warning,), n_clusters=clusters)
    centre, width = np.log(value / (1 - value)), _Z * np.sqrt(variance) / (value * (1 - value))
    low, high = (float(1 / (1 + np.exp(-(centre + sign * width)))) for sign in (-1, 1))
    return Estimate(value, low, high, method, n, n_clusters=clusters)
