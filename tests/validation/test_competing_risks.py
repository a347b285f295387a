"""Fine and Gray's model: R's values, Cox's where no cause competes, and what competing causes change."""

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.competing_risks import fine_gray
from crcjax.validation.cox import cox
from crcjax.validation.survival import FollowUp


def _table() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """120 patients with tied times, 59 events of cause 1, 27 of cause 2, by whole-number formulas."""
    i = np.arange(120)
    x, z = ((i * 37) % 101) / 50 - 1, ((i * 53) % 7 > 3).astype(float)
    cause = np.array([0, 1, 2, 1, 0, 2, 1])[(i * 11 + i // 7) % 7]
    return 1.0 + (i * 29) % 41, np.where((x > 0.3) & (cause == 2), 1, cause), {"x": x, "z": z}


def test_the_coefficients_and_errors_are_those_of_r() -> None:
    # survival 3.5.3: finegray, then coxph(weights = fgwt, ties = "breslow", cluster = id).
    model = fine_gray(*_table())
    values = [(c.log_hazard_ratio.value, c.error) for c in model.coefficients.values()]
    expected = [(1.304061688494, 0.244782704702), (-0.035075633566, 0.235876137160)]
    assert np.array(values) == pytest.approx(np.array(expected), abs=1e-11)
    assert model.events == 59
    ratio = model.coefficients["x"].hazard_ratio
    assert (ratio.value, ratio.ci_low) == pytest.approx(
        np.exp([1.304061688494, 1.304061688494 - 1.959963985 * 0.244782704702])
    )


def test_without_a_competing_cause_the_coefficients_are_those_of_cox() -> None:
    time, cause, covariates = _table()
    alone = np.where(cause == 2, 0, cause)
    model, plain = fine_gray(time, alone, covariates), cox(FollowUp(time, alone == 1), covariates, ties="breslow")
    for name in covariates:
        expected = plain.coefficients[name].log_hazard_ratio.value
        assert model.coefficients[name].log_hazard_ratio.value == pytest.approx(expected, abs=1e-9)


def test_a_covariate_that_only_raises_the_other_cause_lowers_the_incidence_of_this_one() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(2, size=3000).astype(float)
    first, second, censored = (
        rng.exponential(1, 3000),
        rng.exponential(np.where(x == 1, 0.4, 4)),
        rng.uniform(0, 5, 3000),
    )
    time = np.minimum(np.minimum(first, second), censored)
    cause = np.where(censored == time, 0, np.where(first == time, 1, 2))
    effect = fine_gray(time, cause, {"x": x}).coefficients["x"].log_hazard_ratio
    assert effect.ci_high < 0
    rate = cox(FollowUp(time, cause == 1), {"x": x}).coefficients["x"].log_hazard_ratio
    assert rate.ci_low < 0 < rate.ci_high


def test_the_order_of_patients_and_the_units_of_covariates_change_nothing() -> None:
    time, cause, covariates = _table()
    order = np.random.default_rng(1).permutation(120)
    model = fine_gray(time, cause, covariates)
    moved = fine_gray(time[order], cause[order], {"x": 1000 * covariates["x"][order] + 5, "z": covariates["z"][order]})
    assert moved.coefficients["x"].log_hazard_ratio.value * 1000 == pytest.approx(
        model.coefficients["x"].log_hazard_ratio.value
    )
    assert moved.coefficients["z"].error == pytest.approx(model.coefficients["z"].error)


def test_what_is_not_determined_is_nan_with_a_reason_and_missing_covariates_are_counted() -> None:
    time, cause, covariates = _table()
    for wrong in ({"a": np.ones(120)}, {"a": covariates["x"], "b": 2 * covariates["x"]}):
        estimate = fine_gray(time, cause, wrong).coefficients["a"].log_hazard_ratio
        assert np.isnan(estimate.value)
        assert estimate.warnings
    nobody = fine_gray(time, np.zeros(120, int), covariates).coefficients["x"].log_hazard_ratio
    assert np.isnan(nobody.value)
    last = {"a": (time == 1).astype(float)}
    separated = fine_gray(time, np.where(time == 1, 1, 2), last).coefficients["a"].log_hazard_ratio
    assert np.isnan(separated.value)
    assert "separates" in separated.warnings[0]
    gaps = covariates["x"].copy()
    gaps[:4] = np.nan
    assert fine_gray(time, cause, {"x": gaps}).coefficients["x"].log_hazard_ratio.n_excluded == 4


def test_wrong_causes_and_no_covariates_are_refused() -> None:
    time, cause, covariates = _table()
    with pytest.raises(InputError, match="there must be a covariate"):
        fine_gray(time, cause, {})
    with pytest.raises(InputError, match="causes must be 0"):
        fine_gray(time, cause - 1, covariates)
