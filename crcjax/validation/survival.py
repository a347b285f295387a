"""Survival curves and what is read from them: medians, restricted means, follow-up, and the log-rank test.

Times are in one unit of the reader's choice, counted from the same origin for every patient; one row is one patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped
from scipy import stats

from crcjax.environment import require_extra
from crcjax.errors import InputError
from crcjax.validation.estimate import LEVEL, Estimate, TestResult, undetermined

_Z = float(stats.norm.ppf((1 + LEVEL) / 2))


@dataclass(frozen=True)
class FollowUp:
    """The time of each patient's event or, without one, of the last observation.

    Raises InputError: a time is negative or missing.
    """

    time: Num[np.ndarray, " patient"]
    is_event: Bool[np.ndarray, " patient"]

    def __post_init__(self) -> None:
        if not (np.isfinite(self.time) & (self.time >= 0)).all():
            wrong = self.time[~(np.isfinite(self.time) & (self.time >= 0))][0]
            raise InputError(f"times must be 0 or more, got {wrong}; leave out patients without follow-up")

    def __len__(self) -> int:
        return len(self.time)

    @property
    def events(self) -> int:
        """The number of events."""
        return int(self.is_event.sum())

    def of(self, patients: Shaped[np.ndarray, " chosen"]) -> FollowUp:
        """The follow-up of a mask or of indices of patients."""
        return FollowUp(self.time[patients], self.is_event[patients])


@dataclass(frozen=True)
class SurvivalCurve:
    """The product-limit estimate (Kaplan and Meier 1958) after each time at which someone leaves.

    The interval is symmetric for log(-log S), so that it stays within 0 and 1; it is NaN where S is 0 or 1.
    """

    time: Num[np.ndarray, " step"]
    at_risk: Int[np.ndarray, " step"]
    events: Int[np.ndarray, " step"]
    survival: Float[np.ndarray, " step"]
    ci_low: Float[np.ndarray, " step"]
    ci_high: Float[np.ndarray, " step"]


def kaplan_meier(follow_up: FollowUp) -> SurvivalCurve:
    """The survival curve with pointwise intervals by Greenwood's variance."""
    time, place = np.unique(follow_up.time, return_inverse=True)
    leaving = np.bincount(place, minlength=len(time))
    at_risk = leaving[::-1].cumsum()[::-1]
    events = np.bincount(place, follow_up.is_event, minlength=len(time)).astype(np.int64)
    survival = np.cumprod(1 - events / at_risk)
    with np.errstate(divide="ignore", invalid="ignore"):
        greenwood = np.cumsum(events / (at_risk * (at_risk - events)))
        width = _Z * np.sqrt(greenwood) / np.abs(np.log(survival))
        low, high = (survival ** np.exp(sign * width) for sign in (1, -1))
    is_determined = (survival > 0) & (survival < 1)
    low, high = (np.where(is_determined, limit, np.nan) for limit in (low, high))
    return SurvivalCurve(time, at_risk, events, survival, low, high)


def survival_at(follow_up: FollowUp, time: float) -> Estimate:
    """The survival at a time; undetermined after the last observation, unless that is an event."""
    method, n = "Kaplan-Meier, log-log interval", len(follow_up)
    if n == 0:
        return undetermined(method, 0, "no patients")
    curve = kaplan_meier(follow_up)
    if time > curve.time[-1] and curve.survival[-1] > 0:
        return undetermined(method, n, f"nobody is observed until {time:g}; the last is until {curve.time[-1]:g}")
    step = int(np.searchsorted(curve.time, time, side="right")) - 1
    if step < 0 or curve.survival[step] == 1:
        return Estimate(1.0, np.nan, np.nan, method, n, warnings=(f"no event until {time:g}",))
    value, low, high = (float(values[step]) for values in (curve.survival, curve.ci_low, curve.ci_high))
    warnings = ("every patient has an event by then",) if value == 0 else ()
    return Estimate(value, low, high, method, n, warnings=warnings)


def median_survival(follow_up: FollowUp) -> Estimate:
    """The first time at which the survival is at most 1/2, with the times at which its interval's limits are.

    A limit that is not reached is infinite. Where the curve is level at 1/2, R reports the middle of the level part.
    """
    method, n = "Kaplan-Meier, log-log interval", len(follow_up)
    if n == 0:
        return undetermined(method, 0, "no patients")
    curve = kaplan_meier(follow_up)
    # Rounding must not move 1/2 above 1/2.
    median, low, high = (
        float(curve.time[np.argmax(limit <= 0.5 + 1e-12)]) if (limit <= 0.5 + 1e-12).any() else np.inf
        for limit in (curve.survival, curve.ci_low, curve.ci_high)
    )
    if np.isinf(median):
        warning = f"fewer than half of the patients have an event by {curve.time[-1]:g}: the median is not reached"
        return Estimate(np.nan, low, np.nan, method, n, warnings=(warning,))
    return Estimate(median, low, high, method, n)


def median_follow_up(follow_up: FollowUp) -> Estimate:
    """The median time for which patients were observed, had they no event (reverse Kaplan-Meier; Schemper and Smith 1996)."""
    return median_survival(FollowUp(follow_up.time, ~follow_up.is_event))


def numbers_at_risk(follow_up: FollowUp, times: Sequence[float]) -> list[int]:
    """The number of patients who are still observed without an event just before each time."""
    return [int((follow_up.time >= time).sum()) for time in times]


def restricted_mean(follow_up: FollowUp, horizon: float) -> Estimate:
    """The mean time without event, of the time until `horizon`: the area under the survival curve.

    State the horizon before the data are seen; it must be reached by the follow-up of every arm that is compared.

    Raises:
      InputError: the horizon is not above 0, or lies after the last observation and that is no event.
    """
    value, variance = _area(follow_up, horizon)
    method, error = f"restricted mean to {horizon:g}, normal interval", float(np.sqrt(variance))
    warnings = () if error > 0 else (f"no event until {horizon:g}",)
    limits = (value - _Z * error, value + _Z * error) if error > 0 else (np.nan, np.nan)
    return Estimate(value, *limits, method, len(follow_up), warnings=warnings)


def restricted_mean_difference(first: FollowUp, second: FollowUp, horizon: float) -> Estimate:
    """The restricted mean of `first` minus that of `second`, of different patients. Errors as `restricted_mean`."""
    (value, variance), (other, other_variance) = (_area(arm, horizon) for arm in (first, second))
    error = float(np.sqrt(variance + other_variance))
    method = f"difference of restricted means to {horizon:g}, normal interval"
    n = len(first) + len(second)
    if error == 0:
        return Estimate(value - other, np.nan, np.nan, method, n, warnings=(f"no event until {horizon:g}",))
    return Estimate(value - other, value - other - _Z * error, value - other + _Z * error, method, n)


def _area(follow_up: FollowUp, horizon: float) -> tuple[float, float]:
    """The area under the survival curve to the horizon, and the variance of that estimate."""
    if not horizon > 0:
        raise InputError(f"the horizon must be above 0, got {horizon}")
    curve = kaplan_meier(follow_up)
    if len(follow_up) == 0 or (curve.time[-1] < horizon and curve.survival[-1] > 0):
        last = f"the last patient is observed until {curve.time[-1]:g}" if len(follow_up) else "there are no patients"
        raise InputError(f"the horizon {horizon:g} must be within the follow-up, but {last}; choose an earlier one")
    within = curve.time < horizon
    edges = np.concatenate([[0.0], curve.time[within], [horizon]])
    areas = np.diff(edges) * np.concatenate([[1.0], curve.survival[within]])
    # The area from each time to the horizon.
    remaining = areas[::-1].cumsum()[::-1][1:]
    at_risk, events = curve.at_risk[within], curve.events[within]
    # Where the last patients at risk all have an event, nothing remains.
    counts = remaining > 0
    variance = (remaining**2 * events)[counts] / (at_risk * (at_risk - events))[counts]
    return float(areas.sum()), float(variance.sum())


def log_rank(
    follow_up: FollowUp,
    group: Shaped[np.ndarray, " patient"],
    strata: Shaped[np.ndarray, " patient"] | None = None,
) -> TestResult:
    """The log-rank test that all groups have the same survival, within each stratum if strata are given.

    Needs the extra `stats`. Groups without a patient at risk at any event are an undetermined test.
    """
    survfunc = require_extra("statsmodels.duration.survfunc", "stats", "the log-rank test")
    method, groups = "log-rank" if strata is None else "log-rank, stratified", np.unique(group)
    df = len(groups) - 1
    if df < 1 or follow_up.events == 0:
        return TestResult(np.nan, np.nan, method, max(df, 0), ("there is one group, or no event",))
    try:
        statistic, _ = survfunc.survdiff(follow_up.time, follow_up.is_event.astype(int), group, strata=strata)
    except np.linalg.LinAlgError:
        return TestResult(np.nan, np.nan, method, df, ("a group is never at risk when an event occurs",))
    return TestResult(float(statistic), float(stats.chi2.sf(statistic, df)), method, df)


def cumulative_incidence(
    time: Num[np.ndarray, " patient"], cause: Int[np.ndarray, " patient"], horizon: float
) -> dict[int, Estimate]:
    """The probability of an event of each cause by the horizon, where causes compete (Aalen-Johansen).

    One minus the Kaplan-Meier curve of one cause is too large if another prevents it. Needs the extra `stats`.

    Args:
      time: the times of the events, or of the last observation.
      cause: 1, 2, … for the cause of the event; 0 without one.
      horizon: the time at which the probabilities are read.

    Raises:
      InputError: a cause is negative, or nobody is observed until the horizon.
    """
    survfunc = require_extra("statsmodels.duration.survfunc", "stats", "cumulative incidence")
    FollowUp(time, cause > 0)
    if len(cause) == 0 or cause.min() < 0:
        raise InputError("causes must be 0 (no event), 1, 2, …, of one patient or more; renumber them")
    if horizon > time.max():
        raise InputError(f"the horizon {horizon:g} must be within the follow-up, which ends at {time.max():g}")
    method, n = f"Aalen-Johansen at {horizon:g}, log-log interval", len(time)
    if not (cause > 0).any():
        return {}
    fitted = survfunc.CumIncidenceRight(time, cause)
    step = int(np.searchsorted(fitted.times, horizon, side="right")) - 1
    estimates = {}
    for k, (incidence, error) in enumerate(zip(fitted.cinc, fitted.cinc_se, strict=True), start=1):
        value = float(incidence[step]) if step >= 0 else 0.0
        if not 0 < value < 1:
            estimates[k] = Estimate(value, np.nan, np.nan, method, n, warnings=("nobody has, or all have, this event",))
            continue
        width = _Z * float(error[step]) / (abs(np.log(value)) * value)
        low, high = value ** np.exp(width), value ** np.exp(-width)
        estimates[k] = Estimate(value, float(low), float(high), method, n)
    return estimates
