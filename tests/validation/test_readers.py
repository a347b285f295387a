"""A system beside readers: mean pairwise kappas and their bootstrap over cases and readers."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from crcjax.errors import InputError
from crcjax.validation.agreement import MISSING
from crcjax.validation.readers import compare_with_readers


def _study(seed: int, cases: int = 80, readers: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=cases)

    def rate(error: float, shape: tuple[int, ...]) -> np.ndarray:
        return np.where(
            rng.random(shape) < error, rng.integers(3, size=shape), truth.reshape(-1, *(1,) * (len(shape) - 1))
        )

    return rate(0.2, (cases,)), rate(0.2, (cases, readers))


def test_the_values_are_means_of_scikit_learn_s_kappas() -> None:
    system, ratings = _study(0)
    result = compare_with_readers(system, ratings, 3, seed=0, replicates=200)
    with_system = [cohen_kappa_score(system, rating) for rating in ratings.T]
    among = [cohen_kappa_score(ratings[:, i], ratings[:, j]) for i in range(4) for j in range(i)]
    assert result.system.value == pytest.approx(np.mean(with_system))
    assert result.readers.value == pytest.approx(np.mean(among))
    assert result.difference.value == pytest.approx(np.mean(with_system) - np.mean(among))
    assert [e.value for e in result.by_reader] == pytest.approx(with_system)
    for estimate in (result.system, result.readers, result.difference, *result.by_reader):
        assert estimate.ci_low < estimate.value < estimate.ci_high
        assert estimate.n == 80


def test_a_system_like_the_readers_is_covered_and_a_bad_one_is_found() -> None:
    covered = []
    for seed in range(60):
        result = compare_with_readers(*_study(seed, 60, 5), 3, seed=0, replicates=200)
        covered.append(result.difference.ci_low <= 0 <= result.difference.ci_high)
    assert np.mean(covered) > 0.85
    system, ratings = _study(1)
    bad = compare_with_readers(np.roll(system, 1), ratings, 3, seed=0, replicates=200)
    assert bad.difference.ci_high < 0


def test_a_reader_is_never_compared_with_a_copy_of_itself() -> None:
    # The two readers never agree: a copy would raise the mean kappa above theirs.
    ratings = np.column_stack([np.tile([0, 1], 20), np.tile([1, 0], 20)])
    result = compare_with_readers(np.tile([0, 1], 20), ratings, 2, seed=0, replicates=300)
    assert result.readers.value == -1
    assert result.readers.warnings
    assert not result.readers.ci_high > -0.5


def test_missing_ratings_leave_a_pair_to_the_cases_of_both() -> None:
    system, ratings = _study(2)
    ratings[::3, 0] = MISSING
    result = compare_with_readers(system, ratings, 3, seed=0, replicates=100)
    known = ratings[:, 0] != MISSING
    assert result.by_reader[0].value == pytest.approx(cohen_kappa_score(system[known], ratings[known, 0]))


def test_the_order_of_cases_and_of_readers_changes_nothing() -> None:
    system, ratings = _study(3)
    order = np.random.default_rng(0).permutation(80)
    before = compare_with_readers(system, ratings, 3, seed=5, replicates=200)
    after = compare_with_readers(system[order], ratings[order][:, [2, 0, 3, 1]], 3, seed=5, replicates=200)
    for name in ("system", "readers", "difference"):
        a, b = getattr(before, name), getattr(after, name)
        assert (b.value, b.ci_low, b.ci_high) == pytest.approx((a.value, a.ci_low, a.ci_high))


def test_one_reader_or_one_case_gives_nan_and_a_wrong_rating_an_error() -> None:
    for arguments in ((np.array([0, 1]), np.array([[0], [1]])), (np.array([0]), np.array([[0, 1]]))):
        result = compare_with_readers(*arguments, 2, seed=0)
        assert np.isnan(result.difference.value)
        assert result.difference.warnings
    with pytest.raises(InputError, match="a rating must be a class from 0 to 1"):
        compare_with_readers(np.array([0, 2]), np.array([[0, 1], [1, 1]]), 2, seed=0)
