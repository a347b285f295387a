"""Proper scores: scikit-learn's values, decompositions that add up, and Spiegelhalter's test."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics
from sklearn.isotonic import IsotonicRegression

from crcjax.validation.probability_scores import (
    brier_decomposition,
    brier_score,
    brier_skill,
    log_loss,
    multiclass_spiegelhalter_test,
    spiegelhalter_test,
)


def _sample(seed: int, n: int = 150) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([1.0] * 3, n)
    return (rng.random(n)[:, None] > probs.cumsum(axis=1)[:, :-1]).sum(axis=1), probs


def test_the_brier_score_is_the_sum_over_classes_as_in_scikit_learn() -> None:
    assert brier_score(np.array([0]), np.array([[0.5, 0.25, 0.25]])).value == pytest.approx(0.375)
    label, probs = _sample(0)
    estimate = brier_score(label, probs)
    assert estimate.value == pytest.approx(metrics.brier_score_loss(label, probs, scale_by_half=False))
    scores = ((probs - np.eye(3)[label]) ** 2).sum(axis=1)
    assert estimate.ci_high - estimate.value == pytest.approx(stats.norm.ppf(0.975) * scores.std() / np.sqrt(150))


def test_the_log_loss_is_scikit_learn_s_and_counts_what_it_clips() -> None:
    label, probs = _sample(1)
    assert log_loss(label, probs).value == pytest.approx(metrics.log_loss(label, probs))
    certain = log_loss(np.array([0, 0]), np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert certain.value == pytest.approx(-np.log(1e-15) / 2)
    assert certain.warnings == ("1 probabilities below 1e-15 are clipped",)


def test_skill_is_measured_against_the_prevalence_and_its_error_is_that_of_the_jackknife() -> None:
    label, probs = _sample(2)
    share = np.bincount(label) / 150
    estimate = brier_skill(label, probs)
    scores = ((probs - np.eye(3)[label]) ** 2).sum(axis=1)
    assert estimate.value == pytest.approx(1 - scores.mean() / (1 - (share**2).sum()))
    assert brier_skill(label, np.tile(share, (150, 1))).value == pytest.approx(0)
    left_out = [brier_skill(np.delete(label, i), np.delete(probs, i, axis=0)).value for i in range(150)]
    jackknife = np.sqrt(149 / 150 * ((left_out - np.mean(left_out)) ** 2).sum())
    assert (estimate.ci_high - estimate.value) / stats.norm.ppf(0.975) == pytest.approx(jackknife, rel=0.02)
    assert np.isnan(brier_skill(np.zeros(4, int), probs[:4]).value)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_murphy_s_parts_are_those_of_the_bins_and_the_residual_is_what_is_left(binning: str) -> None:
    label, probs = _sample(3)
    event, prob = label == 0, probs[:, 0]
    parts = brier_decomposition(event, prob, 0, bins=5, binning=binning, replicates=100)
    edges = np.arange(1, 5) / 5 if binning == "width" else np.sort(prob)[[29, 59, 89, 119]]
    place = np.searchsorted(edges, prob)
    size = np.bincount(place)
    frequency, mean = np.bincount(place, event) / size, np.bincount(place, prob) / size
    assert parts.reliability.value == pytest.approx((size * (mean - frequency) ** 2).sum() / 150)
    assert parts.resolution.value == pytest.approx((size * (frequency - event.mean()) ** 2).sum() / 150)
    assert parts.uncertainty.value == pytest.approx(event.mean() * (1 - event.mean()))
    assert parts.brier.value == pytest.approx(((prob - event) ** 2).mean())
    total = parts.reliability.value - parts.resolution.value + parts.uncertainty.value + parts.residual.value
    assert total == pytest.approx(parts.brier.value)


def test_probabilities_that_take_few_values_leave_no_residual() -> None:
    rng = np.random.default_rng(4)
    prob = rng.choice([0.1, 0.4, 0.9], 200)
    parts = brier_decomposition(rng.random(200) < prob, prob, 0, bins=10, binning="width", replicates=50)
    assert parts.residual.value == pytest.approx(0, abs=1e-12)


def test_without_bins_the_frequency_is_isotonic_and_the_parts_add_up() -> None:
    label, probs = _sample(5)
    event, prob = label == 0, probs[:, 0].round(1)
    parts = brier_decomposition(event, prob, 0, bins=None, replicates=60)
    recalibrated = IsotonicRegression().fit(prob, event).predict(prob)
    after = ((recalibrated - event) ** 2).mean()
    assert parts.reliability.value == pytest.approx(((prob - event) ** 2).mean() - after)
    assert parts.resolution.value == pytest.approx(event.mean() * (1 - event.mean()) - after)
    assert parts.residual.value == pytest.approx(0, abs=1e-12)
    for estimate in (parts.brier, parts.reliability, parts.resolution):
        assert estimate.ci_low <= estimate.value <= estimate.ci_high
    once = brier_decomposition(event, prob, 0, np.arange(150), bins=None, replicates=60).reliability
    four = brier_decomposition(
        np.tile(event, 4), np.tile(prob, 4), 0, np.tile(np.arange(150), 4), bins=None, replicates=60
    ).reliability
    assert (four.ci_low, four.ci_high) == pytest.approx((once.ci_low, once.ci_high))


def test_spiegelhalter_s_z_is_the_published_formula_and_finds_overconfidence() -> None:
    label, probs = _sample(6)
    event, prob = label == 0, probs[:, 0]
    z = ((event - prob) * (1 - 2 * prob)).sum() / np.sqrt(((1 - 2 * prob) ** 2 * prob * (1 - prob)).sum())
    result = spiegelhalter_test(event, prob)
    assert (result.statistic, result.p_value) == pytest.approx((z, 2 * stats.norm.sf(abs(z))))
    sharper = prob**2 / (prob**2 + (1 - prob) ** 2)
    assert spiegelhalter_test(event, sharper).statistic > 2
    # With two classes the test over all classes is the binary one.
    both = multiclass_spiegelhalter_test(event.astype(int), np.column_stack([1 - prob, prob]))
    assert (both.statistic, both.p_value) == pytest.approx((z, result.p_value))


def test_the_clustered_test_does_not_count_copies() -> None:
    label, probs = _sample(7)
    event, prob, patient = label == 0, probs[:, 0], np.arange(150)
    once, four = (
        spiegelhalter_test(np.tile(event, m), np.tile(prob, m), np.tile(patient, m)).statistic for m in (1, 4)
    )
    assert four == pytest.approx(once)
    assert once == pytest.approx(spiegelhalter_test(event, prob).statistic, rel=0.15)


def test_no_cases_and_certain_probabilities_give_nan() -> None:
    nothing = np.zeros((0, 3))
    for estimate in (
        brier_score(np.zeros(0, int), nothing),
        log_loss(np.zeros(0, int), nothing),
        brier_skill(np.zeros(0, int), nothing),
        brier_decomposition(np.zeros(0, bool), np.zeros(0), 0).brier,
    ):
        assert np.isnan(estimate.value)
        assert estimate.warnings
    certain = spiegelhalter_test(np.array([True, False]), np.array([1.0, 0.0]))
    assert np.isnan(certain.statistic)
    assert certain.warnings
    assert np.isnan(multiclass_spiegelhalter_test(np.array([0]), np.array([[1.0, 0.0]])).p_value)
    assert np.isnan(spiegelhalter_test(np.zeros(0, bool), np.zeros(0), np.zeros(0, int)).p_value)
