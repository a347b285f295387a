"""The fast coefficients are those of the reported Cox models."""

import numpy as np
import pytest

from crcjax.validation.cox import cox
from crcjax.validation.cox_slopes import cox_slopes
from crcjax.validation.survival import FollowUp


def _patients(seed: int, count: int = 80) -> tuple[FollowUp, np.ndarray, np.ndarray]:
    """Patients with ties, covariates of different size, and three strata."""
    rng = np.random.default_rng(seed)
    matrix = np.column_stack([rng.normal(60, 10, count), rng.random(count) < 0.3]).astype(float)
    time = np.ceil(rng.exponential(10 * np.exp(-0.5 * matrix[:, 1]), count))
    return FollowUp(time, rng.random(count) < 0.7), matrix, rng.integers(0, 3, count)


@pytest.mark.parametrize("seed", range(20))
def test_coefficients_are_those_of_statsmodels_with_ties_and_strata(seed: int) -> None:
    follow_up, matrix, strata = _patients(seed)
    for groups in (None, strata):
        model = cox(follow_up, {"age": matrix[:, 0], "arm": matrix[:, 1]}, groups)
        expected = [coefficient.log_hazard_ratio.value for coefficient in model.coefficients.values()]
        assert cox_slopes(follow_up, matrix, groups) == pytest.approx(expected, abs=1e-6)


def test_data_that_determine_no_coefficient_give_none() -> None:
    follow_up, matrix, _ = _patients(0)
    constant = np.column_stack([matrix[:, 0], np.ones(len(matrix))])
    twice = np.column_stack([matrix[:, 0], 2 * matrix[:, 0] + 1])
    separating = -follow_up.time[:, None] * follow_up.is_event[:, None] - 1000.0 * ~follow_up.is_event[:, None]
    for columns in (constant, twice, separating):
        assert np.isnan(cox_slopes(follow_up, columns)).all()
    assert np.isnan(cox_slopes(FollowUp(follow_up.time, np.zeros(len(matrix), bool)), matrix)).all()
