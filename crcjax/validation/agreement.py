"""Agreement of readers, or of a system with a reference: kappa, AC1, Fleiss' kappa and Krippendorff's alpha.

Nominal classes only have unweighted coefficients. Report kappa together with AC1, the observed agreement, and the indices of
prevalence and bias: kappa falls as one class prevails, although the readers agree as often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from crcjax.errors import InputError
from crcjax.validation.bootstrap import Resamples, Weights, number_patients
from crcjax.validation.confusion import cell_influence, confusion_matrix, disagreement_weights, kappa_gradient, kappas
from crcjax.validation.estimate import Estimate, undetermined
from crcjax.validation.influence import Z, count_clusters, wald_estimate
from crcjax.validation.paired import paired_difference
from crcjax.validation.proportions import proportion

# A rating that is missing.
MISSING = -1
_FEWEST = 2
_REPLICATES = 2000
Ratings = Int[np.ndarray, "case reader"]
Scale = Literal["nominal", "linear", "quadratic"]


def cohen_kappa(table: Int[np.ndarray, "first second"], scale: Scale = "nominal") -> Estimate:
    """Cohen's kappa of two readers, with the large-sample error of Fleiss, Cohen and Everitt (1969).

    Args:
      table: the cases by the class that each reader gave.
      scale: for ordered classes such as grades, the weights of disagreements: `linear` (Cicchetti and Allison 1971) or
        `quadratic` (Fleiss and Cohen 1973). Subtypes are nominal.
    """
    cells = np.repeat(np.arange(table.size), table.ravel())
    return kappa_of_units(cells // len(table), cells % len(table), len(table), scale=scale)


def kappa_of_units(
    first: Int[np.ndarray, " unit"],
    second: Int[np.ndarray, " unit"],
    classes: int,
    cluster: Int[np.ndarray, " unit"] | None = None,
    *,
    scale: Scale = "nominal",
) -> Estimate:
    """Cohen's kappa from the classes that two readers gave each unit, of which a patient may have several.

    Without clusters, the error is that of `cohen_kappa`.
    """
    table, n = confusion_matrix(first, second, classes), len(first)
    method = "Cohen's kappa, Fleiss-Cohen-Everitt" if scale == "nominal" else f"Cohen's kappa, {scale} weights"
    if n == 0:
        return undetermined(method, 0, "no cases", count_clusters(cluster))
    weights = disagreement_weights(classes, scale)
    value = float(kappas(table, weights))
    if not np.isfinite(value):
        return undetermined(method, n, "both readers gave every case the same class", count_clusters(cluster))
    influence = cell_influence(kappa_gradient(table, weights), first, second)
    estimate = wald_estimate(value, influence, method, cluster, (-np.inf, 1.0))
    if value == 1 and np.isnan(estimate.ci_low):
        # Without a disagreement the error vanishes; Wilson's limit of the agreement does not.
        agreement, share = proportion(first == second, cluster), table.sum(axis=1) / n
        low = 1 - (1 - agreement.ci_low) / (1 - float(share @ share))
        estimate = replace(estimate, ci_low=low, ci_high=1.0, method="Wilson of the observed agreement", warnings=())
    return estimate


@dataclass(frozen=True)
class ClassAgreement:
    """The agreement of two readers on one class against the rest (Byrt, Bishop and Carlin 1993).

    Attributes:
      observed: the share of cases on which they agree.
      prevalence_index: the share that both call the class less the share that neither does; kappa is low if it is large.
      bias_index: how much more often the first calls the class than the second; kappa is high if it is large.
    """

    observed: Estimate
    prevalence_index: Estimate
    bias_index: Estimate


def class_agreement(table: Int[np.ndarray, "first second"]) -> list[ClassAgreement]:
    """The agreement on every class, from the cases by the class that each reader gave."""
    cells, classes = np.repeat(np.arange(table.size), table.ravel()), len(table)
    first, second = cells // classes, cells % classes
    results = []
    for k in range(classes):
        both, neither = (first == k) & (second == k), (first != k) & (second != k)
        score = both.astype(float) - neither
        prevalence = undetermined("mean", 0, "no cases")
        if len(score):
            mean = float(score.mean())
            prevalence = wald_estimate(mean, score - mean, "mean", bounds=(-1.0, 1.0))
        only_first, only_second = int(((first == k) & ~both).sum()), int(((second == k) & ~both).sum())
        bias = paired_difference(only_first, only_second, len(first))
        results.append(ClassAgreement(proportion(both | neither), prevalence, bias))
    return results


def gwet_ac1(ratings: Ratings, classes: int) -> Estimate:
    """Gwet's AC1 of two or more readers, with missing ratings, and its error over cases (Gwet 2008).

    `ratings` are class indices, or `MISSING`. Cases without a rating are excluded. Raises InputError for other values.
    """
    return _chance_corrected(ratings, classes, "Gwet's AC1", lambda prevalence: (1 - prevalence) / (classes - 1))


def brennan_prediger(ratings: Ratings, classes: int) -> Estimate:
    """The agreement corrected for chance that gives every class equally often (Brennan and Prediger 1981).

    With two classes and two readers it is the prevalence-adjusted and bias-adjusted kappa. Arguments as for `gwet_ac1`.
    """
    return _chance_corrected(ratings, classes, "Brennan-Prediger", lambda prevalence: np.full(classes, 1 / classes))


def _chance_corrected(
    ratings: Ratings,
    classes: int,
    method: str,
    chance_of: Callable[[np.ndarray], np.ndarray],
) -> Estimate:
    """`chance_of` gives, from the prevalence of the classes, the chance of agreement on each."""
    counts, excluded = _counts(ratings, classes, fewest=1)
    paired = counts.sum(axis=1) >= _FEWEST
    if paired.sum() < _FEWEST or classes < _FEWEST:
        return undetermined(method, int(paired.sum()), "fewer than two cases have two ratings")
    readers = counts.sum(axis=1)
    share = counts / readers[:, None]
    chance = chance_of(share.mean(axis=0))
    expected, case_expected = float(share.mean(axis=0) @ chance), share @ chance
    observed = np.zeros(len(counts))
    observed[paired] = (counts * (counts - 1)).sum(axis=1)[paired] / (readers * (readers - 1))[paired]
    value = float((observed[paired].mean() - expected) / (1 - expected))
    # The ratio makes the mean over all cases the mean over those with two ratings.
    by_case = (observed * len(counts) / paired.sum() - expected) / (1 - expected)
    by_case = by_case - 2 * (1 - value) * (case_expected - expected) / (1 - expected)
    error = np.sqrt(((by_case - value) ** 2).sum()) / len(counts)
    low, high = value - Z * float(error), min(1.0, value + Z * float(error))
    if error > 0:
        return Estimate(value, low, high, method, len(counts), n_excluded=excluded)
    reason = ("the data show no variance, which determines no interval",)
    return Estimate(value, np.nan, np.nan, method, len(counts), warnings=reason, n_excluded=excluded)


def fleiss_kappa(ratings: Ratings, classes: int, seed: int, replicates: int = _REPLICATES) -> Estimate:
    """Fleiss' kappa (1971) of readers who rated every case, with a percentile interval over resampled cases.

    With two readers it is Scott's pi. Raises InputError: a rating is missing or is no class.
    """
    counts, _ = _counts(ratings, classes, fewest=1)
    if (ratings == MISSING).any():
        raise InputError(
            "Fleiss' kappa needs a rating of every case by every reader; use krippendorff_alpha or gwet_ac1"
        )
    readers = ratings.shape[1]
    agreeing = (counts * (counts - 1)).sum(axis=1) / max(readers * (readers - 1), 1)

    def statistic(weights: Weights) -> Float[np.ndarray, " replicate"]:
        share = counts.T @ weights / (readers * weights.sum(axis=0))
        expected, observed = (share**2).sum(axis=0), agreeing @ weights / weights.sum(axis=0)
        return np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)

    return _bootstrapped(statistic, counts, "Fleiss' kappa", seed, replicates)


def krippendorff_alpha(
    ratings: Ratings,
    classes: int,
    seed: int,
    scale: Literal["nominal", "ordinal", "interval"] = "nominal",
    replicates: int = _REPLICATES,
) -> Estimate:
    """Krippendorff's alpha (2011), with missing ratings and a percentile interval over resampled cases.

    Cases with fewer than two ratings are excluded. Raises InputError for a rating that is no class.
    """
    counts, excluded = _counts(ratings, classes, fewest=_FEWEST)
    # The pairs of ratings within each case, so that every rating counts once.
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(classes, dtype=int)
    pairs = pairs / (counts.sum(axis=1) - 1)[:, None, None]

    def statistic(weights: Weights) -> Float[np.ndarray, " replicate"]:
        coincidences = np.tensordot(weights, pairs, (0, 0))
        totals = coincidences.sum(axis=2)
        distance = _distances(totals, scale)
        expected = np.einsum("ri,rij,rj->r", totals, distance, totals) / (totals.sum(axis=1) - 1)
        return np.where(expected > 0, 1 - (coincidences * distance).sum(axis=(1, 2)) / expected, np.nan)

    estimate = _bootstrapped(statistic, counts, f"Krippendorff's alpha, {scale}", seed, replicates)
    return replace(estimate, n_excluded=excluded)


def _counts(ratings: np.ndarray, classes: int, fewest: int) -> tuple[Int[np.ndarray, "case class"], int]:
    """The ratings of each case by class, and the number of cases that are excluded for fewer than `fewest` ratings."""
    if ((ratings < MISSING) | (ratings >= classes)).any():
        wrong = ratings[(ratings < MISSING) | (ratings >= classes)][0]
        raise InputError(
            f"a rating must be a class from 0 to {classes - 1}, or {MISSING} if it is missing, got {wrong}"
        )
    counts = (ratings[:, :, None] == np.arange(classes)).sum(axis=1)
    used = counts.sum(axis=1) >= fewest
    return counts[used], int((~used).sum())


def _distances(totals: Float[np.ndarray, "replicate class"], scale: str) -> Float[np.ndarray, "#replicate class class"]:
    """Krippendorff's squared differences between the classes."""
    classes = np.arange(totals.shape[1])
    if scale == "nominal":
        return (classes[:, None] != classes).astype(float)[None]
    if scale == "interval":
        return ((classes[:, None] - classes) ** 2.0)[None]
    # Ordinal: the ratings that lie between two classes, with half of those in either.
    middle = totals.cumsum(axis=1) - totals / 2
    return (middle[:, :, None] - middle[:, None, :]) ** 2


def _bootstrapped(
    statistic: Callable[[Weights], np.ndarray],
    counts: Int[np.ndarray, "case class"],
    method: str,
    seed: int,
    replicates: int,
) -> Estimate:
    """`statistic` gets the weights of the cases in their order."""
    if len(counts) < _FEWEST or counts.sum(axis=1).max() < _FEWEST:
        return undetermined(method, len(counts), "fewer than two cases have two ratings")
    resamples = Resamples.sample(number_patients(None, counts), seed, replicates)
    values = resamples.evaluate(lambda weights: statistic(weights[resamples.patient]))
    estimate = replace(resamples.estimate(values), n_clusters=None)
    estimate = replace(estimate, method=f"{method}, {estimate.method.replace('patients', 'cases')}")
    if not np.isfinite(values[0]):
        return undetermined(method, len(counts), "all ratings are of one class")
    return estimate
