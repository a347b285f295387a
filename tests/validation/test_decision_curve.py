"""Decision curves against their formula, dcurves, and what must hold for any risk."""

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.decision_curve import decision_curve, survival_decision_curve
from crcjax.validation.survival import FollowUp, survival_at

THRESHOLDS = np.array([0.1, 0.2, 0.35, 0.5])


def _study(seed: int, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    risk = rng.beta(1.2, 2.5, size=n)
    return rng.random(n) < risk, risk


def test_the_net_benefit_is_true_positives_less_weighted_false_ones() -> None:
    event, risk = _study(0)
    curve = decision_curve(event, risk, THRESHOLDS, seed=0, replicates=200)
    for level, of_risk, of_all, advantage in zip(
        THRESHOLDS, curve.net_benefit, curve.treat_all, curve.advantage, strict=True
    ):
        odds = level / (1 - level)
        treated = risk >= level
        expected = (event & treated).mean() - (~event & treated).mean() * odds
        everyone = event.mean() - (1 - event.mean()) * odds
        assert (of_risk.value, of_all.value) == pytest.approx((expected, everyone))
        assert advantage.value == pytest.approx(expected - max(everyone, 0))
        assert of_risk.ci_low < of_risk.value < of_risk.ci_high
        assert (of_risk.n, of_risk.n_clusters) == (300, 300)


def test_a_constant_risk_is_treating_everybody_and_a_perfect_one_is_the_prevalence() -> None:
    event, _ = _study(1)
    constant = decision_curve(event, np.full(300, 0.5), THRESHOLDS, seed=0, replicates=50)
    assert [e.value for e in constant.net_benefit] == pytest.approx([e.value for e in constant.treat_all])
    perfect = decision_curve(event, event.astype(float), THRESHOLDS, seed=0, replicates=50)
    assert [e.value for e in perfect.net_benefit] == pytest.approx([event.mean()] * 4)
    assert all(estimate.ci_low > 0 for estimate in perfect.advantage)


def test_the_interval_is_about_that_of_the_binomial_where_the_odds_are_one() -> None:
    event, risk = _study(2, n=800)
    estimate = decision_curve(event, risk, np.array([0.5]), seed=0).net_benefit[0]
    by_patient = np.where(risk >= 0.5, np.where(event, 1.0, -1.0), 0.0)
    expected = 1.96 * by_patient.std() / np.sqrt(800)
    assert (estimate.ci_high - estimate.ci_low) / 2 == pytest.approx(expected, rel=0.07)


def test_copies_of_a_patients_slides_narrow_no_interval() -> None:
    event, risk = _study(3, n=100)
    plain = decision_curve(event, risk, THRESHOLDS, seed=0)
    patient = np.tile(np.arange(100), 4)
    copied = decision_curve(np.tile(event, 4), np.tile(risk, 4), THRESHOLDS, seed=0, cluster=patient)
    for one, four in zip(plain.net_benefit, copied.net_benefit, strict=True):
        assert four.value == pytest.approx(one.value)
        assert four.ci_high - four.ci_low > 0.95 * (one.ci_high - one.ci_low)


def test_without_censoring_the_survival_curve_is_the_plain_one_also_in_its_intervals() -> None:
    event, risk = _study(4)
    rng = np.random.default_rng(5)
    # Events lie before the horizon of 1, and all other times after it.
    time = np.where(event, rng.integers(1, 5, size=300) / 10, 2.0)
    survived = survival_decision_curve(FollowUp(time, event), risk, THRESHOLDS, 1.0, seed=0, replicates=300)
    plain = decision_curve(event, risk, THRESHOLDS, seed=0, replicates=300)
    for first, second in zip(survived.net_benefit, plain.net_benefit, strict=True):
        assert first.value == pytest.approx(second.value)
        assert first.ci_high - first.ci_low == pytest.approx(second.ci_high - second.ci_low, rel=0.15)


def test_with_censoring_the_share_of_events_is_that_of_the_survival_curve() -> None:
    _, risk = _study(6)
    rng = np.random.default_rng(7)
    # Times in whole months tie events with censoring.
    follow_up = FollowUp(np.ceil(rng.exponential(30, size=300) * (1.3 - risk)), rng.random(300) < 0.6)
    curve = survival_decision_curve(follow_up, risk, THRESHOLDS, 24.0, seed=0, replicates=50)
    for level, estimate in zip(THRESHOLDS, curve.net_benefit, strict=True):
        treated = risk >= level
        died = 1 - survival_at(follow_up.of(treated), 24.0).value
        expected = treated.mean() * (died - (1 - died) * level / (1 - level))
        assert estimate.value == pytest.approx(expected)
    died = 1 - survival_at(follow_up, 24.0).value
    assert curve.treat_all[1].value == pytest.approx(died - (1 - died) * 0.25)


def test_a_horizon_that_nobody_reaches_is_undetermined_and_nobody_treated_gains_nothing() -> None:
    _, risk = _study(8)
    follow_up = FollowUp(np.full(300, 2.0), np.zeros(300, bool))
    beyond = survival_decision_curve(follow_up, risk, THRESHOLDS, 3.0, seed=0, replicates=50)
    assert all(np.isnan(estimate.value) and estimate.warnings for estimate in beyond.net_benefit)
    none = survival_decision_curve(follow_up, np.zeros(300), THRESHOLDS, 1.0, seed=0, replicates=50)
    assert [estimate.value for estimate in none.net_benefit] == [0.0] * 4


def test_what_is_no_probability_is_refused() -> None:
    event, risk = _study(9)
    with pytest.raises(InputError, match="thresholds must be between 0 and 1"):
        decision_curve(event, risk, np.array([0.0, 0.5]), seed=0)
    with pytest.raises(InputError, match="risks must be probabilities"):
        decision_curve(event, risk * 3, THRESHOLDS, seed=0)
    with pytest.raises(InputError, match="horizon must be above 0"):
        survival_decision_curve(FollowUp(risk, event), risk, THRESHOLDS, 0.0, seed=0)
