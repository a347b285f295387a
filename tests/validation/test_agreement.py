"""Coefficients of agreement against published examples."""

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.agreement import MISSING, cohen_kappa, fleiss_kappa, gwet_ac1, krippendorff_alpha

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
    estimate = fleiss_kappa(ratings, 5, seed=0, resamples=200)
    assert estimate.value == pytest.approx(0.2099307, abs=1e-6)
    assert estimate.ci_low < estimate.value < estimate.ci_high


@pytest.mark.parametrize(("scale", "value"), [("nominal", 0.7434211), ("ordinal", 0.8153875), ("interval", 0.8491071)])
def test_krippendorff_s_alpha_has_the_published_values_with_missing_ratings(scale: str, value: float) -> None:
    estimate = krippendorff_alpha(KRIPPENDORFF_2011, 5, seed=0, scale=scale, resamples=100)
    assert estimate.value == pytest.approx(value, abs=1e-6)
    # One unit has a single rating.
    assert (estimate.n, estimate.n_excluded) == (11, 1)
    two = krippendorff_alpha(_ratings(GWET), 3, seed=0, resamples=10)
    assert two.value == pytest.approx(0.79726, abs=1e-5)


def test_the_order_of_cases_and_of_readers_changes_no_value() -> None:
    rng = np.random.default_rng(0)
    shuffled = KRIPPENDORFF_2011[rng.permutation(12)][:, rng.permutation(4)]
    for statistic in (gwet_ac1, lambda r, c: krippendorff_alpha(r, c, seed=0, resamples=10)):
        assert statistic(shuffled, 5).value == pytest.approx(statistic(KRIPPENDORFF_2011, 5).value)


def test_agreement_that_the_data_do_not_determine_is_nan_with_a_warning() -> None:
    one_class = np.zeros((6, 2), int)
    for estimate in (
        cohen_kappa(np.array([[9, 0], [0, 0]])),
        cohen_kappa(np.zeros((3, 3), int)),
        fleiss_kappa(one_class, 3, seed=0, resamples=10),
        krippendorff_alpha(one_class, 3, seed=0, resamples=10),
        gwet_ac1(np.full((4, 2), MISSING), 3),
        krippendorff_alpha(np.array([[0, MISSING], [1, MISSING]]), 3, seed=0, resamples=10),
    ):
        assert np.isnan(estimate.value)
        assert estimate.warnings
    assert cohen_kappa(np.diag([4, 5])).warnings


def test_wrong_ratings_are_refused() -> None:
    with pytest.raises(InputError, match="a rating must be a class from 0 to 2"):
        gwet_ac1(np.array([[0, 3], [1, 1]]), 3)
    with pytest.raises(InputError, match="needs a rating of every case"):
        fleiss_kappa(np.array([[0, MISSING], [1, 1]]), 3, seed=0)
