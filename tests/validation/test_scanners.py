"""Concordance of scanners against published values."""

import numpy as np
import pytest
from scipy import stats

from crcjax.validation.scanners import bhapkar, bland_altman, bowker, intraclass_correlations, stuart_maxwell

EPOC = np.array([[58, 4, 11], [5, 19, 4], [9, 3, 34]])
SHROUT_FLEISS = np.array(
    [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float
)  # fmt: skip


def test_the_marginal_tests_have_the_computed_values() -> None:
    maxwell = stuart_maxwell(EPOC)
    assert (maxwell.statistic, maxwell.p_value, maxwell.df) == pytest.approx((0.4386423, 0.80306, 2), abs=1e-5)
    assert bhapkar(EPOC).statistic == pytest.approx(0.4399551, abs=1e-6)
    symmetry = bowker(EPOC)
    assert (symmetry.statistic, symmetry.p_value, symmetry.df) == pytest.approx((0.4539683, 0.92888, 3), abs=1e-5)


def test_a_class_that_neither_scanner_calls_is_left_out_of_the_marginal_tests() -> None:
    padded = np.zeros((4, 4), int)
    padded[np.ix_([0, 1, 3], [0, 1, 3])] = EPOC
    result = stuart_maxwell(padded)
    assert (result.statistic, result.df) == pytest.approx((stuart_maxwell(EPOC).statistic, 2))
    assert result.warnings
    assert stuart_maxwell(np.diag([3, 4])).p_value == 1
    for test in (stuart_maxwell, bhapkar, bowker):
        empty = test(np.zeros((3, 3), int))
        assert np.isnan(empty.p_value)
        assert empty.warnings


def test_the_correlations_of_shrout_and_fleiss_and_their_intervals() -> None:
    result = intraclass_correlations(SHROUT_FLEISS)
    for estimate, golden in (
        (result.one_way, (0.165742, -0.13, 0.72)),
        (result.agreement, (0.289764, 0.02, 0.76)),
        (result.consistency, (0.714841, 0.34, 0.95)),
    ):
        assert estimate.value == pytest.approx(golden[0], abs=1e-6)
        assert (estimate.ci_low, estimate.ci_high) == pytest.approx(golden[1:], abs=5e-3)


def test_an_offset_between_scanners_lowers_agreement_and_not_consistency() -> None:
    offset = SHROUT_FLEISS + np.array([0, 0, 0, 5])
    before, after = intraclass_correlations(SHROUT_FLEISS), intraclass_correlations(offset)
    assert after.consistency.value == pytest.approx(before.consistency.value)
    same = intraclass_correlations(np.tile(SHROUT_FLEISS[:, :1], (1, 3)))
    assert (same.agreement.value, same.agreement.warnings) == (1, ("the scanners agree exactly",))


def test_slides_with_a_missing_value_are_excluded_and_counted() -> None:
    missing = np.vstack([SHROUT_FLEISS, [np.nan, 1, 2, 3]])
    result = intraclass_correlations(missing).agreement
    assert (result.value, result.n, result.n_excluded) == pytest.approx((0.289764, 6, 1), abs=1e-6)


def test_the_limits_of_agreement_and_their_exact_intervals() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=200)
    second = first - 0.3 + rng.normal(scale=0.2, size=200)
    result = bland_altman(first, second)
    difference = first - second
    assert result.bias.value == pytest.approx(difference.mean())
    assert result.upper_limit.value == pytest.approx(difference.mean() + 1.959964 * difference.std(ddof=1))
    assert result.upper_limit.ci_low < result.upper_limit.value < result.upper_limit.ci_high
    assert result.lower_limit.ci_low < result.lower_limit.value < result.lower_limit.ci_high
    # For many slides Bland and Altman's approximation holds: the error is 1.71 s / sqrt(n).
    half = (result.upper_limit.ci_high - result.upper_limit.ci_low) / 2
    assert half == pytest.approx(
        stats.norm.ppf(0.975) * np.sqrt(1 + 1.96**2 / 2) * difference.std() / np.sqrt(200), rel=0.02
    )


def test_too_few_slides_give_nan_and_a_warning() -> None:
    assert np.isnan(intraclass_correlations(SHROUT_FLEISS[:1]).agreement.value)
    few = bland_altman(np.array([1.0, 2.0]), np.array([1.0, np.nan]))
    assert np.isnan(few.bias.value)
    assert few.bias.warnings
