"""Concordance of a risk score with the times of events: Harrell's and Uno's C, and their differences on the same patients."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.estimate import LEVEL, Estimate, undetermined
from crcjax.validation.survival import FollowUp, kaplan_meier

_Z = float(stats.norm.ppf((1 + LEVEL) / 2))
# Patients with an event that are compared with all others at a time.
_ROWS = 512


def harrell_c(follow_up: FollowUp, risk: Float[np.ndarray, " patient"]) -> Estimate:
    """Harrell's C: how often, of two patients of whom one is known to have the event first, that one has the larger risk.

    Equal risks count half. The variance is the infinitesimal jackknife's, as in R's `concordance`. C depends on the censoring.
    """
    return _estimate(*_concordance(follow_up, risk, None), "Harrell's C, infinitesimal jackknife", len(follow_up))


def uno_c(follow_up: FollowUp, risk: Float[np.ndarray, " patient"], horizon: float | None = None) -> Estimate:
    """Uno's C (2011): Harrell's with weights by which it does not depend on the censoring; until `horizon`, if given.

    The variance takes the weights as known. Late events have large weights: give a horizon that many patients reach.
    """
    method = f"Uno's C{'' if horizon is None else f' to {horizon:g}'}, infinitesimal jackknife"
    weight = _censoring_weights(follow_up, horizon)
    return _estimate(*_concordance(follow_up, risk, weight), method, len(follow_up))


def compare_concordance(
    follow_up: FollowUp,
    first: Float[np.ndarray, " patient"],
    second: Float[np.ndarray, " patient"],
    horizon: float | None = None,
) -> Estimate:
    """C of the risk `first` minus that of `second`, on the same patients: Harrell's, or Uno's to the horizon if one is given.

    Of two nested models, test the likelihood instead (`cox.nested_test`): differences of C have little power.
    """
    name = "Harrell's C" if horizon is None else f"Uno's C to {horizon:g}"
    weight = None if horizon is None else _censoring_weights(follow_up, horizon)
    (value, influence), (other, other_influence) = (_concordance(follow_up, risk, weight) for risk in (first, second))
    method = f"difference of {name}, infinitesimal jackknife"
    return _estimate(value - other, influence - other_influence, method, len(follow_up))


def _estimate(value: float, influence: np.ndarray, method: str, n: int) -> Estimate:
    if not np.isfinite(value):
        return undetermined(method, n, "of no two patients is it known who had the event first")
    error = float(np.sqrt((influence**2).sum()))
    if error == 0:
        return Estimate(value, np.nan, np.nan, method, n, warnings=("no variance, which determines no interval",))
    bounds = (0.0, 1.0) if not method.startswith("difference") else (-1.0, 1.0)
    low, high = np.clip([value - _Z * error, value + _Z * error], *bounds)
    return Estimate(value, float(low), float(high), method, n)


def _concordance(
    follow_up: FollowUp, risk: Float[np.ndarray, " patient"], weight: Float[np.ndarray, " patient"] | None
) -> tuple[float, Float[np.ndarray, " patient"]]:
    """C and every patient's influence on it. `weight` is of the pairs in which a patient has the event first."""
    if len(risk) != len(follow_up) or not np.isfinite(risk).all():
        raise InputError("every patient must have a risk that is a number; leave out patients without one")
    concordant, pairs = np.zeros(len(risk)), np.zeros(len(risk))
    events = np.flatnonzero(follow_up.is_event)
    for chunk in np.split(events, range(_ROWS, len(events), _ROWS)):
        # At the same time, a patient without event outlives one with it; of two events none is the first.
        time, own_risk = follow_up.time[chunk, None], risk[chunk, None]
        later = (follow_up.time > time) | ((follow_up.time == time) & ~follow_up.is_event)
        compared = later * (1.0 if weight is None else weight[chunk, None])
        wins = compared * ((risk < own_risk) + 0.5 * (risk == own_risk))
        concordant += wins.sum(axis=0)
        concordant[chunk] += wins.sum(axis=1)
        pairs += compared.sum(axis=0)
        pairs[chunk] += compared.sum(axis=1)
    # Every pair was added to both of its patients.
    total = pairs.sum() / 2
    if total == 0:
        return np.nan, pairs
    value = float(concordant.sum() / 2 / total)
    return value, (concordant - value * pairs) / total


def _censoring_weights(follow_up: FollowUp, horizon: float | None) -> Float[np.ndarray, " patient"]:
    """The inverse square of the probability of being observed until just before one's time; 0 after the horizon."""
    curve = kaplan_meier(follow_up)
    leaving = curve.at_risk - np.append(curve.at_risk[1:], 0)
    # Events come before censoring at the same time, so that their patients are no longer at risk of censoring.
    at_risk = np.maximum(curve.at_risk - curve.events, 1)
    observed = np.cumprod(1 - (leaving - curve.events) / at_risk)
    before = np.concatenate([[1.0], observed[:-1]])
    weight = np.zeros(len(follow_up))
    is_event = follow_up.is_event
    weight[is_event] = 1 / before[np.searchsorted(curve.time, follow_up.time[is_event])] ** 2
    return weight if horizon is None else np.where(follow_up.time < horizon, weight, 0.0)
