"""Comparisons of two systems, or of two scanners, on the same cases: Tango's interval, non-inferiority, McNemar's test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from crcjax.errors import InputError
from crcjax.validation.estimate import LEVEL, Estimate, TestResult, undetermined

_Z = float(stats.norm.ppf((1 + LEVEL) / 2))


def paired_difference(only_first: int, only_second: int, n: int) -> Estimate:
    """The difference of two proportions on the same cases, with the score interval of Tango (1998).

    The cases are independent: give one a patient.

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
    value = (only_first - only_second) / n

    def excess(difference: float, z: float) -> float:
        return _tango(only_first, only_second, n, difference) - z

    # The statistic falls with the difference; beyond the ends of its range it has no bounds.
    low = -1.0 if excess(-1 + 1e-12, _Z) <= 0 else float(optimize.brentq(excess, -1 + 1e-12, value, args=(_Z,)))
    high = 1.0 if excess(1 - 1e-12, -_Z) >= 0 else float(optimize.brentq(excess, value, 1 - 1e-12, args=(-_Z,)))
    return Estimate(value, low, high, "Tango", n)


def _tango(b: int, c: int, n: int, difference: float) -> float:
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
    if not margin > 0:
        raise InputError(
            f"a non-inferiority margin must be above 0, got {margin}; state it before the data are unblinded"
        )
    return NonInferiority(bool(difference.ci_low > -margin), margin, difference)


def mcnemar(only_first: int, only_second: int) -> TestResult:
    """The exact McNemar test that both systems are correct equally often. A large p-value does not show equivalence."""
    discordant = only_first + only_second
    if discordant == 0:
        return TestResult(0.0, 1.0, "McNemar, exact", warnings=("no case is discordant",))
    p_value = stats.binomtest(only_first, discordant).pvalue
    return TestResult(float(only_first - only_second), float(p_value), "McNemar, exact")
