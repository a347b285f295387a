"""Standard errors from influences."""

import numpy as np
import pytest

from crcjax.validation.influence import clustered_error, count_clusters, wald_estimate


def test_the_error_of_a_mean_is_the_standard_deviation_over_the_root_of_n() -> None:
    value = np.random.default_rng(0).normal(size=40)
    assert clustered_error(value - value.mean()) == pytest.approx(value.std() / np.sqrt(40))


def test_copies_of_units_add_nothing_and_opposite_units_of_a_patient_cancel() -> None:
    influence, patient = np.array([1.0, -2.0, 1.0]), np.arange(3)
    four = clustered_error(np.tile(influence, 4), np.tile(patient, 4))
    assert four == pytest.approx(clustered_error(influence))
    assert clustered_error(np.array([1.0, -1.0, 2.0, -2.0]), np.array([7, 7, 3, 3])) == 0
    assert (count_clusters(None), count_clusters(np.array([7, 7, 3]))) == (None, 2)


def test_limits_are_symmetric_and_cut_at_the_bounds() -> None:
    influence = np.tile([1.0, -1.0], 50)
    estimate = wald_estimate(0.9, influence, "delta", bounds=(0.0, 1.0), warnings=("few",))
    assert (estimate.ci_low, estimate.ci_high) == (pytest.approx(0.9 - 0.1959964, abs=1e-7), 1.0)
    assert (estimate.n, estimate.n_clusters, estimate.warnings, estimate.method) == (100, None, ("few",), "delta")


def test_no_variance_or_one_patient_gives_the_value_without_limits() -> None:
    for estimate, reason in (
        (wald_estimate(0.5, np.zeros(9), "delta"), "no variance"),
        (wald_estimate(0.5, np.array([1.0, -0.5]), "delta", np.array([4, 4])), "one patient"),
    ):
        assert estimate.value == 0.5
        assert np.isnan([estimate.ci_low, estimate.ci_high]).all()
        assert reason in estimate.warnings[-1]
