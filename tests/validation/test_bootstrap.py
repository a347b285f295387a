"""The bootstrap over patients: its weights, its intervals, and what does not change it."""

import numpy as np
import pytest
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.bootstrap import Resamples, number_patients


def _mean(value: np.ndarray, resamples: Resamples) -> np.ndarray:
    totals = resamples.totals(np.column_stack([value, np.ones(len(value))]))
    with np.errstate(invalid="ignore"):
        return totals[0] / totals[1]


def test_columns_are_the_study_the_study_without_each_patient_and_resamples() -> None:
    patient = np.array([0, 0, 1, 2, 2, 2])
    resamples = Resamples.sample(patient, 0, 50, interval="bca")
    assert (resamples.weights[:, 4:] == Resamples.sample(patient, 0, 50).weights[:, 1:]).all()
    assert (resamples.patients, resamples.replicates, resamples.weights.shape) == (3, 50, (3, 54))
    assert (resamples.weights[:, 0] == 1).all()
    assert (resamples.weights[:, 1:4] == 1 - np.eye(3)).all()
    assert (resamples.weights[:, 4:].sum(axis=0) == 3).all()
    value = np.arange(6.0)
    means = _mean(value, resamples)
    assert means[:4] == pytest.approx([2.5, 14 / 4, 13 / 5, 1.0])
    chosen = np.repeat(np.arange(3), resamples.weights[:, 10])
    assert means[10] == pytest.approx(np.concatenate([value[patient == p] for p in chosen]).mean())


def test_every_resample_has_as_many_patients_of_a_stratum_as_the_study() -> None:
    stratum = np.array([0, 0, 0, 1, 1, 2])
    resamples = Resamples.sample(np.arange(6), 1, 200, stratum)
    for group, size in ((0, 3), (1, 2), (2, 1)):
        assert (resamples.weights[stratum == group, 1:].sum(axis=0) == size).all()
    assert len(np.unique(resamples.weights[:3, 1:], axis=1).T) == 10
    estimate = resamples.estimate(_mean(np.arange(6.0), resamples))
    assert "stratified" in estimate.method
    assert any("1 strata have a single patient" in warning for warning in estimate.warnings)
    with pytest.raises(InputError, match="must be in one stratum"):
        Resamples.sample(np.array([0, 0]), 0, 5, np.array([1, 2]))


def test_the_percentile_interval_is_near_the_normal_one_for_a_mean() -> None:
    value = np.random.default_rng(0).normal(size=200)
    resamples = Resamples.sample(np.arange(200), 0)
    estimate = resamples.estimate(_mean(value, resamples))
    error = value.std() / np.sqrt(200)
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx(
        value.mean() + 1.96 * error * np.array([-1, 1]), abs=0.01
    )
    assert (estimate.n, estimate.n_clusters, estimate.value) == (200, 200, pytest.approx(value.mean()))


def test_bca_limits_follow_efron_s_formula_and_equal_scipy_s() -> None:
    value = np.random.default_rng(1).exponential(size=40)
    resamples = Resamples.sample(np.arange(40), 0, 20_000, interval="bca")
    means = _mean(value, resamples)
    estimate = resamples.estimate(means)
    influence = value.mean() - np.array([np.delete(value, i).mean() for i in range(40)])
    acceleration = (influence**3).sum() / 6 / (influence**2).sum() ** 1.5
    bias = stats.norm.ppf((means[41:] < value.mean()).mean())
    levels = [bias + (bias + z) / (1 - acceleration * (bias + z)) for z in stats.norm.ppf([0.025, 0.975])]
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx(
        np.quantile(means[41:], stats.norm.cdf(levels)), abs=1e-9
    )
    other = stats.bootstrap((value,), np.mean, n_resamples=20_000, rng=np.random.default_rng(0)).confidence_interval
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((other.low, other.high), abs=0.04)
    percentile = Resamples.sample(np.arange(40), 0, 20_000)
    assert estimate.ci_low > percentile.estimate(_mean(value, percentile)).ci_low


def test_a_stratum_s_shift_does_not_enter_the_stratified_acceleration() -> None:
    value, stratum = np.random.default_rng(2).exponential(size=60), np.repeat([0, 1], 30)
    resamples = Resamples.sample(np.arange(60), 0, 4000, stratum, "bca")
    plain = resamples.estimate(_mean(value, resamples))
    shifted = resamples.estimate(_mean(value + 1000 * stratum, resamples))
    assert (shifted.ci_low - 500, shifted.ci_high - 500) == pytest.approx((plain.ci_low, plain.ci_high), abs=1e-6)


def test_centred_limits_subtract_the_bias_of_the_replicates() -> None:
    resamples = Resamples.sample(np.arange(20), 0, 500)
    values = _mean(np.arange(20.0), resamples)
    biased = values + np.where(np.arange(len(values)) > 0, 3.0, 0.0)
    a, b = resamples.estimate(values, centred=True), resamples.estimate(biased, centred=True)
    assert (b.ci_low, b.ci_high) == pytest.approx((a.ci_low, a.ci_high))


def test_neither_the_names_of_patients_nor_the_order_nor_copies_of_slides_change_the_interval() -> None:
    rng = np.random.default_rng(3)
    cluster, value = np.sort(rng.integers(30, size=70)), rng.normal(size=70).round(1)

    def estimate(cluster: np.ndarray, value: np.ndarray) -> tuple[float, float, float]:
        resamples = Resamples.sample(number_patients(cluster, value), 5, 500, interval="bca")
        result = resamples.estimate(_mean(value, resamples))
        return result.value, result.ci_low, result.ci_high

    before, order = estimate(cluster, value), rng.permutation(70)
    assert estimate(900 - 7 * cluster[order], value[order]) == pytest.approx(before, abs=1e-12)
    assert estimate(np.tile(cluster, 4), np.tile(value, 4)) == pytest.approx(before, abs=1e-12)


def test_units_without_clusters_are_numbered_by_their_data() -> None:
    value = np.array([3.0, 1.0, 2.0, 1.0])
    number = number_patients(None, value)
    assert sorted(number) == [0, 1, 2, 3]
    assert (value[np.argsort(number)] == [1, 1, 2, 3]).all()
    assert len(number_patients(None, np.zeros(0))) == 0


def test_data_that_do_not_determine_an_interval_give_nan_and_a_warning() -> None:
    few = Resamples.sample(np.arange(3), 0, 100)
    assert "3 patients hardly determine an interval" in few.estimate(_mean(np.arange(3.0), few)).warnings
    one = Resamples.sample(np.zeros(4, int), 0, 100)
    ten = Resamples.sample(np.arange(12), 0, 100)
    mostly_missing = np.where(np.arange(101) < 60, np.nan, 1.0 * np.arange(101))
    mostly_missing[0] = 1.0
    for estimate, value in (
        (one.estimate(_mean(np.arange(4.0), one)), 1.5),
        (ten.estimate(_mean(np.ones(12), ten)), 1.0),
        (ten.estimate(mostly_missing), 1.0),
        (ten.estimate(np.full(101, np.nan)), np.nan),
    ):
        assert estimate.value == pytest.approx(value, nan_ok=True)
        assert np.isnan([estimate.ci_low, estimate.ci_high]).all()
        assert estimate.warnings
    some_missing = np.arange(101.0)
    some_missing[20:30] = np.nan
    assert "10 resamples lacked a class and are omitted" in ten.estimate(some_missing).warnings
    # All replicates lie on one side of the value.
    corrected = Resamples.sample(np.arange(12), 0, 100, interval="bca")
    one_sided = corrected.estimate(np.append(-1.0, np.arange(112.0)))
    assert any("the interval is the percentile one" in warning for warning in one_sided.warnings)
