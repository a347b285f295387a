"""AUROCs and their intervals: golden values, and properties of clustering."""

import numpy as np
import pytest
from scipy import stats

from crcjax.validation.ranking import auroc_estimate, compare_aurocs, macro_auroc_estimate, placements

POSITIVE = np.array([digit == "1" for digit in "0011010011010100"])
FIRST = np.array([0.1, 0.35, 0.24, 0.8, 0.2, 0.85, 0.13, 0.85, 0.74, 0.58, 0.71, 0.25, 0.35, 0.58, 0.05, 0.4])
SECOND = np.array([0.2, 0.3, 0.5, 0.7, 0.25, 0.9, 0.3, 0.6, 0.55, 0.62, 0.45, 0.4, 0.5, 0.3, 0.1, 0.2])


def _cohort(seed: int, cases: int = 90) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(3, size=cases)
    logits = rng.normal(size=(cases, 3)) + 1.2 * np.eye(3)[label]
    return label, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_delong_has_the_published_values_with_ties() -> None:
    first, second = auroc_estimate(POSITIVE, FIRST), auroc_estimate(POSITIVE, SECOND)
    assert first.value == pytest.approx(0.7380952, abs=1e-6)
    assert second.value == pytest.approx(0.8492063, abs=1e-6)
    assert (first.ci_low, first.ci_high) == pytest.approx((0.423215, 0.915427), abs=1e-6)
    # The width on the logit scale is the error, 0.1327241, over A (1 - A).
    width = np.diff(stats.logistic.ppf([first.ci_low, first.ci_high]))[0] / 2 / stats.norm.ppf(0.975)
    assert width * first.value * (1 - first.value) == pytest.approx(0.1327241, abs=1e-6)


def test_two_scores_of_the_same_cases_are_compared_with_their_covariance() -> None:
    comparison = compare_aurocs(POSITIVE, FIRST, SECOND)
    assert comparison.test.statistic == pytest.approx(-1.190322, abs=1e-6)
    assert comparison.test.p_value == pytest.approx(0.233920, abs=1e-6)
    # The variance of the difference: the errors 0.1327241 and 0.0961978, and the covariance 0.0090782.
    error = (comparison.difference.ci_high - comparison.difference.ci_low) / 2 / stats.norm.ppf(0.975)
    assert error**2 == pytest.approx(0.1327241**2 + 0.0961978**2 - 2 * 0.0090782, abs=1e-6)
    same = compare_aurocs(POSITIVE, FIRST, 2 * FIRST)
    assert (same.difference.value, same.test.p_value) == (0, 1)
    assert same.difference.warnings


def test_placements_are_the_mean_of_all_pairs() -> None:
    value, placement = placements(POSITIVE, FIRST)
    wins = (FIRST[POSITIVE][:, None] > FIRST[~POSITIVE]) + 0.5 * (FIRST[POSITIVE][:, None] == FIRST[~POSITIVE])
    np.testing.assert_allclose(placement[POSITIVE], wins.mean(axis=1))
    np.testing.assert_allclose(placement[~POSITIVE], wins.mean(axis=0))
    assert value == pytest.approx(wins.mean())


def test_the_macro_auroc_is_the_mean_over_classes_and_its_interval_covers_the_truth() -> None:
    label, probs = _cohort(0)
    estimate = macro_auroc_estimate(label, probs)
    by_class = [auroc_estimate(label == k, probs[:, k]).value for k in range(3)]
    assert estimate.value == pytest.approx(np.mean(by_class))
    large = macro_auroc_estimate(*_cohort(1, 40_000)).value
    covered = [
        low.ci_low <= large <= low.ci_high for low in (macro_auroc_estimate(*_cohort(s)) for s in range(100, 300))
    ]
    # 95 % of 200 with three standard errors.
    assert np.mean(covered) > 0.90


def test_duplicating_every_slide_changes_neither_the_value_nor_the_clustered_interval() -> None:
    label, probs = _cohort(2)
    patient = np.arange(len(label))
    once = macro_auroc_estimate(label, probs)
    four = macro_auroc_estimate(np.tile(label, 4), np.tile(probs, (4, 1)), np.tile(patient, 4))
    assert (four.value, four.ci_low, four.ci_high) == pytest.approx((once.value, once.ci_low, once.ci_high))
    assert (four.n, four.n_clusters) == (360, 90)
    naive = macro_auroc_estimate(np.tile(label, 4), np.tile(probs, (4, 1)))
    assert naive.ci_low > four.ci_low


def test_the_order_of_rows_and_the_names_of_patients_change_nothing() -> None:
    label, probs = _cohort(3)
    patient = np.arange(len(label)) // 2
    order = np.random.default_rng(0).permutation(len(label))
    before = macro_auroc_estimate(label, probs, patient)
    after = macro_auroc_estimate(label[order], probs[order], 1000 - patient[order])
    assert (after.value, after.ci_low, after.ci_high) == pytest.approx((before.value, before.ci_low, before.ci_high))


def test_degenerate_classes_give_nan_and_a_warning() -> None:
    label, probs = _cohort(4)
    for estimate in (
        auroc_estimate(np.zeros(5, bool), np.arange(5.0)),
        auroc_estimate(np.array([True, False, False]), np.arange(3.0)),
        macro_auroc_estimate(np.minimum(label, 1), probs),
        macro_auroc_estimate(np.append(np.minimum(label, 1), 2), np.vstack([probs, probs[:1]])),
        auroc_estimate(label == 0, probs[:, 0], np.zeros(len(label), int)),
        macro_auroc_estimate(label, probs, np.zeros(len(label), int)),
    ):
        assert np.isnan([estimate.value, estimate.ci_low, estimate.ci_high]).all()
        assert estimate.warnings
    perfect = auroc_estimate(np.array([False, False, True, True]), np.arange(4.0))
    assert perfect.value == 1
    assert np.isnan(perfect.ci_low)
    assert perfect.warnings
