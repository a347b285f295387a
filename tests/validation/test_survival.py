"""Survival curves against published values, R's survival 3.5, and what must hold for any data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crcjax.errors import InputError
from crcjax.validation.survival import (
    FollowUp,
    cumulative_incidence,
    kaplan_meier,
    log_rank,
    median_follow_up,
    median_survival,
    numbers_at_risk,
    restricted_mean,
    restricted_mean_difference,
    survival_at,
)


def _error(estimate) -> float:
    return (estimate.ci_high - estimate.ci_low) / (2 * 1.959963984540054)


def test_the_trial_of_freireich_has_its_published_values(freireich) -> None:
    test = log_rank(freireich.follow_up, freireich.is_treated)
    assert (test.statistic, test.p_value, test.df) == pytest.approx((16.792941, 4.16881e-5, 1), rel=1e-6)
    treated, placebo = restricted_mean(freireich.treated, 23.0), restricted_mean(freireich.placebo, 23.0)
    assert (treated.value, _error(treated) ** 2) == pytest.approx((17.909244, 2.412399), abs=1e-6)
    assert (placebo.value, _error(placebo)) == pytest.approx((8.66666666667, 1.37739004126), abs=1e-9)
    difference = restricted_mean_difference(freireich.treated, freireich.placebo, 23.0)
    assert difference.value == pytest.approx(treated.value - placebo.value)
    assert _error(difference) == pytest.approx(np.hypot(_error(treated), _error(placebo)))
    assert (median_survival(freireich.placebo).value, median_survival(freireich.treated).value) == (8, 23)
    unreached = median_survival(freireich.treated)
    assert (unreached.ci_low, unreached.ci_high) == (13, np.inf)


def test_the_variance_of_a_restricted_mean_is_that_of_resampled_patients(freireich) -> None:
    rng = np.random.default_rng(0)
    means = [restricted_mean(freireich.treated.of(rng.integers(21, size=21)), 23.0).value for _ in range(2000)]
    assert np.std(means) == pytest.approx(_error(restricted_mean(freireich.treated, 23.0)), rel=0.06)


@pytest.mark.real_data
def test_lung_has_the_curve_the_median_and_the_test_of_r(real_table) -> None:
    table = real_table("lung")
    lung = FollowUp(table["time"], table["status"] == 1)
    estimate = survival_at(lung, 365.0)
    golden = (0.4092416244600636, 0.338714269, 0.47838077)
    assert (estimate.value, estimate.ci_low, estimate.ci_high) == pytest.approx(golden, abs=1e-8)
    median, follow_up = median_survival(lung), median_follow_up(lung)
    assert (median.value, median.ci_low, median.ci_high) == (310, 284, 361)
    assert (follow_up.value, follow_up.ci_low, follow_up.ci_high) == (588, 511, 821)
    assert numbers_at_risk(lung, [0.0, 180.0, 365.0, 700.0]) == [228, 160, 65, 16]
    mean = restricted_mean(lung, 365.0)
    assert (mean.value, _error(mean)) == pytest.approx((263.22187, 7.7988591), abs=1e-5)
    test = log_rank(lung, table["sex"])
    assert (test.statistic, test.p_value) == pytest.approx((10.326741954885648, 0.0013111645203554782), rel=1e-9)
    has_centre = np.isfinite(table["inst"])
    by_centre = log_rank(lung.of(has_centre), table["sex"][has_centre], table["inst"][has_centre])
    assert (by_centre.statistic, by_centre.p_value) == pytest.approx((8.5244674, 0.00350403), rel=1e-6)


@pytest.mark.real_data
def test_colon_has_the_log_rank_test_and_the_competing_incidences_of_r(real_table) -> None:
    table = real_table("colon")
    death, recurrence = ({name: values[table["etype"] == k] for name, values in table.items()} for k in (2, 1))
    test = log_rank(FollowUp(death["time"], death["status"] == 1), death["rx"])
    assert (test.statistic, test.df, test.p_value) == pytest.approx((11.683092710639134, 2, 0.0029043479975), rel=1e-9)
    assert (recurrence["id"] == death["id"]).all()
    recurred = recurrence["status"] == 1
    time = np.where(recurred, recurrence["time"], death["time"])
    cause = np.where(recurred, 1, np.where(death["status"] == 1, 2, 0))
    incidence = cumulative_incidence(time, cause, 1825.0)
    assert [incidence[k].value for k in (1, 2)] == pytest.approx([0.485981292349, 0.0291462026913], abs=1e-9)
    # Of the log-log interval, the error on the scale of the incidence.
    for estimate, golden in ((incidence[1], 0.0164116527623), (incidence[2], 0.00552701777786)):
        low, high = (np.log(-np.log(limit)) for limit in (estimate.ci_low, estimate.ci_high))
        error = (low - high) / (2 * 1.959963984540054) * abs(np.log(estimate.value)) * estimate.value
        assert error == pytest.approx(golden, abs=1e-8)


_PATIENTS = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=30)


@settings(deadline=None, max_examples=50)
@given(_PATIENTS, st.randoms())
def test_the_order_of_patients_changes_no_curve_and_more_copies_change_no_survival(patients, random) -> None:
    time, is_event = (np.array(column) for column in zip(*patients, strict=True))
    follow_up, order = FollowUp(time, is_event), random.sample(range(len(time)), len(time))
    curve, shuffled = kaplan_meier(follow_up), kaplan_meier(follow_up.of(np.array(order)))
    doubled = kaplan_meier(FollowUp(np.tile(time, 2), np.tile(is_event, 2)))
    np.testing.assert_array_equal(curve.survival, shuffled.survival)
    np.testing.assert_allclose(curve.survival, doubled.survival, atol=1e-12)
    assert (np.diff(curve.survival) <= 0).all()
    # Without censoring the survival is the share of patients who are still without event.
    complete = kaplan_meier(FollowUp(time, np.ones(len(time), bool)))
    np.testing.assert_allclose(complete.survival, [(time > step).mean() for step in complete.time], atol=1e-12)


def test_the_cumulative_incidence_of_a_single_cause_is_one_minus_the_survival(freireich) -> None:
    incidence = cumulative_incidence(freireich.follow_up.time, freireich.follow_up.is_event.astype(int), 20.0)
    assert list(incidence) == [1]
    assert incidence[1].value == pytest.approx(1 - survival_at(freireich.follow_up, 20.0).value)


def test_what_the_data_do_not_determine_is_nan_with_a_warning(freireich) -> None:
    nobody = FollowUp(np.array([]), np.array([], bool))
    censored = FollowUp(np.array([1.0, 2, 3]), np.zeros(3, bool))
    for estimate in (
        survival_at(nobody, 1.0),
        median_survival(nobody),
        median_survival(censored),
        survival_at(freireich.treated, 99.0),
    ):
        assert np.isnan(estimate.value)
        assert estimate.warnings
    for estimate in (survival_at(censored, 2.0), restricted_mean(censored, 3.0)):
        assert np.isnan([estimate.ci_low, estimate.ci_high]).all()
        assert any("no event" in warning for warning in estimate.warnings)
    assert restricted_mean(censored, 3.0).value == 3
    assert survival_at(freireich.placebo, 99.0).value == 0
    for test in (
        log_rank(freireich.follow_up, np.zeros(42)),
        log_rank(censored, np.array([1, 2, 2])),
        # The second group leaves before the first event.
        log_rank(FollowUp(np.array([5.0, 6, 1, 2]), np.array([True, True, False, False])), np.array([1, 1, 2, 2])),
    ):
        assert np.isnan(test.p_value)
        assert test.warnings
    assert cumulative_incidence(censored.time, np.zeros(3, int), 2.0) == {}


def test_impossible_times_and_horizons_beyond_the_follow_up_are_refused(freireich) -> None:
    with pytest.raises(InputError, match="times must be 0 or more, got -1"):
        FollowUp(np.array([1.0, -1]), np.array([True, True]))
    with pytest.raises(InputError, match="times must be 0 or more, got nan"):
        FollowUp(np.array([np.nan]), np.array([True]))
    with pytest.raises(InputError, match="the last patient is observed until 35"):
        restricted_mean(freireich.treated, 36.0)
    with pytest.raises(InputError, match="must be above 0"):
        restricted_mean(freireich.treated, 0.0)
    with pytest.raises(InputError, match="within the follow-up"):
        cumulative_incidence(np.array([1.0, 2]), np.array([1, 0]), 3.0)
    with pytest.raises(InputError, match="causes must be"):
        cumulative_incidence(np.array([1.0, 2]), np.array([1, -1]), 2.0)
    # After the last patient's event nobody is left, and the mean to any horizon is known.
    assert restricted_mean(freireich.placebo, 99.0).value == pytest.approx(freireich.placebo.time.mean())
