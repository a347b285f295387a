"""Agreement of readers, or of a system with a reference: kappa, AC1, Fleiss' kappa and Krippendorff's alpha.

Nominal classes only have unweighted coefficients. Report kappa together with AC1 and the observed agreement: kappa falls as
one class prevails, although the readers agree as often.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.estimate import LEVEL, Estimate, undetermined

# A rating that is missing.
MISSING = -1
_Z = float(stats.norm.ppf((1 + LEVEL) / 2))
_FEWEST = 2


def cohen_kappa(table: Int[np.ndarray, "first second"]) -> Estimate:
    """Cohen's kappa of two readers, with the large-sample error of Fleiss, Cohen and Everitt (1969).

    `table` counts the cases by the class that each reader gave.
    """
    method, n = "Cohen's kappa, Fleiss-Cohen-Everitt", int(table.sum())
    if n == 0:
        return undetermined(method, 0, "no cases")
    share = table / n
    first, second = share.sum(axis=1), share.sum(axis=0)
    observed, expected = np.trace(share), float(first @ second)
    if expected == 1:
        return undetermined(method, n, "both readers gave every case the same class")
    kappa = (observed - expected) / (1 - expected)
    # Element [i, j]: the first reader's share of class j, and the second reader's of class i.
    sums = second[:, None] + first[None, :]
    diagonal = (np.diagonal(share) * (1 - (first + second) * (1 - kappa)) ** 2).sum()
    off_diagonal = (1 - kappa) ** 2 * ((share * sums**2).sum() - (np.diagonal(share) * np.diagonal(sums) ** 2).sum())
    variance = (diagonal + off_diagonal - (kappa - expected * (1 - kappa)) ** 2) / (n * (1 - expected) ** 2)
    return _symmetric(float(kappa), float(np.sqrt(max(variance, 0.0))), method, n)


def gwet_ac1(ratings: Int[np.ndarray, "case reader"], classes: int) -> Estimate:
    """Gwet's AC1 of two or more readers, with missing ratings, and its error over cases (Gwet 2008).

    `ratings` are class indices, or `MISSING`. Cases without a rating are excluded. Raises InputError for other values.
    """
    counts, excluded = _counts(ratings, classes, fewest=1)
    method = "Gwet's AC1"
    paired = counts.sum(axis=1) >= _FEWEST
    if paired.sum() < _FEWEST or classes < _FEWEST:
        return undetermined(method, int(paired.sum()), "fewer than two cases have two ratings")
    prevalence = (counts / counts.sum(axis=1, keepdims=True)).mean(axis=0)
    expected = float((prevalence * (1 - prevalence)).sum() / (classes - 1))
    readers = counts.sum(axis=1)
    case_expected = (counts @ (1 - prevalence)) / readers / (classes - 1)
    observed = np.zeros(len(counts))
    observed[paired] = (counts * (counts - 1)).sum(axis=1)[paired] / (readers * (readers - 1))[paired]
    value = (observed[paired].mean() - expected) / (1 - expected)
    # The ratio makes the mean over all cases the mean over those with two ratings.
    by_case = (observed * len(counts) / paired.sum() - expected) / (1 - expected)
    by_case = by_case - 2 * (1 - value) * (case_expected - expected) / (1 - expected)
    error = np.sqrt(((by_case - value) ** 2).sum()) / len(counts)
    return _symmetric(float(value), float(error), method, len(counts), excluded)


def fleiss_kappa(ratings: Int[np.ndarray, "case reader"], classes: int, seed: int, resamples: int = 2000) -> Estimate:
    """Fleiss' kappa (1971) of readers who rated every case, with a percentile interval over resampled cases.

    Raises InputError: a rating is missing or is no class.
    """
    counts, _ = _counts(ratings, classes, fewest=1)
    if (ratings == MISSING).any():
        raise InputError(
            "Fleiss' kappa needs a rating of every case by every reader; use krippendorff_alpha or gwet_ac1"
        )
    return _bootstrapped(_fleiss, counts, "Fleiss' kappa", seed, resamples)


def krippendorff_alpha(
    ratings: Int[np.ndarray, "case reader"],
    classes: int,
    seed: int,
    scale: Literal["nominal", "ordinal", "interval"] = "nominal",
    resamples: int = 2000,
) -> Estimate:
    """Krippendorff's alpha (2011), with missing ratings and a percentile interval over resampled cases.

    Cases with fewer than two ratings are excluded. Raises InputError for a rating that is no class.
    """
    counts, excluded = _counts(ratings, classes, fewest=_FEWEST)

    def statistic(sample: np.ndarray) -> float:
        return _alpha(sample, scale)

    return _bootstrapped(statistic, counts, f"Krippendorff's alpha, {scale}", seed, resamples, excluded)


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


def _fleiss(counts: Int[np.ndarray, "case class"]) -> float:
    readers = counts[0].sum()
    share = counts.sum(axis=0) / counts.sum()
    expected = float((share**2).sum())
    observed = float(((counts * (counts - 1)).sum(axis=1) / (readers * (readers - 1))).mean())
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")


def _alpha(counts: Int[np.ndarray, "case class"], scale: str) -> float:
    weights = 1 / (counts.sum(axis=1) - 1)
    coincidences = (counts * weights[:, None]).T @ counts - np.diag((counts * weights[:, None]).sum(axis=0))
    totals = coincidences.sum(axis=1)
    distance = _distances(totals, scale)
    expected = float(totals @ distance @ totals - (totals * np.diagonal(distance)).sum()) / (totals.sum() - 1)
    return 1 - float((coincidences * distance).sum()) / expected if expected > 0 else float("nan")


def _distances(totals: Float[np.ndarray, " class"], scale: str) -> Float[np.ndarray, "class class"]:
    """Krippendorff's squared differences between the classes."""
    classes = np.arange(len(totals))
    if scale == "nominal":
        return (classes[:, None] != classes).astype(float)
    if scale == "interval":
        return (classes[:, None] - classes) ** 2.0
    # Ordinal: the ratings that lie between two classes, with half of those in either.
    middle = totals.cumsum() - totals / 2
    return (middle[:, None] - middle) ** 2


def _bootstrapped(
    statistic: Callable[[np.ndarray], float],
    counts: np.ndarray,
    method: str,
    seed: int,
    resamples: int,
    excluded: int = 0,
) -> Estimate:
    method = f"{method}, bootstrap over cases, percentile, {resamples} resamples"
    if len(counts) < _FEWEST or counts.sum(axis=1).max() < _FEWEST:
        return undetermined(method, len(counts), "fewer than two cases have two ratings")
    value = statistic(counts)
    rng = np.random.default_rng([seed, 22])
    sampled = np.array([statistic(counts[rng.integers(len(counts), size=len(counts))]) for _ in range(resamples)])
    usable = sampled[np.isfinite(sampled)]
    if not np.isfinite(value) or len(usable) < resamples / 2:
        return undetermined(method, len(counts), "nearly all ratings are of one class")
    low, high = np.quantile(usable, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    warnings = (f"{resamples - len(usable)} resamples had one class",) if len(usable) < resamples else ()
    return Estimate(value, float(low), float(high), method, len(counts), warnings=warnings, n_excluded=excluded)


def _symmetric(value: float, error: float, method: str, n: int, excluded: int = 0) -> Estimate:
    low, high = value - _Z * error, min(1.0, value + _Z * error)
    warnings = () if error > 0 else ("the readers agree in every case: the error is larger than stated",)
    return Estimate(value, low, high, method, n, warnings=warnings, n_excluded=excluded)
