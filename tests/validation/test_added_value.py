"""Added value: R's likelihood ratios, planted gains, and the optimism of models with noise."""

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.added_value import added_to_classification, added_to_survival
from crcjax.validation.survival import FollowUp


@pytest.mark.real_data
def test_the_performance_status_adds_to_age_and_sex_in_lung_as_in_r(real_table) -> None:
    table = real_table("lung")
    follow_up = FollowUp(table["time"], table["status"] == 1)
    known = {name: table[name] for name in ("age", "sex")}
    result = added_to_survival(follow_up, known, {"ph.ecog": table["ph.ecog"]}, seed=0, replicates=40)
    assert (result.test.statistic, result.test.df) == pytest.approx((16.62444, 1), rel=1e-6)
    assert (result.before.value, result.after.value) == pytest.approx((0.60201142164, 0.637135493), abs=1e-9)
    assert result.difference.value == pytest.approx(0.03512407136, abs=1e-9)
    assert (result.difference.n, result.difference.n_excluded) == (227, 1)
    # The gain of one strong covariate is hardly optimistic.
    assert abs(result.corrected.value - result.difference.value) < 0.02
    shift = result.difference.value - result.corrected.value
    assert result.corrected.ci_low == pytest.approx(result.difference.ci_low - shift)


def _patients(seed: int, effect: float, n: int = 150) -> tuple[FollowUp, dict, dict]:
    rng = np.random.default_rng(seed)
    score, added = rng.normal(size=n), rng.normal(size=(5, n))
    time = rng.exponential(size=n) * np.exp(-0.6 * score - effect * added[0])
    limit = rng.uniform(0.5, 3, size=n)
    follow_up = FollowUp(np.minimum(time, limit), time < limit)
    return follow_up, {"score": score}, {f"x{i}": values for i, values in enumerate(added)}


def test_the_gain_by_noise_is_optimistic_and_corrected_downwards() -> None:
    event, known, _ = _classified(3, effect=0.0, n=120)
    noise = dict(zip("abcdef", np.random.default_rng(4).normal(size=(6, 120)), strict=True))
    result = added_to_classification(event, known, noise, seed=0, replicates=40)
    assert result.difference.value > 0.01
    # New patients show how much of the gain is real: none.
    assert result.corrected.value < result.difference.value / 2


def test_a_planted_gain_is_found_also_by_unos_c_and_within_strata() -> None:
    follow_up, known, added = _patients(7, effect=1.0)
    result = added_to_survival(
        follow_up, known, {"x0": added["x0"]}, seed=0, strata=np.arange(150) % 3, horizon=2.0, replicates=0
    )
    assert result.test.p_value < 1e-6
    assert "Uno" in result.difference.method
    assert result.difference.ci_low > 0
    assert np.isnan(result.corrected.value)


def _classified(seed: int, effect: float, n: int = 300) -> tuple[np.ndarray, dict, dict]:
    rng = np.random.default_rng(seed)
    score, logit = rng.normal(size=(2, n))
    event = rng.random(n) < 1 / (1 + np.exp(-0.8 * score - effect * logit))
    return event, {"score": score}, {"logit": logit}


def test_a_prediction_adds_to_a_logistic_model_by_the_likelihood_ratio() -> None:
    event, known, added = _classified(0, effect=1.0)
    result = added_to_classification(event, known, added, seed=0, replicates=30)
    assert result.test.p_value < 1e-6
    assert result.before.value < result.after.value
    assert result.difference.value == pytest.approx(result.after.value - result.before.value)
    assert any("descriptive" in warning for warning in result.difference.warnings)
    from statsmodels.api import Logit, add_constant

    fits = [Logit(event.astype(float), add_constant(np.column_stack(columns))).fit(disp=0) for columns in (
        [*known.values(), *added.values()], [*known.values()])]  # fmt: skip
    assert result.test.statistic == pytest.approx(2 * (fits[0].llf - fits[1].llf), abs=1e-8)


def test_the_test_of_a_prediction_without_information_is_not_significant() -> None:
    p_values = [
        added_to_classification(*_classified(seed, 0.0), seed=0, replicates=0).test.p_value for seed in range(40)
    ]
    assert np.mean(np.array(p_values) < 0.05) < 0.2


def test_what_cannot_be_fitted_is_nan_with_a_warning() -> None:
    event, known, _ = _classified(1, effect=1.0)
    separating = {"perfect": event.astype(float)}
    for wrong in (separating, {"constant": np.ones(300)}, {"copy": known["score"]}):
        result = added_to_classification(event, known, wrong, seed=0, replicates=2)
        assert np.isnan([result.test.p_value, result.difference.value, result.corrected.value]).all()
        assert result.test.warnings
    follow_up = FollowUp(np.ones(20), np.zeros(20, bool))
    nothing = added_to_survival(follow_up, {"a": np.arange(20)}, {"b": np.arange(20) % 3}, seed=0)
    assert np.isnan(nothing.difference.value)
    assert nothing.difference.warnings


def test_names_in_common_and_other_numbers_of_patients_are_refused() -> None:
    event, known, _ = _classified(2, effect=0.0)
    with pytest.raises(InputError, match="none in common"):
        added_to_classification(event, known, known, seed=0)
    follow_up, _, _ = _patients(2, effect=0.0)
    with pytest.raises(InputError, match="covariate score must have 150 values, got 3"):
        added_to_survival(follow_up, {"score": np.zeros(3)}, {"logit": np.zeros(3)}, seed=0)
