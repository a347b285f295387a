"""Paired comparisons: Tango's interval and what follows from it."""

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.estimate import Estimate
from crcjax.validation.paired import (
    is_equivalent,
    mcnemar,
    non_inferiority,
    non_inferiority_test,
    paired_difference,
    paired_difference_of_units,
)


@pytest.mark.parametrize(
    ("only_first", "only_second", "n", "low", "high"),
    [(4, 9, 100, -0.129486, 0.023324), (12, 2, 60, 0.051176, 0.292456)],
)
def test_tango_s_interval_has_the_published_values(
    only_first: int, only_second: int, n: int, low: float, high: float
) -> None:
    estimate = paired_difference(only_first, only_second, n)
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((low, high), abs=1e-6)
    swapped = paired_difference(only_second, only_first, n)
    assert (-swapped.ci_high, -swapped.ci_low) == pytest.approx((low, high), abs=1e-6)


def test_the_interval_covers_the_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    cells = rng.multinomial(80, [0.15, 0.05, 0.8], size=400)
    covered = [e.ci_low <= 0.1 <= e.ci_high for e in (paired_difference(int(b), int(c), 80) for b, c, _ in cells)]
    assert np.mean(covered) > 0.92


def test_without_discordant_cases_the_interval_still_has_a_width() -> None:
    estimate = paired_difference(0, 0, 50)
    assert estimate.value == 0
    assert -0.1 < estimate.ci_low < 0 < estimate.ci_high < 0.1
    assert paired_difference(10, 0, 10).ci_high == 1


def test_non_inferiority_needs_the_lower_limit_above_the_margin() -> None:
    difference = Estimate(0.0, -0.04, 0.04, "Tango", 100)
    assert non_inferiority(difference, 0.05).is_shown
    assert not non_inferiority(difference, 0.04).is_shown
    assert not non_inferiority(paired_difference(0, 0, 0), 0.5).is_shown
    with pytest.raises(InputError, match="margin must be above 0"):
        non_inferiority(difference, 0.0)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    # 2 * (1 + 5) / 2**5 with one of five discordant cases.
    assert mcnemar(1, 4).p_value == pytest.approx(0.375)
    assert mcnemar(0, 0).p_value == 1


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(InputError, match="at most n together, got 6 and 5 of 10"):
        paired_difference(6, 5, 10)


def test_units_of_their_own_patients_have_the_plain_interval_and_copies_change_nothing() -> None:
    first, second = np.arange(100) % 5 > 0, np.arange(100) % 7 > 0
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    plain = paired_difference(b, c, 100)
    assert paired_difference_of_units(first, second) == plain
    for copies in (1, 3):
        arrays = [np.tile(a, copies) for a in (first, second, np.arange(100))]
        clustered = paired_difference_of_units(*arrays)
        assert (clustered.value, clustered.ci_low, clustered.ci_high) == pytest.approx(
            (plain.value, plain.ci_low, plain.ci_high), abs=1e-9
        )
        assert (clustered.n, clustered.n_clusters) == (100 * copies, 100)


def test_correlated_units_widen_the_interval_and_opposite_ones_never_narrow_it() -> None:
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(40), 4)
    first, second = (np.repeat(rng.random(40) < 0.7, 4) for _ in range(2))
    assert paired_difference_of_units(first, second, patient).ci_low < paired_difference_of_units(first, second).ci_low
    opposite = np.tile([True, False], 30)
    balanced = paired_difference_of_units(opposite, ~opposite, np.repeat(np.arange(30), 2))
    assert balanced.ci_high == pytest.approx(paired_difference_of_units(opposite, ~opposite).ci_high)


def test_systems_that_never_differ_have_the_interval_of_the_patients() -> None:
    same = np.tile([True, False, True, True], 10)
    clustered = paired_difference_of_units(same, same, np.repeat(np.arange(10), 4))
    ten = paired_difference(0, 0, 10)
    assert (clustered.value, clustered.ci_low, clustered.ci_high) == pytest.approx((0, ten.ci_low, ten.ci_high))
    nothing = paired_difference_of_units(same[:0], same[:0], np.zeros(0, int))
    assert np.isnan(nothing.value)


def test_the_test_of_non_inferiority_agrees_with_the_interval() -> None:
    for b, c in ((4, 9), (12, 2), (3, 3)):
        interval = paired_difference(b, c, 100)
        for margin in (0.02, 0.1, 0.129486, 0.2):
            test = non_inferiority_test(b, c, 100, margin)
            assert (test.p_value < 0.025) == (interval.ci_low > -margin)
    # The published lower limit is where the one-sided p-value is 0.025.
    assert non_inferiority_test(4, 9, 100, 0.129486).p_value == pytest.approx(0.025, abs=1e-5)
    assert np.isnan(non_inferiority_test(0, 0, 0, 0.1).p_value)


def test_equivalence_needs_the_whole_interval_within_the_margin() -> None:
    difference = Estimate(0.0, -0.04, 0.03, "Tango", 100)
    assert is_equivalent(difference, 0.05)
    assert not is_equivalent(difference, 0.04)
    assert not is_equivalent(Estimate(0.0, -0.03, 0.05, "Tango", 100), 0.05)
    with pytest.raises(InputError, match="margin must be above 0"):
        is_equivalent(difference, -0.1)
