"""Risk against coverage: ties in every order, areas of resamples, and thresholds."""

import itertools

import numpy as np
import pytest
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.bootstrap import Resamples, number_patients
from crcjax.validation.risk_coverage import (
    _areas,
    accuracy_below,
    guarantee_risk,
    rates_by_group,
    risk_coverage_curve,
    selective_accuracies,
    selective_risk,
)

WRONG = np.array([False, True, False, True, True])
DOUBT = np.array([0.1, 0.5, 0.5, 0.5, 0.9])


def _in_every_order(statistic) -> float:  # type: ignore[no-untyped-def]
    return float(np.mean([statistic(WRONG[[0, *order, 4]]) for order in itertools.permutations([1, 2, 3])]))


def _plain(wrong: np.ndarray) -> float:
    return (wrong.cumsum() / np.arange(1, len(wrong) + 1)).mean()


def test_areas_are_means_over_coverages_and_ties_stand_in_every_order() -> None:
    result = selective_risk(DOUBT, WRONG, 0, replicates=50)
    assert result.area.value == pytest.approx(_in_every_order(_plain))
    assert result.generalised.value == pytest.approx(_in_every_order(lambda wrong: wrong.cumsum().mean() / 5))
    assert result.excess.value == pytest.approx(_in_every_order(_plain) - _plain(np.sort(WRONG)))
    # Of the six pairs of an error and a correct prediction, four are in order and two are tied.
    assert result.failure_auroc.value == pytest.approx(5 / 6)
    assert selective_risk(-DOUBT, WRONG, 0, replicates=50).area.value > result.area.value


def test_a_perfect_uncertainty_has_no_excess_and_the_closed_form_in_the_limit() -> None:
    wrong = np.arange(4000) >= 3200
    result = selective_risk(np.arange(4000.0), wrong, 0, replicates=10)
    assert result.excess.value == pytest.approx(0, abs=1e-12)
    assert result.area.value == pytest.approx(0.2 + 0.8 * np.log(0.8), abs=1e-3)


def test_areas_of_resamples_are_those_of_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    doubt, wrong, cluster = rng.random(30).round(1), rng.random(30) < 0.4, np.arange(30) // 2
    patient = number_patients(cluster, doubt, wrong)
    resamples = Resamples.sample(patient, 0, 20)
    values = resamples.evaluate(_areas(doubt, wrong, patient))
    for column in range(21):
        chosen = np.concatenate(
            [np.flatnonzero(patient == p) for p in np.repeat(np.arange(15), resamples.weights[:, column])]
        )
        order = chosen[np.argsort(doubt[chosen])]
        # Tied rows take the mean of their block.
        smooth = np.array([wrong[order][doubt[order] == d].mean() for d in doubt[order]])
        assert values[0, column] == pytest.approx(_plain(smooth))
        assert values[2, column] == pytest.approx(smooth.cumsum().mean() / len(order))
        assert values[1, column] == pytest.approx(_plain(smooth) - _plain(np.sort(wrong[chosen])))


def test_the_curve_has_one_point_for_each_value() -> None:
    curve = risk_coverage_curve(DOUBT, WRONG)
    assert curve.threshold.tolist() == [0.1, 0.5, 0.9]
    assert curve.coverage == pytest.approx([0.2, 0.8, 1.0])
    assert curve.risk == pytest.approx([0, 0.5, 0.6])


def test_selective_accuracy_accepts_part_of_a_tied_block() -> None:
    at_40, at_80, at_all = selective_accuracies(DOUBT, WRONG, 0, coverages=(0.4, 0.8, 1.0), replicates=100)
    # The first unit and a third of the three tied ones, of which two are wrong.
    assert at_40.value == pytest.approx((1 + 1 / 3) / 2)
    assert at_80.value == pytest.approx(0.5)
    assert at_all.value == pytest.approx(0.4)
    with pytest.raises(InputError, match="coverage must be above 0"):
        selective_accuracies(DOUBT, WRONG, 0, coverages=(0.0,))


def test_copies_of_slides_change_no_interval() -> None:
    rng = np.random.default_rng(1)
    doubt, wrong, patient = rng.random(40).round(1), rng.random(40) < 0.4, np.arange(40)
    for m, results in ((1, []), (4, [])):
        arrays = (np.tile(doubt, m), np.tile(wrong, m))
        results += [selective_risk(*arrays, 0, np.tile(patient, m), replicates=100)]
        results += selective_accuracies(*arrays, 0, np.tile(patient, m), replicates=100)
        if m == 1:
            once = results
    assert (results[1].ci_low, results[3].ci_high) == pytest.approx((once[1].ci_low, once[3].ci_high))
    assert results[0].failure_auroc.ci_low == pytest.approx(once[0].failure_auroc.ci_low)
    # The area depends on the number of units where few are accepted, so that copies change it a little.
    assert results[0].area.ci_high - results[0].area.ci_low == pytest.approx(
        once[0].area.ci_high - once[0].area.ci_low, rel=0.15
    )


def test_a_threshold_from_elsewhere_gives_the_accuracy_of_accepted_units() -> None:
    accuracy, coverage = accuracy_below(0.5, DOUBT, WRONG)
    assert (accuracy.value, accuracy.n, accuracy.n_excluded) == (0.5, 4, 1)
    assert coverage.value == 0.8
    nothing, none = accuracy_below(0.0, DOUBT, WRONG)
    assert np.isnan(nothing.value)
    assert none.value == 0


def test_deferral_is_shown_by_group() -> None:
    rates = rates_by_group(DOUBT > 0.4, ["b", "a", "b", "b", "a"])
    assert list(rates) == ["a", "b"]
    assert (rates["a"].value, rates["b"].value, rates["b"].n) == (1, pytest.approx(2 / 3), 3)
    by_patient = rates_by_group(DOUBT > 0.4, [1, 1, 1, 1, 1], np.array([0, 0, 1, 1, 1]))
    assert by_patient[1].n_clusters == 2


def test_the_guaranteed_risk_is_kept_as_often_as_stated() -> None:
    rng = np.random.default_rng(2)
    broken = 0
    for _ in range(200):
        doubt = rng.random(200)
        result = guarantee_risk(doubt, rng.random(200) < 0.6 * doubt, 0.15, 0.9)
        # The true risk of accepting all up to a threshold is 0.3 of it.
        broken += 0.3 * max(result.threshold, 0) > 0.15
    assert broken <= 0.1 * 200
    sure = guarantee_risk(np.arange(100.0), np.arange(100) >= 80, 0.1)
    accepted = int(sure.threshold) + 1
    assert sure.bound == pytest.approx(
        stats.beta.isf(0.05 / 7, max(0, accepted - 80) + 1, accepted - max(0, accepted - 80))
    )
    assert sure.coverage.value == accepted / 100
    assert sure.bound < 0.1
    never = guarantee_risk(np.arange(20.0), np.ones(20, bool), 0.1)
    assert (never.threshold, never.coverage.value) == (-np.inf, 0)
    with pytest.raises(InputError, match="between 0 and 1"):
        guarantee_risk(DOUBT, WRONG, 1.0)


def test_no_cases_and_no_errors_give_nan_and_a_warning() -> None:
    nothing, none = np.zeros(0), np.zeros(0, bool)
    empty = selective_risk(nothing, none, 0)
    for estimate in (empty.area, empty.failure_auroc, *selective_accuracies(nothing, none, 0)):
        assert np.isnan(estimate.value)
        assert estimate.warnings
    flawless = selective_risk(np.arange(12.0), np.zeros(12, bool), 0, replicates=20)
    assert flawless.area.value == 0
    assert np.isnan(flawless.area.ci_high)
    assert np.isnan(flawless.failure_auroc.value)
    gap = selective_risk(np.append(np.arange(12.0), np.nan), np.arange(13) % 3 == 0, 0, replicates=20)
    assert (gap.area.n, gap.area.n_excluded) == (12, 1)
