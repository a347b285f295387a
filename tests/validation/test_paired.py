"""Paired comparisons: Tango's interval and what follows from it."""

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.estimate import Estimate
from crcjax.validation.paired import mcnemar, non_inferiority, paired_difference


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
