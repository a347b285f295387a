"""What a prediction adds to what is known already, such as a clinical score: nested models, C or AUROC, and their optimism.

The likelihood ratio is the test; differences of C and of AUROC say how large the gain is. Models fitted and evaluated on the
same patients look too good, the larger one more: the corrected difference subtracts the optimism that a bootstrap shows
(Harrell et al. 1996). Needs the extra `stats`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from crcjax.environment import require_extra
from crcjax.errors import InputError
from crcjax.validation.concordance import compare_concordance, harrell_c, uno_c
from crcjax.validation.cox import EVENTS_PER_COEFFICIENT, Covariates, chi_squared, cox, nested_test
from crcjax.validation.cox_slopes import cox_slopes
from crcjax.validation.estimate import Estimate, TestResult, undetermined
from crcjax.validation.ranking import auroc_estimate, compare_aurocs
from crcjax.validation.survival import FollowUp

Rows = Int[np.ndarray, " row"] | Bool[np.ndarray, " patient"]
# A coefficient of 15 over a covariate's range means that it separates the classes.
_STEEPEST = 15.0


@dataclass(frozen=True)
class AddedValue:
    """What covariates add to a model.

    Attributes:
      test: the likelihood ratio test that they add nothing.
      before: C, or AUROC, of the model without them.
      after: that of the model with them.
      difference: after minus before.
      corrected: the difference less its optimism; its interval is that of the difference, shifted.
    """

    test: TestResult
    before: Estimate
    after: Estimate
    difference: Estimate
    corrected: Estimate


def added_to_survival(
    follow_up: FollowUp,
    known: Covariates,
    added: Covariates,
    seed: int,
    strata: Shaped[np.ndarray, " patient"] | None = None,
    horizon: float | None = None,
    *,
    replicates: int = 200,
) -> AddedValue:
    """What covariates such as the subtype add to a Cox model, on patients of whom all covariates are known.

    Args:
      follow_up: the times.
      known: covariates of the clinical score.
      added: covariates of the prediction, by other names.
      seed: the seed of the bootstrap.
      strata: groups with baseline hazards of their own.
      horizon: if given, C is Uno's to it; otherwise Harrell's.
      replicates: resamples for the optimism; 0 leaves it undetermined.
    """
    both = _joined(known, added)
    complete = _complete(both, len(follow_up))
    used, covariates = follow_up.of(complete), {name: values[complete] for name, values in both.items()}
    used_strata = None if strata is None else strata[complete]
    reduced = {name: covariates[name] for name in known}
    matrices = [np.stack(list(columns.values()), axis=1) for columns in (covariates, reduced)]

    def c_difference(rows: Rows, first: np.ndarray, second: np.ndarray) -> float:
        return compare_concordance(used.of(rows), first[rows], second[rows], horizon).value

    def risks(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """The risks of all patients, by the models with and without the added covariates, fitted on some rows."""
        of_rows = None if used_strata is None else used_strata[rows]
        first, second = (matrix @ cox_slopes(used.of(rows), matrix[rows], of_rows) for matrix in matrices)
        return first, second

    full_model, reduced_model = cox(used, covariates, used_strata), cox(used, reduced, used_strata)
    test = nested_test(full_model, reduced_model)
    excluded = int((~complete).sum())
    if not (np.isfinite(full_model.risk).all() and np.isfinite(reduced_model.risk).all()):
        return _undetermined(test, "C of Cox models", len(used), excluded)
    estimates = [
        harrell_c(used, model.risk) if horizon is None else uno_c(used, model.risk, horizon)
        for model in (reduced_model, full_model)
    ]
    difference = compare_concordance(used, full_model.risk, reduced_model.risk, horizon)
    corrected = _corrected(difference, risks, c_difference, len(used), seed, replicates)
    return _result(test, [*estimates, difference, corrected], excluded)


def added_to_classification(
    event: Bool[np.ndarray, " patient"],
    known: Covariates,
    added: Covariates,
    seed: int,
    *,
    replicates: int = 200,
) -> AddedValue:
    """What covariates add to a logistic model of an event that is known for every patient, such as the response.

    Arguments as for `added_to_survival`. Give probabilities as logits: log(p / (1 - p)).
    """
    both = _joined(known, added)
    complete = _complete(both, len(event))
    used, columns = event[complete], {name: values[complete] for name, values in both.items()}
    matrices = [np.stack([columns[name] for name in names], axis=1) for names in (both, known)]
    fits = [_logistic(used, matrix) for matrix in matrices]
    excluded, method = int((~complete).sum()), "likelihood ratio, nested logistic models"
    events = int(min(used.sum(), (~used).sum()))
    few = (f"{events} events for {len(both)} coefficients are fewer than 10 for each",)
    reasons: tuple[str, ...] = few if events < EVENTS_PER_COEFFICIENT * len(both) else ()
    full, reduced = fits
    if full is None or reduced is None:
        reasons += ("a covariate is constant, a combination of others, or separates the classes",)
        test = TestResult(np.nan, np.nan, method, len(added), reasons)
        return _undetermined(test, "AUROC of logistic models", len(used), excluded)
    test = chi_squared(2 * (full.log_likelihood - reduced.log_likelihood), len(added), method, reasons)
    first, second = (matrix @ fit.slopes for matrix, fit in zip(matrices, (full, reduced), strict=True))

    def risks(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        refitted = [_logistic(used[rows], matrix[rows]) for matrix in matrices]
        missing = np.full(len(used), np.nan)
        of_all = [
            missing if fit is None else matrix @ fit.slopes for matrix, fit in zip(matrices, refitted, strict=True)
        ]
        return of_all[0], of_all[1]

    def difference_of(rows: Rows, first: np.ndarray, second: np.ndarray) -> float:
        return compare_aurocs(used[rows], first[rows], second[rows]).difference.value

    difference = compare_aurocs(used, first, second).difference
    reason = (
        "DeLong's interval of nested models on their own patients is only descriptive; the test is the likelihood ratio"
    )
    difference = replace(difference, warnings=(*difference.warnings, reason))
    corrected = _corrected(difference, risks, difference_of, len(used), seed, replicates)
    return _result(test, [auroc_estimate(used, second), auroc_estimate(used, first), difference, corrected], excluded)


def _joined(known: Covariates, added: Covariates) -> dict[str, np.ndarray]:
    if not known or not added or set(known) & set(added):
        raise InputError("the known and the added covariates must have at least one name each, and none in common")
    return {name: np.asarray(values, float) for name, values in {**known, **added}.items()}


def _complete(covariates: Covariates, patients: int) -> Bool[np.ndarray, " patient"]:
    for name, values in covariates.items():
        if len(values) != patients:
            raise InputError(f"covariate {name} must have {patients} values, got {len(values)}")
    return np.all([np.isfinite(values) for values in covariates.values()], axis=0)


@dataclass(frozen=True)
class _Logistic:
    slopes: Float[np.ndarray, " covariate"]
    log_likelihood: float


def _logistic(event: np.ndarray, matrix: Float[np.ndarray, "patient covariate"]) -> _Logistic | None:
    """The maximum-likelihood fit; None if the data do not determine it."""
    discrete = require_extra("statsmodels.discrete.discrete_model", "stats", "logistic regression")
    scale = matrix.std(axis=0) if len(matrix) else np.zeros(matrix.shape[1])
    if event.all() or not event.any() or (scale == 0).any():
        return None
    scaled = (matrix - matrix.mean(axis=0)) / scale
    if np.linalg.matrix_rank(scaled) < matrix.shape[1]:
        return None
    model = discrete.Logit(event.astype(float), np.column_stack([np.ones(len(matrix)), scaled]))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            fitted = model.fit(disp=0, maxiter=100)
        except np.linalg.LinAlgError:
            return None
    slopes = fitted.params[1:] / scale
    if not fitted.mle_retvals["converged"] or not (np.abs(slopes) * np.ptp(matrix, axis=0) < _STEEPEST).all():
        return None
    return _Logistic(slopes, float(fitted.llf))


def _corrected(
    difference: Estimate,
    risks: Callable[[Rows], tuple[np.ndarray, np.ndarray]],
    statistic: Callable[[Rows, np.ndarray, np.ndarray], float],
    n: int,
    seed: int,
    replicates: int,
) -> Estimate:
    """The difference less its optimism: on a resample on which both models were fitted, against all patients."""
    method, rng, everyone = f"{difference.method}, less optimism", np.random.default_rng([seed, 25]), np.arange(n)
    optimism = []
    for _ in range(replicates):
        rows = rng.integers(n, size=n)
        first, second = risks(rows)
        if np.isfinite(first).all() and np.isfinite(second).all():
            optimism.append(statistic(rows, first, second) - statistic(everyone, first, second))
    usable = np.array([value for value in optimism if np.isfinite(value)])
    if len(usable) < max(1, replicates / 2):
        reason = "too few resamples in which both models can be fitted" if replicates else "no resamples were asked for"
        return undetermined(method, n, reason)
    reasons = difference.warnings
    if len(usable) < replicates:
        reasons += (f"{replicates - len(usable)} resamples, in which a model cannot be fitted, are omitted",)
    shift = float(usable.mean())
    moved: dict[str, Any] = {name: getattr(difference, name) - shift for name in ("value", "ci_low", "ci_high")}
    return replace(difference, **moved, method=f"{method}, {replicates} resamples", warnings=reasons)


def _undetermined(test: TestResult, method: str, n: int, excluded: int) -> AddedValue:
    reason = undetermined(method, n, "; ".join(test.warnings) or "a model cannot be fitted")
    return _result(test, [reason] * 4, excluded)


def _result(test: TestResult, estimates: list[Estimate], excluded: int) -> AddedValue:
    before, after, difference, corrected = (replace(estimate, n_excluded=excluded) for estimate in estimates)
    return AddedValue(test, before, after, difference, corrected)
