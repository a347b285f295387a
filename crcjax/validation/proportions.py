"""Proportions with intervals: Wilson's, Clopper and Pearson's, both also for several units per patient, and Goodman's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.estimate import LEVEL, Estimate, undetermined
from crcjax.validation.influence import Z, clustered_error, count_clusters

# A class with fewer patients is described, not inferred on.
RARE = 10
Limits = Callable[[float, float], tuple[float, float]]


def wilson(successes: int, n: int) -> Estimate:
    """A proportion with Wilson's score interval. Raises InputError for counts that are no proportion."""
    return _from_counts(successes, n, _wilson_limits, "Wilson")


def clopper_pearson(successes: int, n: int) -> Estimate:
    """A proportion with the exact interval of Clopper and Pearson, which covers at least as often as it states."""
    return _from_counts(successes, n, _exact_limits, "Clopper-Pearson")


def proportion(
    success: Bool[np.ndarray, " unit"], cluster: Int[np.ndarray, " unit"] | None = None, *, exact: bool = False
) -> Estimate:
    """The share of successes, of slides with several per patient too.

    With clusters, the interval is that of the effective number of units: the number of independent ones that would have the
    standard error of the ratio estimator (Korn and Graubard 1998). It is the number of patients where all units succeed or
    all fail, and never more than the number of units.

    Args:
      success: whether each unit is a success.
      cluster: the patient of each unit; None if each unit is a patient of its own.
      exact: Clopper and Pearson's interval in place of Wilson's.
    """
    limits, method = (_exact_limits, "Clopper-Pearson") if exact else (_wilson_limits, "Wilson")
    n = len(success)
    if cluster is None or n == 0:
        return _from_counts(int(success.sum()), n, limits, method)
    clusters = count_clusters(cluster)
    share, effective = float(success.mean()), effective_units(success, cluster)
    low, high = limits(share * effective, effective)
    return Estimate(share, low, high, f"{method}, effective n of {effective:.1f}", n, n_clusters=clusters)


def effective_units(success: Bool[np.ndarray, " unit"], cluster: Int[np.ndarray, " unit"]) -> float:
    """The number of independent units that would determine the share of successes as well as these clustered units."""
    share, (_, place) = float(success.mean()), np.unique(cluster, return_inverse=True)
    if share in (0.0, 1.0):
        return float(place.max() + 1)
    error = clustered_error(success - share, cluster)
    # A common divisor of all counts may be the number of copies of every unit, which are no further units.
    copies = np.gcd.reduce(np.append(np.bincount(place), np.bincount(place, success).astype(int)))
    distinct = len(success) / int(copies)
    return float(min(distinct, share * (1 - share) / error**2)) if error > 0 else distinct


def simultaneous_proportions(counts: Int[np.ndarray, " class"]) -> list[Estimate]:
    """The shares of several classes with intervals that hold together, after Goodman (1965).

    All shares lie within their intervals in at least 95 % of studies.
    """
    n, classes = int(counts.sum()), len(counts)
    method = "Goodman, simultaneous"
    if n == 0:
        return [undetermined(method, 0, "no cases") for _ in counts]
    quantile = float(stats.chi2.isf((1 - LEVEL) / classes, 1))
    estimates = []
    for count in counts.tolist():
        low, high = _score_limits(float(count), float(n), quantile)
        estimates.append(Estimate(count / n, low, high, method, n))
    return estimates


def rarity(cases: int, name: str) -> tuple[str, ...]:
    """The warning of a class with fewer than `RARE` cases."""
    return (f"descriptive only: {name} has {cases} case{'s'[: cases != 1]}",) if cases < RARE else ()


def _from_counts(successes: int, n: int, limits: Limits, method: str) -> Estimate:
    if not 0 <= successes <= n:
        raise InputError(f"successes must be from 0 to the number of cases, got {successes} of {n}; check the counts")
    if n == 0:
        return undetermined(method, 0, "no cases")
    return Estimate(successes / n, *limits(float(successes), float(n)), method, n)


def _wilson_limits(successes: float, n: float) -> tuple[float, float]:
    return _score_limits(successes, n, Z**2)


def _score_limits(successes: float, n: float, quantile: float) -> tuple[float, float]:
    """The proportions at which the score statistic, squared, equals a quantile of chi-squared."""
    centre = successes + quantile / 2
    width = np.sqrt(quantile) * np.sqrt(successes * (n - successes) / n + quantile / 4)
    low, high = (centre - width) / (n + quantile), (centre + width) / (n + quantile)
    # Rounding would leave the limit of no success at 1e-17, and that of successes only just below 1.
    return (float(low) if successes > 0 else 0.0), (float(high) if successes < n else 1.0)


def _exact_limits(successes: float, n: float) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low = float(stats.beta.ppf(tail, successes, n - successes + 1)) if successes > 0 else 0.0
    high = float(stats.beta.isf(tail, successes + 1, n - successes)) if successes < n else 1.0
    return low, high
