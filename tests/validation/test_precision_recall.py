"""Average precision: scikit-learn's value, the published quick interval, and the bootstrap."""

import numpy as np
import pytest
from scipy import special, stats
from sklearn.metrics import average_precision_score

from crcjax.validation.precision_recall import average_precision, logit_interval

Z = stats.norm.ppf(0.975)


def _scores(seed: int, n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.3
    return positive, (rng.normal(size=n) + positive).round(1)


def test_the_area_is_the_step_sum_and_the_baseline_the_prevalence() -> None:
    positive, score = _scores(0)
    result = average_precision(positive, score, 0, replicates=500)
    assert result.area.value == pytest.approx(average_precision_score(positive, score))
    assert result.baseline.value == pytest.approx(positive.mean())
    assert result.area.ci_low < result.area.value < result.area.ci_high
    assert "stratified" in result.area.method
    constant = average_precision(positive, np.zeros(120), 0, replicates=50)
    assert constant.area.value == pytest.approx(positive.mean())


def test_the_interval_covers_the_truth_and_slides_count_by_patient() -> None:
    truth = average_precision(*_scores(1, 100_000), 0, replicates=2).area.value
    covered = []
    for seed in range(100, 200):
        area = average_precision(*_scores(seed), 0, replicates=300).area
        covered.append(area.ci_low <= truth <= area.ci_high)
    assert np.mean(covered) > 0.86
    positive, score = _scores(2)
    once = average_precision(positive, score, 0, replicates=200).area
    four = average_precision(
        np.tile(positive, 4), np.tile(score, 4), 0, np.tile(np.arange(120), 4), replicates=200
    ).area
    assert (four.ci_low, four.ci_high) == pytest.approx((once.ci_low, once.ci_high))
    assert four.n_clusters == 120


def test_patients_are_resampled_within_class_and_stratum() -> None:
    positive, score = np.arange(12) % 2 == 0, np.arange(12.0)
    patient, stratum = np.arange(12) // 3, np.repeat([0, 1], 6)
    result = average_precision(positive, score, 0, patient, stratum, replicates=50, interval="bca")
    assert (result.area.n, result.area.n_clusters) == (12, 4)


def test_missing_scores_are_excluded_and_a_single_class_gives_nan() -> None:
    positive, score = _scores(3)
    gap = average_precision(np.append(positive, True), np.append(score, np.nan), 0, replicates=50).area
    assert (gap.n, gap.n_excluded, gap.value) == (
        120,
        1,
        average_precision(positive, score, 0, replicates=50).area.value,
    )
    for single in (np.zeros(5, bool), np.ones(5, bool)):
        result = average_precision(single, np.arange(5.0), 0)
        assert np.isnan([result.area.value, result.baseline.value]).all()
        assert result.area.warnings


def test_the_quick_interval_is_binomial_on_the_logit_scale() -> None:
    estimate = logit_interval(0.6, 40)
    error = 1 / np.sqrt(40 * 0.6 * 0.4)
    limits = special.expit(special.logit(0.6) + np.array([-1, 1]) * Z * error)
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx(tuple(limits))
    for area, positives in ((1.0, 40), (0.5, 0)):
        assert np.isnan(logit_interval(area, positives).value)
