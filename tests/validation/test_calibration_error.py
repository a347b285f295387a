"""Calibration errors: their definition, their size under calibration, and the test that uses it."""

import numpy as np
import pytest
from scipy import stats

from crcjax.validation.calibration_error import bins_of, classwise_error, reliability_bins, top_label_error


def _calibrated(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([1.2] * 3, n)
    return (rng.random(n)[:, None] > probs.cumsum(axis=1)[:, :-1]).sum(axis=1), probs


def test_bins_are_closed_on_the_right_and_the_first_includes_zero() -> None:
    place, count = bins_of(np.array([0.0, 0.1, 0.1000001, 0.7, 0.9, 1.0]), 10)
    assert (place.tolist(), count) == ([0, 0, 1, 6, 8, 9], 10)
    # Every edge b / 15 belongs to the bin that ends there, whatever rounding does.
    assert bins_of(np.arange(1, 16) / 15)[0].tolist() == list(range(15))


def test_bins_of_equal_mass_have_equal_sizes_and_keep_ties_together() -> None:
    place, count = bins_of(np.linspace(0.3, 1, 60), 15, "mass")
    assert count == 15
    assert (np.bincount(place) == 4).all()
    tied, _ = bins_of(np.repeat([0.4, 0.6, 0.8], [10, 40, 10]), 15, "mass")
    assert np.unique(tied[10:50]).size == 1


def test_the_error_is_the_weighted_gap_of_accuracy_and_confidence() -> None:
    confidence, right = np.array([0.95, 0.9, 0.6, 0.6]), np.array([True, False, True, False])
    probs = np.column_stack([confidence, 1 - confidence])
    label = np.where(right, 0, 1)
    ece = top_label_error(label, probs, 0, bins=10, samples=50)
    assert ece.error.value == pytest.approx((2 * 0.1 + 0.05 + 0.9) / 4)
    assert ece.excess.value == pytest.approx(ece.error.value - ece.null_mean)
    largest = top_label_error(label, probs, 0, bins=10, norm="maximum", samples=50)
    assert largest.error.value == pytest.approx(0.9)
    root = top_label_error(label, probs, 0, bins=10, norm="root mean square", samples=50)
    assert root.error.value == pytest.approx(np.sqrt((2 * 0.1**2 + 0.05**2 + 0.9**2) / 4))


def test_the_classwise_error_is_the_mean_of_the_binary_ones() -> None:
    label, probs = _calibrated(0, 200)
    by_class = []
    for k in range(3):
        place, _ = bins_of(probs[:, k])
        gaps = np.bincount(place, (label == k) - probs[:, k])
        by_class.append(np.abs(gaps).sum() / 200)
    assert classwise_error(label, probs, 0, samples=50).error.value == pytest.approx(np.mean(by_class))


@pytest.mark.parametrize(
    ("n", "bins", "binning", "mean"), [(1000, 15, "width", 0.032), (300, 15, "mass", 0.072), (300, 5, "width", 0.035)]
)
def test_its_mean_under_calibration_has_the_published_size(n: int, bins: int, binning: str, mean: float) -> None:
    result = top_label_error(*_calibrated(1, n), 0, bins=bins, binning=binning, samples=400)
    # The published sizes are those of another distribution of confidence.
    assert result.null_mean == pytest.approx(mean, rel=0.25)
    assert result.null_mean < result.null_high


def test_p_values_are_uniform_on_calibrated_data_and_small_on_overconfident_data() -> None:
    p_values = [top_label_error(*_calibrated(seed, 120), seed, samples=99).test.p_value for seed in range(150)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    label, probs = _calibrated(1, 400)
    sharper = probs**3 / (probs**3).sum(axis=1, keepdims=True)
    result = top_label_error(label, sharper, 0, samples=500)
    assert result.test.p_value == pytest.approx(1 / 501)
    assert result.excess.ci_low > 0


def test_slides_of_a_patient_widen_the_null_distribution() -> None:
    label, probs = _calibrated(2, 100)
    once = top_label_error(label, probs, 0, np.arange(100), samples=300)
    four = top_label_error(np.tile(label, 4), np.tile(probs, (4, 1)), 0, np.tile(np.arange(100), 4), samples=300)
    assert four.error.value == pytest.approx(once.error.value)
    assert (four.null_mean, four.test.p_value) == pytest.approx((once.null_mean, once.test.p_value))
    assert (four.error.ci_low, four.error.ci_high) == pytest.approx((once.error.ci_low, once.error.ci_high))
    naive = top_label_error(np.tile(label, 4), np.tile(probs, (4, 1)), 0, samples=300)
    assert naive.null_mean < 0.7 * once.null_mean


def test_reliability_bins_have_intervals_and_consistency_bands() -> None:
    label, probs = _calibrated(3, 600)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == label
    bins = reliability_bins(confidence, right, 0, bins=10, samples=2000)
    assert sum(b.cases for b in bins) == 600
    for b in bins:
        inside = (confidence > b.confidence - 0.1) & (confidence < b.confidence + 0.1)
        assert right[inside].any()
        assert b.accuracy.ci_low <= b.accuracy.value <= b.accuracy.ci_high
        # The band is that of a binomial share of the bin's size.
        low, high = stats.binom.ppf([0.025, 0.975], b.cases, b.confidence) / b.cases
        assert (b.consistent_low, b.consistent_high) == pytest.approx((low, high), abs=1.6 / b.cases)
    four = reliability_bins(np.tile(confidence, 4), np.tile(right, 4), 0, np.tile(np.arange(600), 4), bins=10)
    once = reliability_bins(confidence, right, 0, np.arange(600), bins=10)
    assert [b.consistent_low for b in four] == pytest.approx([b.consistent_low for b in once])
    assert [b.accuracy.ci_high for b in four] == pytest.approx([b.accuracy.ci_high for b in once])


def test_few_cases_carry_a_warning_and_one_patient_gives_nan() -> None:
    label, probs = _calibrated(4, 60)
    assert any("too few to judge" in w for w in top_label_error(label, probs, 0, samples=20).error.warnings)
    for result in (
        top_label_error(label[:0], probs[:0], 0),
        top_label_error(label, probs, 0, np.zeros(60, int)),
        classwise_error(label, probs, 0, np.zeros(60, int)),
    ):
        assert np.isnan([result.error.value, result.excess.value, result.test.p_value, result.null_mean]).all()
        assert result.error.warnings
