"""Proportions: published intervals, agreement with SciPy and statsmodels, and clusters."""

import numpy as np
import pytest
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.proportions import clopper_pearson, proportion, simultaneous_proportions, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (111, 147, 0.6796734, 0.8175373),
        (81, 98, 0.739649, 0.888779),
        (0, 28, 0, 0.120643),
        (28, 28, 0.879357, 1),
        (19, 28, 0.493388, 0.820668),
    ],
)
def test_wilson_has_the_published_limits(successes: int, n: int, low: float, high: float) -> None:
    estimate = wilson(successes, n)
    assert (estimate.value, estimate.n) == (successes / n, n)
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 98, 0.736850, 0.895576), (0, 28, 0, 0.123436), (112, 119, 0.882554, 0.976025)],
)
def test_clopper_pearson_has_the_published_limits(successes: int, n: int, low: float, high: float) -> None:
    estimate = clopper_pearson(successes, n)
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((low, high), abs=1e-6)


def test_both_equal_scipy_s_for_every_count() -> None:
    for n in (1, 2, 7, 40):
        for successes in range(n + 1):
            test = stats.binomtest(successes, n)
            for function, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
                limits, estimate = test.proportion_ci(method=method), function(successes, n)
                assert (estimate.ci_low, estimate.ci_high) == pytest.approx((limits.low, limits.high), abs=1e-12)


def test_the_ends_are_exactly_zero_and_one() -> None:
    for function in (wilson, clopper_pearson):
        assert function(0, 28).ci_low == 0.0
        assert function(28, 28).ci_high == 1.0


def test_patients_with_one_unit_each_have_the_plain_interval() -> None:
    success = np.arange(50) % 3 == 0
    for exact in (False, True):
        plain, clustered = proportion(success, exact=exact), proportion(success, np.arange(50), exact=exact)
        assert (clustered.ci_low, clustered.ci_high) == pytest.approx((plain.ci_low, plain.ci_high), abs=1e-12)
        assert clustered.n_clusters == 50


def test_four_copies_of_every_unit_leave_the_interval_as_it_was() -> None:
    for success in (np.arange(50) % 3 == 0, np.zeros(50, bool), np.ones(50, bool)):
        once, four = proportion(success), proportion(np.tile(success, 4), np.tile(np.arange(50), 4))
        assert (four.ci_low, four.ci_high) == pytest.approx((once.ci_low, once.ci_high), abs=1e-12)
        assert (four.n, four.n_clusters) == (200, 50)


def test_units_of_a_patient_that_differ_never_count_more_than_themselves() -> None:
    success = np.tile([True, False], 20)
    clustered, plain = proportion(success, np.repeat(np.arange(20), 2)), proportion(success)
    assert (clustered.ci_low, clustered.ci_high) == pytest.approx((plain.ci_low, plain.ci_high))


def test_goodman_s_intervals_equal_the_formula_with_a_bonferroni_quantile() -> None:
    counts = np.array([58, 4, 11, 0])
    quantile = stats.chi2.ppf(1 - 0.05 / 4, 1)
    for count, estimate in zip(counts, simultaneous_proportions(counts), strict=True):
        share = count / 73
        root = np.sqrt(quantile * (quantile + 4 * count * (1 - share)))
        low, high = ((quantile + 2 * count + sign * root) / (146 + 2 * quantile) for sign in (-1, 1))
        assert (estimate.value, estimate.n) == (pytest.approx(share), 73)
        assert (estimate.ci_low, estimate.ci_high) == pytest.approx((low, high), abs=1e-12)
        assert estimate.ci_high > wilson(int(count), 73).ci_high


def test_no_cases_give_nan_and_impossible_counts_an_error() -> None:
    for estimate in (wilson(0, 0), proportion(np.zeros(0, bool)), *simultaneous_proportions(np.zeros(3, int))):
        assert np.isnan([estimate.value, estimate.ci_low, estimate.ci_high]).all()
        assert estimate.warnings
    with pytest.raises(InputError, match="got 5 of 4"):
        wilson(5, 4)
    with pytest.raises(InputError, match="got -1 of 4"):
        clopper_pearson(-1, 4)
