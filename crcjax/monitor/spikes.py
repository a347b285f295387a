"""Outliers of a series of measurements, such as losses or step times, against their recent history."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# The median absolute deviation of a normal distribution, times this, is its standard deviation.
_NORMAL = 1.4826


def robust_z(value: float, history: Sequence[float], min_deviation: float = 1e-12) -> float:
    """The robust z-score of a value: its distance from the median of `history` in robust standard deviations.

    The deviation is 1.4826 times the median absolute deviation (Iglewicz and Hoaglin 1993), which up to half of the history
    may be outliers without changing much. `min_deviation` is its least value: in an almost constant history any change would
    otherwise be an outlier. Raises StatisticsError for an empty history.
    """
    median = statistics.median(history)
    deviation = _NORMAL * statistics.median(abs(earlier - median) for earlier in history)
    return (value - median) / max(deviation, min_deviation)
