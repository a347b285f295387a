"""Meta-analysis over sites against published and computed values."""

import numpy as np
import pytest
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.sites import (
    cochran_q,
    dersimonian_laird_tau2,
    leave_one_site_out,
    logit_proportions,
    pool_sites,
)

EFFECT, VARIANCE = logit_proportions(np.array([41, 55, 30, 72]), np.array([52, 64, 45, 80]))


def _probability(*logits: float) -> list[float]:
    return stats.logistic.cdf(logits).tolist()


def test_four_sites_have_the_computed_values() -> None:
    result = pool_sites(EFFECT, VARIANCE)
    assert result.tau2 == pytest.approx(0.309115, abs=1e-5)
    assert result.q == pytest.approx(10.898199, abs=1e-6)
    assert result.pooled.value == pytest.approx(1.484662, abs=1e-5)
    assert _probability(result.pooled.ci_low, result.pooled.ci_high) == pytest.approx([0.609, 0.926], abs=5e-4)
    assert _probability(result.prediction.ci_low, result.prediction.ci_high) == pytest.approx([0.216, 0.986], abs=5e-4)
    assert dersimonian_laird_tau2(EFFECT, VARIANCE) == pytest.approx(0.315031, abs=1e-6)
    # Of DerSimonian and Laird's tau2, I² is (Q - df) / Q.
    assert (result.q - 3) / result.q == pytest.approx(0.724725, abs=1e-6)
    assert 0 <= result.i2.ci_low < result.i2.value < result.i2.ci_high < 1
    assert any("hardly determine" in warning for warning in result.pooled.warnings)


def test_the_q_profile_limits_are_where_q_is_a_quantile_of_chi_squared() -> None:
    result = pool_sites(EFFECT, VARIANCE)
    weight = 1 / VARIANCE
    typical = 3 * weight.sum() / (weight.sum() ** 2 - (weight**2).sum())
    for limit, probability in ((result.i2.ci_low, 0.975), (result.i2.ci_high, 0.025)):
        tau2 = typical * limit / (1 - limit)
        assert cochran_q(EFFECT, VARIANCE, tau2) == pytest.approx(stats.chi2.ppf(probability, 3), rel=1e-6)


def test_equal_sites_have_no_variance_between_them_and_no_narrower_interval_than_theirs() -> None:
    result = pool_sites(np.full(4, 0.7), np.full(4, 0.04))
    assert (result.tau2, result.i2.value, result.pooled.value) == pytest.approx((0, 0, 0.7), abs=1e-6)
    # A scale below 1 is raised to 1.
    assert result.pooled.ci_high - 0.7 == pytest.approx(stats.t.ppf(0.975, 3) * np.sqrt(0.04 / 4), rel=1e-5)


def test_leaving_a_site_out_is_the_analysis_of_the_others() -> None:
    without = leave_one_site_out(EFFECT, VARIANCE)
    assert len(without) == 4
    assert without[1].pooled.value == pool_sites(EFFECT[[0, 2, 3]], VARIANCE[[0, 2, 3]]).pooled.value


def test_a_site_without_an_effect_is_excluded_and_counted() -> None:
    result = pool_sites(np.append(EFFECT, np.nan), np.append(VARIANCE, 0.1)).pooled
    assert (result.value, result.n, result.n_excluded) == (pool_sites(EFFECT, VARIANCE).pooled.value, 4, 1)
    assert any("excluded" in warning for warning in result.warnings)


def test_the_order_of_sites_changes_nothing() -> None:
    order = np.array([2, 0, 3, 1])
    assert pool_sites(EFFECT[order], VARIANCE[order]).pooled.value == pytest.approx(
        pool_sites(EFFECT, VARIANCE).pooled.value
    )


def test_too_few_sites_give_nan_and_a_warning() -> None:
    one = pool_sites(EFFECT[:1], VARIANCE[:1])
    assert np.isnan(one.pooled.value)
    assert one.pooled.warnings
    two = pool_sites(EFFECT[:2], VARIANCE[:2])
    assert np.isfinite(two.pooled.ci_low)
    assert np.isnan(two.prediction.value)


def test_a_site_without_failures_has_finite_logits_and_an_empty_one_is_refused() -> None:
    effect, variance = logit_proportions(np.array([8, 4]), np.array([8, 8]))
    assert effect[0] == pytest.approx(np.log(8.5 / 0.5))
    assert variance[0] == pytest.approx(1 / 8.5 + 2)
    with pytest.raises(InputError, match="every site must have a case"):
        logit_proportions(np.array([0, 4]), np.array([0, 8]))
    with pytest.raises(InputError, match="must be above 0"):
        pool_sites(EFFECT, np.zeros(4))
