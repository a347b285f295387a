"""Areas under ROC curves with intervals: DeLong's for one score, for two on the same units, and for several classes.

DeLong, DeLong and Clarke-Pearson 1988; placements by midranks after Sun and Xu 2014; clusters after Obuchowski 1997.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special, stats

from crcjax.validation.estimate import Estimate, TestResult, undetermined
from crcjax.validation.influence import Z, clustered_error, count_clusters

Labels = Int[np.ndarray, " unit"]
Positive = Bool[np.ndarray, " unit"]
Score = Float[np.ndarray, " unit"]
Clusters = Int[np.ndarray, " unit"] | None
# Patients of a class, and of its complement, that an interval needs.
_FEWEST = 2


def auroc(positive: Positive, score: Score) -> float:
    """The probability that a positive scores above a negative; ties count half. NaN if either is absent."""
    return placements(positive, score)[0] if positive.any() and not positive.all() else float("nan")


def placements(positive: Positive, score: Score) -> tuple[float, Float[np.ndarray, " unit"]]:
    """The AUROC, and for each unit the fraction of the other group that it is ranked correctly against; ties count half.

    The AUROC is the mean placement of the positives, and of the negatives. Both groups must have a unit.
    """
    count, positives = len(score), int(positive.sum())
    negatives = count - positives
    rank = stats.rankdata(score)
    own_rank = np.empty(count)
    own_rank[positive], own_rank[~positive] = stats.rankdata(score[positive]), stats.rankdata(score[~positive])
    below = rank - own_rank
    placement = np.where(positive, below / negatives, 1 - below / positives)
    return float(placement[positive].mean()), placement


def auroc_estimate(positive: Positive, score: Score, cluster: Clusters = None) -> Estimate:
    """The AUROC with an interval that is symmetric on the logit scale, so that it stays within 0 and 1.

    An AUROC of 0 or 1 has no variance; its interval is Newcombe's (2006, method 5), which inverts a score. Units whose score is
    not a number are excluded and counted.

    Args:
      positive: whether each unit belongs to the class.
      score: the score of each unit.
      cluster: the patient of each unit, if patients have several; the variance is then Obuchowski's.
    """
    method = "DeLong" if cluster is None else "influence function, clustered by patient"
    positive, score, cluster, excluded = _with_scores(positive, score, cluster)
    fewest = min(_patients(positive, cluster), _patients(~positive, cluster))
    if fewest < _FEWEST or (cluster is not None and len(np.unique(cluster)) < _FEWEST):
        reason = "the class or its complement has fewer than two patients"
        return undetermined(method, len(score), reason, count_clusters(cluster))
    value, placement = placements(positive, score)
    if cluster is None:
        variance = sum(group.var(ddof=1) / len(group) for group in (placement[positive], placement[~positive]))
        error = float(np.sqrt(variance))
    else:
        error = clustered_error(_influence(positive, placement, value), cluster)
    return _bounded(value, error, method, len(score), cluster, excluded, _newcombe(value, positive, cluster))


@dataclass(frozen=True)
class AurocComparison:
    """The difference of two AUROCs on the same units, and the test that it is zero."""

    difference: Estimate
    test: TestResult


def compare_aurocs(positive: Positive, first: Score, second: Score, cluster: Clusters = None) -> AurocComparison:
    """Compares two scores of the same units: AUROC of `first` minus AUROC of `second`.

    The covariance is DeLong's; with clusters, that of the influence functions. Judge non-inferiority of `difference` by
    `paired.non_inferiority`.
    """
    method = "DeLong, paired" if cluster is None else "influence function, paired, clustered by patient"
    known = np.isfinite(first) & np.isfinite(second)
    excluded = int((~known).sum())
    positive, first, second = positive[known], first[known], second[known]
    cluster = None if cluster is None else cluster[known]
    if min(_patients(positive, cluster), _patients(~positive, cluster)) < _FEWEST:
        reason = "the class or its complement has fewer than two patients"
        return AurocComparison(
            undetermined(method, len(first), reason, count_clusters(cluster)),
            TestResult(np.nan, np.nan, method, warnings=(reason,)),
        )
    values, scored = zip(*(placements(positive, score) for score in (first, second)), strict=True)
    difference, value = scored[0] - scored[1], values[0] - values[1]
    if cluster is None:
        variance = sum(group.var(ddof=1) / len(group) for group in (difference[positive], difference[~positive]))
        error = float(np.sqrt(variance))
    else:
        error = clustered_error(_influence(positive, difference, value), cluster)
    n, clusters = len(first), count_clusters(cluster)
    if error <= 1e-12:
        warning = "the two scores rank every pair alike, which determines no interval"
        if value != 0:
            warning = "the difference shows no variance, which determines no interval"
        estimate = Estimate(value, np.nan, np.nan, method, n, warnings=(warning,), n_clusters=clusters)
        p_value = 1.0 if value == 0 else np.nan
        return AurocComparison(estimate, TestResult(0.0, p_value, method, warnings=(warning,)))
    low, high = value - Z * error, value + Z * error
    estimate = Estimate(value, low, high, method, n, n_clusters=clusters, n_excluded=excluded)
    z = value / error
    return AurocComparison(estimate, TestResult(z, float(2 * stats.norm.sf(abs(z))), method))


def macro_auroc_estimate(
    label: Labels,
    probs: Float[np.ndarray, "unit class"],
    cluster: Clusters = None,
    *,
    weighted: bool = False,
) -> Estimate:
    """The mean AUROC of every class against the rest, with the interval of its influence function.

    Args:
      label: the class of each unit.
      probs: its probabilities.
      cluster: the patient of each unit; None if each unit is a patient of its own.
      weighted: weighs the classes by their prevalence, which the interval takes as known.
    """
    classes = probs.shape[1]
    evaluable = label[np.isfinite(probs).all(axis=1)]
    share = np.bincount(evaluable, minlength=classes) / max(len(evaluable), 1)
    weight = share if weighted else np.full(classes, 1 / classes)
    pairs = [(k, np.ones(len(label), bool), label == k) for k in range(classes)]
    return _mean_area(pairs, weight, label, probs, cluster, "influence function")


def hand_till(label: Labels, probs: Float[np.ndarray, "unit class"], cluster: Clusters = None) -> Estimate:
    """The M of Hand and Till (2001): the mean AUROC over all ordered pairs of classes, with its influence function.

    Unlike the mean over classes against the rest, it does not depend on their prevalence.
    """
    classes = probs.shape[1]
    pairs = [
        (k, (label == k) | (label == other), label == k)
        for k in range(classes)
        for other in range(classes)
        if other != k
    ]
    weight = np.full(len(pairs), 1 / len(pairs))
    return _mean_area(pairs, weight, label, probs, cluster, "Hand-Till, influence function")


def _mean_area(
    pairs: list[tuple[int, np.ndarray, np.ndarray]],
    weight: Float[np.ndarray, " pair"],
    label: Labels,
    probs: Float[np.ndarray, "unit class"],
    cluster: Clusters,
    method: str,
) -> Estimate:
    """The weighted mean of AUROCs; a pair is the scoring class, the units compared, and which of them are positive."""
    method = method if cluster is None else f"{method}, clustered by patient"
    known = np.isfinite(probs).all(axis=1)
    label, probs, excluded = label[known], probs[known], int((~known).sum())
    cluster = None if cluster is None else cluster[known]
    n, values, influence = len(label), [], np.zeros(len(label))
    limits: list[tuple[float, float]] = []
    for (k, compared, is_positive), share in zip(pairs, weight.tolist(), strict=True):
        inside, positive = compared[known], (is_positive & compared)[known]
        in_cluster = None if cluster is None else cluster[inside]
        # The placement of a single patient has no variance that the data show.
        if min(_patients(positive, cluster), _patients(inside & ~positive, cluster)) < _FEWEST or (
            cluster is not None and len(np.unique(cluster)) < _FEWEST
        ):
            reason = f"class {k}, or a class that it is compared with, has fewer than two patients"
            return undetermined(method, n, reason, count_clusters(cluster))
        value, placement = placements(positive[inside], probs[inside, k])
        values.append(value)
        influence[inside] += share * _influence(positive[inside], placement, value) * n / inside.sum()
        limits.append(_newcombe(value, positive[inside], in_cluster))
    mean = float(weight @ values)

    low, high = (weight @ np.array(limits)).tolist()
    return _bounded(mean, clustered_error(influence, cluster), method, n, cluster, excluded, (low, high))


def _patients(of_class: np.ndarray, cluster: Clusters) -> int:
    return int(of_class.sum()) if cluster is None else len(np.unique(cluster[of_class]))


def _with_scores(
    positive: Positive, score: Score, cluster: Clusters
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, int]:
    known = np.isfinite(score)
    return positive[known], score[known], None if cluster is None else cluster[known], int((~known).sum())


def _influence(positive: Positive, placement: np.ndarray, value: float) -> Float[np.ndarray, " unit"]:
    """The influence of each unit on the AUROC."""
    share = positive.mean()
    return (placement - value) / np.where(positive, share, 1 - share)


def _bounded(
    value: float,
    error: float,
    method: str,
    n: int,
    cluster: Clusters,
    excluded: int,
    score_limits: tuple[float, float],
) -> Estimate:
    """The interval on the logit scale, or `score_limits` where the value is 0 or 1."""
    clusters = count_clusters(cluster)
    if value < 1e-12 or value > 1 - 1e-12:
        low, high = score_limits
        warnings = (f"an AUROC of {value:g} has no variance; the interval inverts a score",)
        return Estimate(
            value, low, high, "Newcombe 2006", n, warnings=warnings, n_clusters=clusters, n_excluded=excluded
        )
    if error <= 1e-12:
        reason = ("the scores show no variance, which determines no interval",)
        return Estimate(value, np.nan, np.nan, method, n, warnings=reason, n_clusters=clusters, n_excluded=excluded)
    centre, width = special.logit(value), Z * error / (value * (1 - value))
    low, high = (float(special.expit(centre + sign * width)) for sign in (-1, 1))
    method = f"{method}, logit interval"
    return Estimate(value, low, high, method, n, n_clusters=clusters, n_excluded=excluded)


def _newcombe(value: float, positive: Positive, cluster: Clusters) -> tuple[float, float]:
    """The AUROCs whose distance from the value is z standard errors, by Hanley and McNeil's error at that AUROC."""
    positives, negatives = _patients(positive, cluster), _patients(~positive, cluster)
    others = (positives + negatives) / 2 - 1

    def excess(area: float) -> float:
        variance = area * (1 - area) * (1 + others * (1 - area) / (2 - area) + others * area / (1 + area))
        return (value - area) ** 2 * positives * negatives - Z**2 * variance

    low = optimize.brentq(excess, 1e-12, value - 1e-12) if value > 0.5 else 0.0
    high = optimize.brentq(excess, value + 1e-12, 1 - 1e-12) if value < 0.5 else 1.0
    return float(low), float(high)
