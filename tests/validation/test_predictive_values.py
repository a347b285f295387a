"""Predictive values at a stated prevalence: Bayes' rule, the published error, and their ends."""

import numpy as np
import pytest
from scipy import special, stats

from crcjax.errors import InputError
from crcjax.validation.predictive_values import predictive_value_curve, predictive_values

Z = stats.norm.ppf(0.975)
GOLDEN = np.array([[58, 4, 11], [5, 19, 4], [9, 3, 34]])
LABEL, PREDICTED = np.array([cell for cell, count in np.ndenumerate(GOLDEN) for _ in range(count)]).T


def test_at_the_prevalence_of_the_study_they_are_the_raw_ones() -> None:
    values = predictive_values(LABEL, PREDICTED, GOLDEN.sum(axis=1) / 147)
    for k in range(3):
        assert values[k].ppv.value == pytest.approx(GOLDEN[k, k] / GOLDEN[:, k].sum())
    assert values[1].npv.value == pytest.approx(0.925620, abs=1e-6)


def test_three_classes_follow_bayes_rule() -> None:
    prevalence, rate = np.array([0.6, 0.1, 0.3]), GOLDEN / GOLDEN.sum(axis=1, keepdims=True)
    values = predictive_values(LABEL, PREDICTED, prevalence)
    for k in range(3):
        assert values[k].ppv.value == pytest.approx(prevalence[k] * rate[k, k] / (prevalence @ rate[:, k]))
        other = np.delete(prevalence * (1 - rate[:, k]), k).sum()
        assert values[k].npv.value == pytest.approx(other / (prevalence @ (1 - rate[:, k])))


def test_two_classes_have_the_logit_intervals_of_mercaldo() -> None:
    # Sensitivity 80 of 100 and specificity 135 of 150, at a prevalence of 0.05.
    label, predicted = np.repeat([1, 0], [100, 150]), np.repeat([1, 0, 1, 0], [80, 20, 15, 135])
    values = predictive_values(label, predicted, np.array([0.95, 0.05]))[1]
    ppv_error = np.sqrt(0.2 / (0.8 * 100) + 0.9 / (0.1 * 150))
    npv_error = np.sqrt(0.8 / (0.2 * 100) + 0.1 / (0.9 * 150))
    ppv, npv = 0.05 * 0.8 / (0.05 * 0.8 + 0.95 * 0.1), 0.95 * 0.9 / (0.95 * 0.9 + 0.05 * 0.2)
    for estimate, value, error in ((values.ppv, ppv, ppv_error), (values.npv, npv, npv_error)):
        limits = special.expit(special.logit(value) + np.array([-Z, Z]) * error)
        assert (estimate.value, estimate.ci_low, estimate.ci_high) == pytest.approx((value, *limits), abs=1e-9)
    with_patients = predictive_values(label, predicted, np.array([0.95, 0.05]), np.arange(250))[1].ppv
    assert with_patients.ci_low == pytest.approx(values.ppv.ci_low)
    assert with_patients.n_clusters == 250


def test_the_error_is_that_of_simulated_studies() -> None:
    rng, prevalence = np.random.default_rng(0), np.array([0.6, 0.1, 0.3])
    # Twenty times as many cases, so that the logit is nearly normal.
    rate, sizes = GOLDEN / GOLDEN.sum(axis=1, keepdims=True), 20 * GOLDEN.sum(axis=1)
    rates = np.stack([rng.multinomial(n, p, 20_000) / n for n, p in zip(sizes, rate, strict=True)], axis=1)
    simulated = special.logit(prevalence[1] * rates[:, 1, 1] / (rates[:, :, 1] @ prevalence))
    estimate = predictive_values(np.tile(LABEL, 20), np.tile(PREDICTED, 20), prevalence)[1].ppv
    width = np.diff(special.logit([estimate.ci_low, estimate.ci_high]))[0] / 2 / Z
    assert width == pytest.approx(simulated.std(), rel=0.03)


def test_four_copies_of_every_slide_change_nothing() -> None:
    prevalence = np.array([0.6, 0.1, 0.3])
    once = predictive_values(LABEL, PREDICTED, prevalence)
    four = predictive_values(np.tile(LABEL, 4), np.tile(PREDICTED, 4), prevalence, np.tile(np.arange(147), 4))
    for a, b in zip(once, four, strict=True):
        assert (a.ppv.ci_low, a.npv.ci_high) == pytest.approx((b.ppv.ci_low, b.npv.ci_high))


def test_the_curve_rises_with_the_prevalence_and_passes_through_the_study() -> None:
    curve = predictive_value_curve(LABEL, PREDICTED, 3, 1, prevalence=(0.05, 28 / 147, 0.5))
    ppv, npv = ([getattr(v, name).value for v in curve.values] for name in ("ppv", "npv"))
    assert np.all(np.diff(ppv) > 0)
    assert np.all(np.diff(npv) < 0)
    assert (ppv[1], npv[1]) == pytest.approx((0.730769, 0.925620), abs=1e-6)


def test_rates_of_zero_have_least_favourable_limits() -> None:
    label = np.repeat([0, 1], [30, 20])
    values = predictive_values(label, label, np.array([0.5, 0.5]))[1].ppv
    low, high = 20 / (20 + Z**2), Z**2 / (30 + Z**2)
    assert (values.value, values.ci_high) == (1, 1)
    assert values.ci_low == pytest.approx(low / (low + high))


def test_what_the_study_does_not_show_is_nan_and_a_wrong_prevalence_is_refused() -> None:
    label = np.repeat([0, 1], 15)
    never = predictive_values(label, np.zeros(30, int), np.array([0.5, 0.5]))[1].ppv
    absent = predictive_values(label, label, np.array([0.3, 0.3, 0.4]))[0].ppv
    one_class = predictive_value_curve(np.zeros(9, int), np.zeros(9, int), 2, 0).values[3].npv
    for estimate in (never, absent, one_class):
        assert np.isnan(estimate.value)
        assert estimate.warnings
    # A class that the population lacks may lack cases too.
    assert np.isfinite(predictive_values(label, label, np.array([0.5, 0.5, 0.0]))[0].ppv.value)
    with pytest.raises(InputError, match="sum to 1"):
        predictive_values(label, label, np.array([0.5, 0.6]))
