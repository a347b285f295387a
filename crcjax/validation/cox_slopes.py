"""The coefficients of a Cox model alone, fast enough for the hundreds of resamples of a bootstrap.

`cox.cox` fits the models that are reported, by statsmodels. Here the sums over the patients at risk are cumulative sums, and
a fit takes a millisecond; `tests/validation/test_cox_slopes.py` compares the two.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped

from crcjax.validation.survival import FollowUp

_STEPS, _CONVERGED = 30, 1e-9
# A coefficient of 15 standard deviations of its covariate means that the likelihood has no maximum.
_STEEPEST = 15.0


def cox_slopes(
    follow_up: FollowUp,
    matrix: Float[np.ndarray, "patient covariate"],
    strata: Shaped[np.ndarray, " patient"] | None = None,
) -> Float[np.ndarray, " covariate"]:
    """Log hazard ratios by Newton's method, ties by Efron's rule; NaN if the data do not determine them."""
    missing = np.full(matrix.shape[1], np.nan)
    scale = matrix.std(axis=0) if len(matrix) else np.zeros(matrix.shape[1])
    if follow_up.events == 0 or (scale == 0).any():
        return missing
    scaled = (matrix - matrix.mean(axis=0)) / scale
    if np.linalg.matrix_rank(scaled) < matrix.shape[1]:
        return missing
    risk_sets = _RiskSets(follow_up, scaled, np.zeros(len(matrix), int) if strata is None else strata)
    slopes = np.zeros(matrix.shape[1])
    likelihood, gradient, information = risk_sets.derivatives(slopes)
    for _ in range(_STEPS):
        try:
            step = np.linalg.solve(information, gradient)
        except np.linalg.LinAlgError:
            return missing
        # The likelihood is concave: a step that lowers it is too long.
        for _ in range(_STEPS):
            new = risk_sets.derivatives(slopes + step)
            if new[0] >= likelihood - _CONVERGED:
                break
            step = step / 2
        slopes, (likelihood, gradient, information) = slopes + step, new
        if np.abs(slopes).max() > _STEEPEST:
            return missing
        if np.abs(step).max() < _CONVERGED:
            return slopes / scale
    return missing


class _RiskSets:
    """Patients by stratum and falling time, so that those at risk at a time are the ones before it in the stratum."""

    def __init__(self, follow_up: FollowUp, matrix: np.ndarray, strata: np.ndarray):
        stratum = np.unique(strata, return_inverse=True)[1].reshape(-1)
        order = np.lexsort((-follow_up.time, stratum))
        self._matrix, stratum, time = matrix[order], stratum[order], follow_up.time[order]
        self._is_event = follow_up.is_event[order]
        changes = (np.diff(stratum) != 0) | (np.diff(time) != 0)
        ends = np.append(np.flatnonzero(changes), len(time) - 1)
        group = np.concatenate([[0], np.cumsum(changes)])
        begins = np.searchsorted(stratum, stratum)
        at = np.flatnonzero(self._is_event)
        # Of the events of one time, the k-th of d leaves k/d of all d out of the patients at risk.
        counts = np.bincount(group[at], minlength=len(ends))
        place = np.arange(len(at)) - np.searchsorted(group[at], group[at])
        self._left_out = place / counts[group[at]]
        self._group, self._groups = group[at], len(ends)
        self._last, self._before = ends[group[at]], begins[at]

    def derivatives(self, slopes: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The log partial likelihood, its gradient, and its negative second derivative."""
        x, eta = self._matrix, self._matrix @ slopes
        eta = eta - eta.max()
        weight, p = np.exp(eta), x.shape[1]
        columns = (
            np.column_stack([np.ones(len(x)), x, (x[:, :, None] * x[:, None]).reshape(len(x), -1)]) * weight[:, None]
        )
        sums = np.vstack([np.zeros(columns.shape[1]), np.cumsum(columns, axis=0)])
        events = np.zeros((self._groups, columns.shape[1]))
        np.add.at(events, self._group, columns[self._is_event])
        at_risk = sums[self._last + 1] - sums[self._before] - self._left_out[:, None] * events[self._group]
        mean, square = at_risk[:, 1 : p + 1] / at_risk[:, :1], at_risk[:, p + 1 :] / at_risk[:, :1]
        likelihood = float(eta[self._is_event].sum() - np.log(at_risk[:, 0]).sum())
        information = square.sum(axis=0).reshape(p, p) - mean.T @ mean
        return likelihood, (x[self._is_event] - mean).sum(axis=0), information
