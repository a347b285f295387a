"""Cox regression with a named rule for ties, and the test of proportional hazards. Needs the extra `stats`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped
from scipy import stats

from crcjax.environment import require_extra
from crcjax.errors import InputError
from crcjax.validation.estimate import LEVEL, Estimate, TestResult
from crcjax.validation.survival import FollowUp, kaplan_meier

Covariates = Mapping[str, Num[np.ndarray, " patient"]]

# Fewer events for each coefficient bias the coefficients and their errors (Peduzzi et al. 1995).
EVENTS_PER_COEFFICIENT = 10
# A hazard ratio of exp(15) over a covariate's range means that the likelihood has no maximum.
_STEEPEST = 15.0
_STEEP = "a covariate separates the events from the others: its hazard ratio has no finite estimate"
_Z = float(stats.norm.ppf((1 + LEVEL) / 2))


@dataclass(frozen=True)
class Coefficient:
    """The effect of one covariate: of a unit of it, or of belonging to a class against the reference class."""

    log_hazard_ratio: Estimate
    hazard_ratio: Estimate
    error: float
    test: TestResult


@dataclass(frozen=True)
class CoxModel:
    """A Cox model fitted by maximum partial likelihood.

    Attributes:
      coefficients: by covariate.
      log_likelihood: at the estimates.
      likelihood_ratio: the test that all coefficients are zero.
      is_used: the patients whose covariates are all known.
      risk: the linear predictor of the patients in use; larger means earlier events.
      events: the number of events among them.
      ties: how simultaneous events are treated. Programs differ: R and lifelines use Efron's rule, others Breslow's.
    """

    coefficients: dict[str, Coefficient]
    log_likelihood: float
    likelihood_ratio: TestResult
    is_used: Bool[np.ndarray, " patient"]
    risk: Float[np.ndarray, " used"]
    events: int
    ties: str


def indicators(
    label: Int[np.ndarray, " patient"], classes: Sequence[str], reference: int = 0
) -> dict[str, Float[np.ndarray, " patient"]]:
    """A covariate for every class except the reference class: 1 for its patients, 0 for the others."""
    return {name: (label == k).astype(float) for k, name in enumerate(classes) if k != reference}


def cox(
    follow_up: FollowUp,
    covariates: Covariates,
    strata: Shaped[np.ndarray, " patient"] | None = None,
    ties: Literal["efron", "breslow"] = "efron",
) -> CoxModel:
    """Fits hazard ratios with Wald intervals; patients with a missing (NaN) covariate are left out and counted.

    A covariate that is constant, repeats others, or separates the events gives NaN with a warning.

    Args:
      follow_up: the times.
      covariates: numbers by name; `indicators` makes them of classes.
      strata: groups with baseline hazards of their own, such as the centre.
      ties: the rule for simultaneous events.

    Raises:
      InputError: there is no covariate, or one has not one value for each patient.
    """
    for name, values in covariates.items():
        if len(values) != len(follow_up):
            raise InputError(f"covariate {name} must have {len(follow_up)} values, got {len(values)}")
    if not covariates:
        raise InputError("a Cox model must have a covariate, got none")
    matrix = np.stack([np.asarray(values, float) for values in covariates.values()], axis=1)
    is_used = np.isfinite(matrix).all(axis=1)
    matrix, used = matrix[is_used], follow_up.of(is_used)
    used_strata = None if strata is None else np.unique(strata[is_used], return_inverse=True)[1]
    parameters = matrix.shape[1]
    fitted = _fit(used, matrix, used_strata, ties)
    reasons = fitted.warnings
    if used.events < EVENTS_PER_COEFFICIENT * parameters:
        reasons += (f"{used.events} events for {parameters} coefficients are fewer than 10 for each",)
    counts = {"n": len(used), "n_excluded": int((~is_used).sum()), "warnings": reasons}
    statistic = 2 * (fitted.log_likelihood - fitted.null_log_likelihood)
    values = np.where(fitted.is_finite, fitted.coefficients, np.nan).tolist()
    coefficients = {
        name: _coefficient(value, error, ties, counts)
        for name, value, error in zip(covariates, values, fitted.errors.tolist(), strict=True)
    }
    test = chi_squared(statistic, parameters, f"likelihood ratio, Cox, {ties}", reasons)
    risk = matrix @ fitted.coefficients
    return CoxModel(coefficients, fitted.log_likelihood, test, is_used, risk, used.events, ties)


@dataclass(frozen=True)
class _Fit:
    """`is_finite` is False for a coefficient that has no finite estimate; the likelihood then approaches its limit."""

    coefficients: Float[np.ndarray, " covariate"]
    errors: Float[np.ndarray, " covariate"]
    is_finite: Bool[np.ndarray, " covariate"]
    log_likelihood: float
    null_log_likelihood: float
    warnings: tuple[str, ...] = ()


def _fit(
    follow_up: FollowUp, matrix: Float[np.ndarray, "patient covariate"], strata: np.ndarray | None, ties: str
) -> _Fit:
    """The fit; NaN, with the reason, if the data do not determine it."""
    regression = require_extra("statsmodels.duration.hazard_regression", "stats", "Cox regression")
    parameters = matrix.shape[1]

    def undetermined(reason: str) -> _Fit:
        missing = np.full(parameters, np.nan)
        return _Fit(missing, missing, np.zeros(parameters, bool), np.nan, np.nan, (reason,))

    if follow_up.events == 0 or len(matrix) <= parameters:
        return undetermined("no event, or as few patients as coefficients")
    # Covariates of similar size keep the Newton steps stable; the estimates are scaled back.
    scale = matrix.std(axis=0)
    if (scale == 0).any() or np.linalg.matrix_rank(matrix - matrix.mean(axis=0)) < parameters:
        return undetermined("a covariate is constant, or a combination of others")
    scaled = (matrix - matrix.mean(axis=0)) / scale
    model = regression.PHReg(follow_up.time, scaled, status=follow_up.is_event.astype(int), strata=strata, ties=ties)
    # Without a maximum the steps go on and on; the gradient decides whether the likelihood is at its limit.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            result = model.fit(disp=0)
        except np.linalg.LinAlgError:
            return undetermined(_STEEP)
        gradient = model.score(result.params)
        null = float(model.loglike(np.zeros(parameters)))
        coefficients, errors = np.atleast_1d(result.params) / scale, np.atleast_1d(result.bse) / scale
    if not np.abs(gradient).max() < 1e-3:
        return undetermined("the likelihood has no maximum that could be found")
    is_finite = np.abs(coefficients) * np.ptp(matrix, axis=0) < _STEEPEST
    reasons = () if is_finite.all() else (_STEEP,)
    return _Fit(coefficients, np.where(is_finite, errors, np.nan), is_finite, float(result.llf), null, reasons)


def _coefficient(value: float, error: float, ties: str, counts: Mapping[str, Any]) -> Coefficient:
    method = f"Cox, {ties}, Wald interval"
    log_ratio = Estimate(value, value - _Z * error, value + _Z * error, method, **counts)
    ratio, low, high = (float(np.exp(limit)) for limit in (value, log_ratio.ci_low, log_ratio.ci_high))
    z = value / error if error > 0 else np.nan
    test = TestResult(float(z), float(2 * stats.norm.sf(abs(z))), "Wald", warnings=counts["warnings"])
    return Coefficient(log_ratio, Estimate(ratio, low, high, method, **counts), error, test)


def chi_squared(statistic: float, df: int, method: str, reasons: tuple[str, ...] = ()) -> TestResult:
    """The result of a test whose statistic is chi-squared with `df` degrees of freedom."""
    return TestResult(float(statistic), float(stats.chi2.sf(statistic, df)), method, df, reasons)


def nested_test(full: CoxModel, reduced: CoxModel) -> TestResult:
    """The likelihood ratio test that the covariates which only the full model has add nothing.

    Raises InputError: the models are not nested, or were fitted on different patients or with other ties.
    """
    if not set(reduced.coefficients) < set(full.coefficients):
        raise InputError("the full model must have the covariates of the reduced one, and others")
    if not np.array_equal(full.is_used, reduced.is_used) or full.ties != reduced.ties:
        raise InputError(
            "nested models must be fitted on the same patients with the same ties; leave out incomplete ones"
        )
    added = len(full.coefficients) - len(reduced.coefficients)
    statistic = 2 * (full.log_likelihood - reduced.log_likelihood)
    reasons = tuple(dict.fromkeys((*full.likelihood_ratio.warnings, *reduced.likelihood_ratio.warnings)))
    return chi_squared(statistic, added, f"likelihood ratio, nested Cox models, {full.ties}", reasons)


def proportional_hazards_test(
    follow_up: FollowUp,
    covariates: Covariates,
    strata: Shaped[np.ndarray, " patient"] | None = None,
) -> dict[str, TestResult]:
    """The score test that each hazard ratio is constant over time, and that all are (`all covariates`).

    Time is transformed to one minus the Kaplan-Meier curve just before it. The test is exact to the score, as R's since
    survival 3.0; the approximation of Grambsch and Therneau (1994), which lifelines has, assumes equal variances at all events.
    """
    model = cox(follow_up, covariates, strata)
    matrix = np.stack([np.asarray(values, float) for values in covariates.values()], axis=1)[model.is_used]
    used = follow_up.of(model.is_used)
    groups = np.zeros(len(used), int) if strata is None else np.unique(strata[model.is_used], return_inverse=True)[1]
    method, parameters = "score test of proportional hazards, time by 1 - Kaplan-Meier", matrix.shape[1]
    names = [*covariates, "all covariates"]
    if not all(np.isfinite(coefficient.error) for coefficient in model.coefficients.values()):
        reasons = model.likelihood_ratio.warnings
        return {name: TestResult(np.nan, np.nan, method, warnings=reasons) for name in names}
    curve = kaplan_meier(used)
    before = np.concatenate([[1.0], curve.survival[:-1]])
    residuals, variances, times = _schoenfeld(used, matrix - matrix.mean(axis=0), model.risk, groups)
    transformed = 1 - before[np.searchsorted(curve.time, times)]
    # Centred, so that the score and the information lose no digits; the test is the same.
    transformed = transformed - transformed.mean()
    score = transformed @ residuals
    plain, mixed, squared = (np.tensordot(transformed**power, variances, 1) for power in (0, 1, 2))
    # The information on the slopes over time, after the coefficients.
    information = squared - mixed @ np.linalg.solve(plain, mixed)
    tests = {}
    for j, name in enumerate(covariates):
        own = squared[j, j] - mixed[j] @ np.linalg.solve(plain, mixed[j])
        tests[name] = chi_squared(score[j] ** 2 / own, 1, method)
    if np.linalg.matrix_rank(information) < parameters:
        return {**tests, names[-1]: TestResult(np.nan, np.nan, method, parameters, ("too few times of events",))}
    return {**tests, names[-1]: chi_squared(score @ np.linalg.solve(information, score), parameters, method)}


def _schoenfeld(
    follow_up: FollowUp, matrix: np.ndarray, risk: np.ndarray, strata: np.ndarray
) -> tuple[Float[np.ndarray, "step covariate"], Float[np.ndarray, "step covariate covariate"], np.ndarray]:
    """The sum of residuals and of covariances at each time of events in each stratum, by Efron's rule, and the times."""
    residuals, variances, times = [], [], []
    for stratum in np.unique(strata):
        inside = strata == stratum
        time, is_event, x = follow_up.time[inside], follow_up.is_event[inside], matrix[inside]
        weight = np.exp(risk[inside] - risk.mean())
        for step in np.unique(time[is_event]):
            at_risk, ends = time >= step, is_event & (time == step)
            deaths = int(ends.sum())
            mean_sum, variance = np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2)
            for k in range(deaths):
                # The events of one time leave the risk set in equal parts.
                share = weight[at_risk] * (1 - ends[at_risk] * k / deaths)
                share = share / share.sum()
                mean = share @ x[at_risk]
                mean_sum += mean
                variance += (x[at_risk] * share[:, None]).T @ x[at_risk] - np.outer(mean, mean)
            residuals.append(x[ends].sum(axis=0) - mean_sum)
            variances.append(variance)
            times.append(step)
    return np.array(residuals), np.array(variances), np.array(times)
