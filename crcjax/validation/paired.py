"""Comparisons of two systems, or of two scanners, on the same units: Tango's interval, non-inferiority, McNemar's test."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int
from scipy import optimize, stats

from crcjax.errors import InputError
from crcjax.validation.estimate import Estimate, TestResult, undetermined
from crcjax.validation.influence import Z, clustered_error, count_clusters


def paired_difference(only_first: int, only_second: int, n: int) -> Estimate:
    """The difference of two proportions on the same cases, with the score interval of Tango (1998).

    The cases are independent: one a patient. For several, use `paired_difference_of_units`.

    Args:
      only_first: cases in which the first system alone is correct.
      only_second: cases in which the second system alone is correct.
      n: all cases.

    Raises:
      InputError: the counts are negative or exceed `n`.
    """
    if min(only_first, only_second) < 0 or only_first + only_second > n:
        raise InputError(
            f"discordant cases must be 0 or more and at most n together, got {only_first} and {only_second} of {n}"
        )
    if n == 0:
        return undetermined("Tango", 0, "no cases")
    low, high = _tango_limits(float(only_first), float(only_second), float(n))
    return Estimate((only_first - only_second) / n, low, high, "Tango", n)


def paired_difference_of_units(
    first: Bool[np.ndarray, " unit"], second: Bool[np.ndarray, " unit"], cluster: Int[np.ndarray, " unit"] | None = None
) -> Estimate:
    """The difference in how often two systems are correct, on units of which a patient may have several.

    With clusters, Tango's interval is that of the number of independent units whose difference would have the standard error of
    the clustered one; where the systems never differ, that is the number of patients.

    Args:
      first: whether the first system is correct on each unit.
      second: whether the second system is.
      cluster: the patient of each unit; None if each unit is a patient of its own.
    """
    n, only_first, only_second = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    estimate = paired_difference(only_first, only_second, n)
    if cluster is None or n == 0:
        return estimate
    share = _independent_share(first, second, cluster)
    low, high = _tango_limits(only_first * share, only_second * share, n * share)
    method = f"Tango, effective n of {n * share:.1f}"
    return replace(estimate, ci_low=low, ci_high=high, method=method, n_clusters=count_clusters(cluster))


def _independent_share(first: np.ndarray, second: np.ndarray, cluster: np.ndarray) -> float:
    """The effective number of units over their number, at most 1 for units that are no copies of each other."""
    n, (_, place) = len(first), np.unique(cluster, return_inverse=True)
    difference = first.astype(float) - second
    excess = difference - difference.mean()
    independent = float((excess**2).sum()) / n**2
    if independent == 0:
        return float(place.max() + 1) / n
    # A common divisor of all counts may be the number of copies of every unit, which are no further units.
    counts = [np.bincount(place, weight).astype(int) for weight in (np.ones(n), first & ~second, second & ~first)]
    copies = float(np.gcd.reduce(np.concatenate(counts)))
    clustered = clustered_error(excess, cluster) ** 2
    return min(1 / copies, independent / clustered) if clustered > 0 else 1 / copies


def _tango_limits(only_first: float, only_second: float, n: float) -> tuple[float, float]:
    value = (only_first - only_second) / n

    def excess(difference: float, z: float) -> float:
        return _tango(only_first, only_second, n, difference) - z

    # The statistic falls with the difference; beyond the ends of its range it has no bounds.
    low = -1.0 if excess(-1 + 1e-12, Z) <= 0 else float(optimize.brentq(excess, -1 + 1e-12, value, args=(Z,)))
    high = 1.0 if excess(1 - 1e-12, -Z) >= 0 else float(optimize.brentq(excess, value, 1 - 1e-12, args=(-Z,)))
    return low, high


def _tango(b: float, c: float, n: float, difference: float) -> float:
    """Tango's score statistic for a true `difference`, by the constrained maximum-likelihood estimate."""
    quadratic, linear = 2 * n, -b - c + (2 * n - b + c) * difference
    constant = -c * difference * (1 - difference)
    root = (np.sqrt(max(0.0, linear**2 - 4 * quadratic * constant)) - linear) / (2 * quadratic)
    variance = n * (2 * root + difference * (1 - difference))
    gap = b - c - n * difference
    if variance <= 0:
        return 0.0 if gap == 0 else float(np.copysign(np.inf, gap))
    return float(gap / np.sqrt(variance))


@dataclass(frozen=True)
class NonInferiority:
    """Whether the lower limit of a difference lies above minus the margin, and the difference."""

    is_shown: bool
    margin: float
    difference: Estimate


def non_inferiority(difference: Estimate, margin: float) -> NonInferiority:
    """Judges non-inferiority by the lower limit of a two-sided interval. Raises InputError for a margin of 0 or less."""
    _check_margin(margin)
    return NonInferiority(bool(difference.ci_low > -margin), margin, difference)


def non_inferiority_test(only_first: int, only_second: int, n: int, margin: float) -> TestResult:
    """Tango's one-sided test that the first system is not worse by the margin or more; arguments as for `paired_difference`.

    The p-value is below 0.025 where `non_inferiority` of Tango's interval is shown.
    """
    _check_margin(margin)
    estimate = paired_difference(only_first, only_second, n)
    if n == 0:
        return TestResult(np.nan, np.nan, "Tango, one-sided", warnings=estimate.warnings)
    z = _tango(float(only_first), float(only_second), float(n), -margin)
    return TestResult(z, float(stats.norm.sf(z)), "Tango, one-sided")


def is_equivalent(difference: Estimate, margin: float) -> bool:
    """Whether the whole interval of a difference lies within the margin on either side. A large p-value shows no equivalence."""
    _check_margin(margin)
    return bool(-margin < difference.ci_low and difference.ci_high < margin)


def _check_margin(margin: float) -> None:
    if not margin > 0:
        raise InputError(f"a margin must be above 0, got {margin}; state it before the data are unblinded")


def mcnemar(only_first: int, only_second: int) -> TestResult:
    """The exact McNemar test that both systems are correct equally often. A large p-value does not show equivalence."""
    discordant = only_first + only_second
    if discordant == 0:
        return TestResult(0.0, 1.0, "McNemar, exact", warnings=("no case is discordant",))
    p_value = stats.binomtest(only_first, discordant).pvalue
    return TestResult(float(only_first - only_second), float(p_value), "McNemar, exact")
