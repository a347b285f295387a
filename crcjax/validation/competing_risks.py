"""Regression with competing causes: Fine and Gray's (1999) subdistribution hazards, such as of death from the cancer.

A Cox model of one cause treats patients who died of another as censored. Its hazard ratio says how the rate of the cause changes,
not how many patients die of it; the subdistribution hazard ratio says the direction of the latter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.cox import EVENTS_PER_COEFFICIENT, Coefficient, Covariates
from crcjax.validation.estimate import Estimate, TestResult
from crcjax.validation.influence import Z
from crcjax.validation.survival import FollowUp

_STEPS = 50
# Subdistribution hazard ratios of exp(15) over a covariate's range have no maximum of the likelihood.
_STEEPEST = 15.0


@dataclass(frozen=True)
class SubdistributionModel:
    """Coefficients by covariate, the patients in use, and their events of the cause."""

    coefficients: dict[str, Coefficient]
    is_used: Bool[np.ndarray, " patient"]
    events: int


def fine_gray(
    time: Num[np.ndarray, " patient"],
    cause: Int[np.ndarray, " patient"],
    covariates: Covariates,
    of_cause: int = 1,
) -> SubdistributionModel:
    """Fits subdistribution hazard ratios with the sandwich interval of R's `coxph(..., weights = fgwt)` after `finegray`.

    Patients with another event stay at risk, with the weight of still being observed (Kaplan-Meier of the censoring). Ties are
    Breslow's. Patients with a missing (NaN) covariate are left out and counted.

    Args:
      time: of the event, or of the last observation.
      cause: 1, 2, … for the cause of the event; 0 without one.
      covariates: numbers by name.
      of_cause: the cause that the model is about.

    Raises:
      InputError: there is no covariate, one has not one value for each patient, or a cause is negative.
    """
    FollowUp(time, cause > 0)
    if not covariates or any(len(values) != len(time) for values in covariates.values()):
        raise InputError(f"there must be a covariate, each with {len(time)} values")
    if of_cause < 1 or (cause < 0).any():
        raise InputError("causes must be 0 (no event), 1, 2, …, and the model's cause one of the latter")
    matrix = np.stack([np.asarray(values, float) for values in covariates.values()], axis=1)
    is_used = np.isfinite(matrix).all(axis=1)
    events = int((cause[is_used] == of_cause).sum())
    coefficients, covariance, reason = _fit(time[is_used].astype(float), cause[is_used], matrix[is_used], of_cause)
    warnings: tuple[str, ...] = (reason,) if reason else ()
    if events < EVENTS_PER_COEFFICIENT * len(covariates):
        warnings += (f"{events} events for {len(covariates)} coefficients are fewer than 10 for each",)
    counts: dict[str, Any] = {"n": int(is_used.sum()), "n_excluded": int((~is_used).sum()), "warnings": warnings}
    errors = np.sqrt(np.diag(covariance))
    results = {
        name: _coefficient(value, error, counts)
        for name, value, error in zip(covariates, coefficients.tolist(), errors.tolist(), strict=True)
    }
    return SubdistributionModel(results, is_used, events)


def _fit(
    time: Float[np.ndarray, " patient"],
    cause: np.ndarray,
    matrix: Float[np.ndarray, "patient covariate"],
    of_cause: int,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Coefficients, their sandwich covariance, and the reason if they are NaN."""
    parameters = matrix.shape[1]
    missing = np.full(parameters, np.nan), np.full((parameters, parameters), np.nan)
    is_event = cause == of_cause
    scale = matrix.std(axis=0) if len(matrix) else np.zeros(parameters)
    if not is_event.any() or (scale == 0).any():
        return *missing, "no event of the cause, or a covariate is constant"
    scaled = (matrix - matrix.mean(axis=0)) / scale
    if np.linalg.matrix_rank(scaled) < parameters:
        return *missing, "a covariate is a combination of others"
    times, count = np.unique(time[is_event], return_counts=True)
    weight = _weights(time, cause, is_event, times)
    own = scaled[is_event].sum(axis=0)
    beta = np.zeros(parameters)
    for _ in range(_STEPS):
        mean, information, _ = _moments(scaled, weight, count, beta)
        step = np.linalg.solve(information, own - count @ mean)
        # Long steps overshoot; the likelihood is concave, so that short ones arrive.
        beta = beta + step / max(1.0, float(np.abs(step).max()) / 2)
        if (np.abs(beta) * np.ptp(scaled, axis=0) > _STEEPEST).any():
            return *missing, "a covariate separates the events from the others: its hazard ratio has no finite estimate"
        if np.abs(step).max() < 1e-12:
            break
    mean, information, at_risk = _moments(scaled, weight, count, beta)
    # Each patient's part of the score: the event, less what was expected of the patient at all events.
    relative = np.exp(scaled @ beta)
    expected = weight * (count / at_risk)[:, None] * relative
    score = scaled * (is_event - expected.sum(axis=0))[:, None] + expected.T @ mean
    score[is_event] -= mean[np.searchsorted(times, time[is_event])]
    inverse = np.linalg.inv(information)
    return beta / scale, inverse @ (score.T @ score) @ inverse / np.outer(scale, scale), ""


def _weights(
    time: np.ndarray, cause: np.ndarray, is_event: np.ndarray, times: np.ndarray
) -> Float[np.ndarray, "event patient"]:
    """Who is at risk at each event: the observed, and patients with another event by the chance of being observed still."""
    is_competing = (cause > 0) & ~is_event
    at_risk = time >= times[:, None]
    # Of simultaneous events and censorings, the events come first.
    observed = _observed(time, cause, times)
    of_patient = _observed(time, cause, time)
    later = is_competing & (time < times[:, None])
    return np.where(at_risk, 1.0, np.where(later, observed[:, None] / np.maximum(of_patient, 1e-300), 0.0))


def _observed(time: np.ndarray, cause: np.ndarray, at: np.ndarray) -> Float[np.ndarray, " at"]:
    """The Kaplan-Meier estimate of not being censored before each time."""
    censored, count = np.unique(time[cause == 0], return_counts=True)
    at_risk = (time >= censored[:, None]).sum(axis=1) - ((time == censored[:, None]) & (cause > 0)).sum(axis=1)
    remaining = np.concatenate([[1.0], np.cumprod(1 - count / at_risk)])
    return remaining[np.searchsorted(censored, at, side="left")]


def _moments(
    matrix: np.ndarray, weight: np.ndarray, count: np.ndarray, beta: np.ndarray
) -> tuple[Float[np.ndarray, "event covariate"], Float[np.ndarray, "covariate covariate"], Float[np.ndarray, " event"]]:
    """The mean of the covariates at each event, the information, and the weight at risk."""
    shares = weight * np.exp(matrix @ beta)
    at_risk = shares.sum(axis=1)
    shares = shares / at_risk[:, None]
    mean = shares @ matrix
    second = (count @ shares)[:, None] * matrix
    information = matrix.T @ second - (count[:, None] * mean).T @ mean
    return mean, information, at_risk


def _coefficient(value: float, error: float, counts: dict[str, Any]) -> Coefficient:
    method = "Fine-Gray, Breslow, sandwich"
    low, high = value - Z * error, value + Z * error
    ratio, ratio_low, ratio_high = np.exp([value, low, high]).tolist()
    test = TestResult(value / error, float(2 * stats.norm.sf(abs(value / error))), method, warnings=counts["warnings"])
    return Coefficient(
        Estimate(value, low, high, method, **counts),
        Estimate(ratio, ratio_low, ratio_high, method, **counts),
        error,
        test,
    )
