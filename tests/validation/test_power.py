"""Sample sizes against computed values and against simulated studies."""

import numpy as np
import pytest
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.power import (
    auroc_error,
    detectable_interaction,
    events_for_hazard_ratio,
    interval_of_sites,
    power_above_bound,
    recruitment,
    sites_above_bound,
    size_above_bound,
    size_for_auroc_above,
    size_for_auroc_width,
    size_for_non_inferiority,
    size_for_width,
)
from crcjax.validation.sites import pool_sites


def test_widths_need_the_computed_numbers() -> None:
    assert size_for_width(0.8, 0.05).n == 245
    of_class = size_for_width(0.75, 0.10)
    assert of_class.n == 69
    # 69 / 0.19 is 363.2 patients, of whom there must be 364.
    assert recruitment(of_class, share=0.19).patients == 364


def _plain_power(expected: float, bound: float, n: int) -> float:
    """The power as a sum over all numbers of successes, each with Wilson's interval by its textbook formula."""
    successes = np.arange(n + 1)
    share, z = successes / n, stats.norm.ppf(0.975)
    centre = share + z**2 / (2 * n)
    low = (centre - z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))) / (1 + z**2 / n)
    return float(stats.binom.pmf(successes, n, expected)[low > bound].sum())


# The specification's numbers are 155, 204, 476, 629, 229 and 303: the power is reached there, and lost again beyond.
@pytest.mark.parametrize(
    ("expected", "bound", "power", "n", "of_specification"),
    [
        (0.80, 0.70, 0.8, 158, 155),
        (0.80, 0.70, 0.9, 207, 204),
        (0.85, 0.80, 0.8, 481, 476),
        (0.85, 0.80, 0.9, 634, 629),
        (0.95, 0.90, 0.8, 254, 229),
        (0.95, 0.90, 0.9, 315, 303),
    ],
)
def test_from_the_number_on_the_power_of_a_lower_limit_is_never_lost_again(
    expected, bound, power, n, of_specification
) -> None:
    size = size_above_bound(expected, bound, power)
    assert size.n == n
    assert size.reached == pytest.approx(_plain_power(expected, bound, n))
    assert _plain_power(expected, bound, n - 1) < power
    assert all(_plain_power(expected, bound, more) >= power for more in range(n, 3 * n))
    assert _plain_power(expected, bound, of_specification) >= power
    assert power_above_bound(expected, bound, of_specification) == pytest.approx(
        _plain_power(expected, bound, of_specification)
    )


@pytest.mark.parametrize(("expected", "bound", "power"), [(0.95, 0.5, 0.8), (0.6, 0.1, 0.99), (0.99, 0.97, 0.9)])
def test_extreme_claims_keep_the_power_too(expected, bound, power) -> None:
    size = size_above_bound(expected, bound, power)
    assert all(_plain_power(expected, bound, more) >= power for more in range(size.n, 4 * size.n + 50))
    assert size.n == 2 or _plain_power(expected, bound, size.n - 1) < power


def test_aurocs_need_the_computed_numbers() -> None:
    assert [size_for_auroc_width(0.85, share, 0.05).n for share in (0.19, 0.5, 0.31)] == [507, 233, 329]
    assert 1.959964 * auroc_error(0.85, 0.19, 147) == pytest.approx(0.093, abs=5e-4)
    size = size_for_auroc_above(0.85, 0.19, 0.70)
    assert (0.85 - 0.70) / auroc_error(0.85, 0.19, size.n) >= 1.959964 + 0.841621
    assert (0.85 - 0.70) / auroc_error(0.85, 0.19, size.n - 1) < 1.959964 + 0.841621


def test_survival_needs_the_computed_events() -> None:
    # Immune, 19 %, against canonical, 50 %: about 40 and 117 events.
    share = 0.19 / 0.69
    assert events_for_hazard_ratio(0.37, share).n == 40
    assert events_for_hazard_ratio(0.56, share).n == pytest.approx(117, abs=1)
    assert detectable_interaction(16, 63) == pytest.approx(4.8, abs=0.05)
    assert detectable_interaction(34, 63) == pytest.approx(3.3, abs=0.05)


def test_a_simulated_non_inferiority_study_of_that_size_has_the_power() -> None:
    margin, discordant = 0.08, 0.2
    size = size_for_non_inferiority(margin, discordant)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(size.n, [discordant / 2, discordant / 2, 1 - discordant], size=20_000)
    difference = (counts[:, 0] - counts[:, 1]) / size.n
    error = np.sqrt((counts[:, :2].sum(axis=1) / size.n - difference**2) / size.n)
    assert (difference - 1.959964 * error > -margin).mean() == pytest.approx(0.8, abs=0.02)


def test_the_expected_interval_of_sites_is_that_of_the_pooled_estimate() -> None:
    expected = interval_of_sites(0.8, sites=6, cases_per_site=50, between=0.5)
    within = 1 / (50 * 0.8 * 0.2)
    # Sites whose variance about their mean is exactly that between sites plus that within.
    spread = np.array([-1, 1, -1, 1, -1, 1]) * np.sqrt((0.25 + within) * 5 / 6)
    result = pool_sites(np.log(4) + spread, np.full(6, within))
    for share, estimate in ((expected.pooled, result.pooled), (expected.new_site, result.prediction)):
        assert share == pytest.approx(tuple(stats.logistic.cdf([estimate.ci_low, estimate.ci_high])), abs=1e-4)
    assert interval_of_sites(0.8, 2, 50, 0.5).new_site == (0, 1)
    size = sites_above_bound(0.8, 0.7, 40, 0.5)
    assert interval_of_sites(0.8, size.n, 40, 0.5).pooled[0] > 0.7
    assert interval_of_sites(0.8, size.n - 1, 40, 0.5).pooled[0] <= 0.7


def test_slides_of_a_patient_are_worth_less_than_patients() -> None:
    size = size_for_width(0.8, 0.05)
    correlated = recruitment(size, slides_per_case=4, correlation=0.7)
    assert correlated.design_effect == pytest.approx(3.1)
    assert (correlated.patients, correlated.slides) == (190, 760)
    # Further slides that repeat the first add nothing.
    assert recruitment(size, slides_per_case=4, correlation=1.0).patients == size.n
    assert recruitment(size, evaluable=0.9).patients == 273


def test_impossible_claims_are_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"expected value must be above the bound, got 0\.7 and 0\.8"):
        size_above_bound(0.7, 0.8)
    with pytest.raises(InputError, match="half width must be between 0 and 1, got 0"):
        size_for_width(0.8, 0.0)
    for claim in (lambda: size_for_width(0.8, 1e-6), lambda: size_above_bound(0.8001, 0.8)):
        with pytest.raises(InputError, match="more than 1,000,000"):
            claim()
    with pytest.raises(InputError, match="must be above 0 and not 1"):
        events_for_hazard_ratio(1.0, 0.5)
    with pytest.raises(InputError, match="above minus the margin"):
        size_for_non_inferiority(0.05, 0.1, -0.06)
    with pytest.raises(InputError, match="two sites"):
        interval_of_sites(0.8, 1, 40, 0.5)
    with pytest.raises(InputError, match="both subtypes must have events"):
        detectable_interaction(0, 5)
