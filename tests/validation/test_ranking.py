"""AUROCs and their intervals: golden values, and properties of clustering."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from crcjax.validation.ranking import (
    auroc,
    auroc_estimate,
    compare_aurocs,
    hand_till,
    macro_auroc_estimate,
    placements,
)

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


def test_a_perfect_ranking_has_the_limit_that_newcombe_s_score_gives() -> None:
    positive = np.arange(30) >= 18
    perfect, worst = auroc_estimate(positive, np.arange(30.0)), auroc_estimate(~positive, np.arange(30.0))
    low, others = perfect.ci_low, 30 / 2 - 1
    variance = low * (1 - low) * (1 + others * (1 - low) / (2 - low) + others * low / (1 + low)) / (12 * 18)
    assert (1 - low) / np.sqrt(variance) == pytest.approx(stats.norm.ppf(0.975))
    assert (perfect.value, perfect.ci_high) == (1, 1)
    assert (worst.value, worst.ci_low, worst.ci_high) == pytest.approx((0, 0, 1 - low))
    assert perfect.warnings
    four = auroc_estimate(np.tile(positive, 4), np.tile(np.arange(30.0), 4), np.tile(np.arange(30), 4))
    assert four.ci_low == pytest.approx(perfect.ci_low)
    label = np.repeat([0, 1, 2], 10)
    macro = macro_auroc_estimate(label, np.eye(3)[label])
    by_class = [auroc_estimate(label == k, np.eye(3)[label][:, k]) for k in range(3)]
    assert macro.value == 1
    assert macro.ci_low == pytest.approx(np.mean([e.ci_low for e in by_class]))


def test_scores_that_are_not_numbers_are_excluded_and_counted() -> None:
    with_gap = auroc_estimate(np.append(POSITIVE, True), np.append(FIRST, np.nan), np.arange(17))
    without = auroc_estimate(POSITIVE, FIRST, np.arange(16))
    assert (with_gap.value, with_gap.ci_low, with_gap.n_excluded) == (without.value, without.ci_low, 1)
    label, probs = _cohort(5)
    gap = np.vstack([probs, [[np.nan] * 3]])
    for function in (macro_auroc_estimate, hand_till):
        estimate = function(np.append(label, 1), gap)
        assert (estimate.value, estimate.ci_low) == pytest.approx(
            (function(label, probs).value, function(label, probs).ci_low)
        )
        assert (estimate.n, estimate.n_excluded) == (90, 1)
    compared = compare_aurocs(np.append(POSITIVE, True), np.append(FIRST, np.nan), np.append(SECOND, 0.3))
    assert compared.test.statistic == pytest.approx(-1.190322, abs=1e-6)
    assert compared.difference.n_excluded == 1


def test_hand_and_till_s_m_equals_scikit_learn_s_and_does_not_depend_on_prevalence() -> None:
    label, probs = _cohort(6)
    estimate = hand_till(label, probs)
    assert estimate.value == pytest.approx(roc_auc_score(label, probs, multi_class="ovo"))
    assert estimate.ci_low < estimate.value < estimate.ci_high
    # Ten times as many cases of class 0.
    more = np.append(np.arange(90), np.repeat(np.flatnonzero(label == 0), 9))
    assert hand_till(label[more], probs[more]).value == pytest.approx(estimate.value)
    assert macro_auroc_estimate(label[more], probs[more]).value != pytest.approx(estimate.value, abs=1e-4)


def test_prevalence_weighs_the_classes() -> None:
    label, probs = _cohort(7)
    weighted = macro_auroc_estimate(label, probs, weighted=True)
    assert weighted.value == pytest.approx(roc_auc_score(label, probs, multi_class="ovr", average="weighted"))


@pytest.mark.parametrize("function", [macro_auroc_estimate, hand_till])
def test_the_error_of_a_mean_of_areas_is_that_of_the_jackknife(function) -> None:  # type: ignore[no-untyped-def]
    label, probs = _cohort(8, 150)
    patient = np.arange(150) // 2
    left_out = [function(label[patient != p], probs[patient != p]).value for p in range(75)]
    jackknife = np.sqrt(74 / 75 * ((left_out - np.mean(left_out)) ** 2).sum())
    estimate = function(label, probs, patient)
    width = np.diff(stats.logistic.ppf([estimate.ci_low, estimate.ci_high]))[0] / 2 / stats.norm.ppf(0.975)
    assert width * estimate.value * (1 - estimate.value) == pytest.approx(jackknife, rel=0.05)


def test_clusters_enter_the_comparison_of_two_scores() -> None:
    rng = np.random.default_rng(9)
    positive, first = rng.random(80) < 0.4, rng.normal(size=80)
    second = first + rng.normal(size=80) + positive
    once = compare_aurocs(positive, first, second, np.arange(80))
    four = compare_aurocs(*(np.tile(a, 4) for a in (positive, first, second, np.arange(80))))
    assert (four.difference.ci_low, four.test.p_value) == pytest.approx((once.difference.ci_low, once.test.p_value))
    plain = compare_aurocs(positive, first, second)
    assert once.test.statistic == pytest.approx(plain.test.statistic, rel=0.03)
    # Every pair is ranked alike by one and the other way round by the other: a difference without variance.
    separated = np.arange(6) > 2
    opposite = compare_aurocs(separated, np.arange(6.0), -np.arange(6.0))
    assert (opposite.difference.value, opposite.test.p_value) == (1, pytest.approx(np.nan, nan_ok=True))
    alone = compare_aurocs(np.array([True, False, False]), np.arange(3.0), np.arange(3.0))
    assert np.isnan(alone.difference.value)


def test_an_area_without_cases_of_either_side_is_nan() -> None:
    assert auroc(POSITIVE, FIRST) == pytest.approx(0.7380952, abs=1e-6)
    assert np.isnan(auroc(np.ones(3, bool), np.arange(3.0)))
    assert np.isnan(auroc(np.zeros(3, bool), np.arange(3.0)))
