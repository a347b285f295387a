"""Coefficients of agreement against published examples."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from crcjax.errors import InputError
from crcjax.validation.agreement import (
    MISSING,
    brennan_prediger,
    class_agreement,
    cohen_kappa,
    fleiss_kappa,
    gwet_ac1,
    kappa_of_units,
    krippendorff_alpha,
)
from crcjax.validation.confusion import confusion_matrix

EPOC = np.array([[58, 4, 11], [5, 19, 4], [9, 3, 34]])
GWET = np.array([[13, 0, 0], [0, 20, 7], [0, 4, 56]])
FLEISS_1971 = np.array(
    [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
     [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
)  # fmt: skip
KRIPPENDORFF_2011 = np.array(
    [[1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
     [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0]]
).T - 1  # fmt: skip


def _ratings(table: np.ndarray) -> np.ndarray:
    """The cases of a table of two readers."""
    return np.array([(i, j) for (i, j), count in np.ndenumerate(table) for _ in range(count)])


def test_kappa_has_the_published_values_and_errors() -> None:
    epoc = cohen_kappa(EPOC)
    assert (epoc.value, epoc.ci_low, epoc.ci_high) == pytest.approx((0.6042181, 0.4921335, 0.7163027), abs=1e-6)
    gwet = cohen_kappa(GWET)
    assert gwet.value == pytest.approx(0.7964094, abs=1e-6)
    assert (gwet.value - gwet.ci_low) / 1.959964 == pytest.approx(0.0589107, abs=1e-6)


def test_ac1_has_the_published_value_and_error() -> None:
    estimate = gwet_ac1(_ratings(GWET), 3)
    assert estimate.value == pytest.approx(0.8493305, abs=1e-6)
    assert (estimate.value - estimate.ci_low) / 1.959964 == pytest.approx(0.04322, abs=1e-4)


def test_fleiss_kappa_has_the_published_value_within_its_interval() -> None:
    ratings = np.array([np.repeat(np.arange(5), counts) for counts in FLEISS_1971])
    estimate = fleiss_kappa(ratings, 5, seed=0, replicates=200)
    assert estimate.value == pytest.approx(0.2099307, abs=1e-6)
    assert estimate.ci_low < estimate.value < estimate.ci_high


@pytest.mark.parametrize(("scale", "value"), [("nominal", 0.7434211), ("ordinal", 0.8153875), ("interval", 0.8491071)])
def test_krippendorff_s_alpha_has_the_published_values_with_missing_ratings(scale: str, value: float) -> None:
    estimate = krippendorff_alpha(KRIPPENDORFF_2011, 5, seed=0, scale=scale, replicates=100)
    assert estimate.value == pytest.approx(value, abs=1e-6)
    # One unit has a single rating.
    assert (estimate.n, estimate.n_excluded) == (11, 1)
    two = krippendorff_alpha(_ratings(GWET), 3, seed=0, replicates=10)
    assert two.value == pytest.approx(0.79726, abs=1e-5)


def test_the_order_of_cases_and_of_readers_changes_no_value() -> None:
    rng = np.random.default_rng(0)
    shuffled = KRIPPENDORFF_2011[rng.permutation(12)][:, rng.permutation(4)]
    for statistic in (gwet_ac1, lambda r, c: krippendorff_alpha(r, c, seed=0, replicates=10)):
        assert statistic(shuffled, 5).value == pytest.approx(statistic(KRIPPENDORFF_2011, 5).value)


def test_agreement_that_the_data_do_not_determine_is_nan_with_a_warning() -> None:
    one_class = np.zeros((6, 2), int)
    for estimate in (
        cohen_kappa(np.array([[9, 0], [0, 0]])),
        cohen_kappa(np.zeros((3, 3), int)),
        fleiss_kappa(one_class, 3, seed=0, replicates=10),
        krippendorff_alpha(one_class, 3, seed=0, replicates=10),
        gwet_ac1(np.full((4, 2), MISSING), 3),
        krippendorff_alpha(np.array([[0, MISSING], [1, MISSING]]), 3, seed=0, replicates=10),
    ):
        assert np.isnan(estimate.value)
        assert estimate.warnings


def test_wrong_ratings_are_refused() -> None:
    with pytest.raises(InputError, match="a rating must be a class from 0 to 2"):
        gwet_ac1(np.array([[0, 3], [1, 1]]), 3)
    with pytest.raises(InputError, match="needs a rating of every case"):
        fleiss_kappa(np.array([[0, MISSING], [1, 1]]), 3, seed=0)


def test_two_readers_have_the_published_scott_s_pi_and_brennan_prediger() -> None:
    assert fleiss_kappa(_ratings(GWET), 3, seed=0, replicates=20).value == pytest.approx(0.7962397, abs=1e-6)
    estimate = brennan_prediger(_ratings(GWET), 3)
    assert estimate.value == pytest.approx(0.835, abs=1e-3)
    # It is a linear function of the observed agreement.
    error = np.sqrt(0.89 * 0.11 / 100) * 1.5
    assert (estimate.value - estimate.ci_low) / 1.959964 == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("scale", ["nominal", "linear", "quadratic"])
def test_weighted_kappas_equal_scikit_learn_s_and_their_error_the_jackknife(scale: str) -> None:
    rng = np.random.default_rng(1)
    first = rng.integers(4, size=300)
    second = np.clip(first + rng.integers(-1, 2, size=300), 0, 3)
    estimate = kappa_of_units(first, second, 4, scale=scale)
    wanted = cohen_kappa_score(first, second, weights=None if scale == "nominal" else scale)
    assert estimate.value == pytest.approx(wanted)
    assert cohen_kappa(confusion_matrix(first, second, 4), scale) == estimate
    left_out = [kappa_of_units(np.delete(first, i), np.delete(second, i), 4, scale=scale).value for i in range(300)]
    jackknife = np.sqrt(299 / 300 * ((left_out - np.mean(left_out)) ** 2).sum())
    assert (estimate.value - estimate.ci_low) / 1.959964 == pytest.approx(jackknife, rel=0.02)


def test_perfect_agreement_has_wilson_s_limit() -> None:
    estimate = cohen_kappa(np.diag([4, 5]))
    low = 9 / (9 + 1.959964**2)
    by_chance = (4 / 9) ** 2 + (5 / 9) ** 2
    assert (estimate.value, estimate.ci_high) == (1, 1)
    assert estimate.ci_low == pytest.approx((low - by_chance) / (1 - by_chance), abs=1e-6)


def test_slides_of_a_patient_count_as_one() -> None:
    first, second = _ratings(EPOC).T
    once = kappa_of_units(first, second, 3)
    three = kappa_of_units(np.tile(first, 3), np.tile(second, 3), 3, np.tile(np.arange(147), 3))
    assert (three.ci_low, three.ci_high) == pytest.approx((once.ci_low, once.ci_high))
    assert three.n_clusters == 147


def test_the_indices_of_prevalence_and_bias_are_those_of_the_two_by_two_table() -> None:
    table = np.array([[40, 9], [6, 45]])
    first = class_agreement(table)[0]
    assert first.observed.value == pytest.approx(0.85)
    assert first.prevalence_index.value == pytest.approx((40 - 45) / 100)
    assert first.bias_index.value == pytest.approx((9 - 6) / 100)
    assert first.bias_index.ci_low < 0.03 < first.bias_index.ci_high
    second = class_agreement(table)[1]
    assert second.prevalence_index.value == pytest.approx(0.05)
    assert class_agreement(EPOC)[1].bias_index.value == pytest.approx((28 - 26) / 147)
    nothing = class_agreement(np.zeros((2, 2), int))[0]
    assert np.isnan([nothing.observed.value, nothing.prevalence_index.value, nothing.bias_index.value]).all()


def test_bootstrap_intervals_do_not_depend_on_the_order_of_rows_or_readers() -> None:
    rng = np.random.default_rng(2)
    ratings = np.where(rng.random((30, 3)) < 0.7, rng.integers(3, size=(30, 1)), rng.integers(3, size=(30, 3)))
    shuffled = ratings[rng.permutation(30)][:, [2, 0, 1]]
    for function in (fleiss_kappa, krippendorff_alpha):
        before, after = (function(r, 3, seed=4, replicates=200) for r in (ratings, shuffled))
        assert (after.value, after.ci_low, after.ci_high) == pytest.approx(
            (before.value, before.ci_low, before.ci_high)
        )
        assert before.ci_low < before.value < before.ci_high


def test_resampled_coefficients_equal_those_of_the_rows_of_each_resample() -> None:
    rng = np.random.default_rng(3)
    ratings = rng.integers(-1, 3, size=(20, 4))
    complete = rng.integers(3, size=(20, 4))
    doubled = krippendorff_alpha(np.vstack([ratings, ratings[:5]]), 3, seed=0, replicates=2, scale="ordinal")
    twice = np.ones(20, int)
    twice[:5] = 2
    repeated = krippendorff_alpha(np.repeat(ratings, twice, axis=0), 3, seed=0, replicates=2, scale="ordinal")
    assert doubled.value == pytest.approx(repeated.value)
    assert fleiss_kappa(complete, 3, seed=0, replicates=2).value == pytest.approx(
        fleiss_kappa(complete[::-1], 3, seed=0, replicates=2).value
    )
