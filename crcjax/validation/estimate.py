"""The result of every statistic: a value with its interval, its method and its numbers of cases."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# The confidence level of all intervals.
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; NaN, with the reason in `warnings`, if the data do not determine it.

    Attributes:
      value: the estimate.
      ci_low: the lower limit of the interval.
      ci_high: the upper limit.
      method: how the interval was computed.
      n: the number of units (cases, slides or sites) that the estimate is made of.
      level: the confidence level.
      warnings: what a reader must know before using the numbers.
      n_clusters: the number of clusters (patients) that the units belong to; None if each unit is its own.
      n_excluded: units that could not be used.
    """

    value: float
    ci_low: float
    ci_high: float
    method: str
    n: int
    level: float = LEVEL
    warnings: tuple[str, ...] = field(default=())
    n_clusters: int | None = None
    n_excluded: int = 0


@dataclass(frozen=True)
class TestResult:
    """A statistic of a test with its degrees of freedom (None for an exact or normal one) and two-sided p-value."""

    # pytest would take the class for a test.
    __test__ = False

    statistic: float
    p_value: float
    method: str
    df: int | None = None
    warnings: tuple[str, ...] = field(default=())


def undetermined(method: str, n: int, warning: str, n_clusters: int | None = None) -> Estimate:
    """The estimate of a quantity that the data do not determine."""
    return Estimate(np.nan, np.nan, np.nan, method, n, warnings=(warning,), n_clusters=n_clusters)
