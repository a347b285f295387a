"""Shares of classes that differ between training and population."""

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.prior_shift import adjust_prevalence, estimate_prevalence

TRAINED, POPULATION = np.array([1 / 3, 1 / 3, 1 / 3]), np.array([0.5, 0.19, 0.31])


def _sample(share: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels in a population, and probabilities that are calibrated for `TRAINED`."""
    rng = np.random.default_rng(seed)
    label = rng.choice(3, n, p=share)
    score = rng.normal(size=(n, 3)) + 1.5 * np.eye(3)[label]
    probs = np.exp(1.5 * score)
    return label, probs / probs.sum(axis=1, keepdims=True)


def test_adjusted_probabilities_are_the_frequencies_of_the_population() -> None:
    label, probs = _sample(POPULATION, 60_000, 0)
    adjusted = adjust_prevalence(probs, TRAINED, POPULATION)
    assert adjusted.sum(axis=1) == pytest.approx(1)
    assert adjusted.mean(axis=0) == pytest.approx(np.bincount(label) / 60_000, abs=0.005)
    assert probs.mean(axis=0) != pytest.approx(np.bincount(label) / 60_000, abs=0.02)
    np.testing.assert_allclose(adjust_prevalence(adjusted, POPULATION, TRAINED), probs)


def test_the_population_is_estimated_without_its_labels() -> None:
    covered = []
    for seed in range(40):
        _, probs = _sample(POPULATION, 400, seed)
        estimates = estimate_prevalence(probs, TRAINED, seed, replicates=100)
        assert sum(e.value for e in estimates) == pytest.approx(1)
        covered += [e.ci_low <= share <= e.ci_high for e, share in zip(estimates, POPULATION, strict=True)]
    assert np.mean(covered) > 0.87


def test_copies_change_nothing_and_the_step_is_a_fixed_point() -> None:
    _, probs = _sample(POPULATION, 100, 1)
    once = estimate_prevalence(probs, TRAINED, 0, np.arange(100), replicates=50)
    three = estimate_prevalence(np.tile(probs, (3, 1)), TRAINED, 0, np.tile(np.arange(100), 3), replicates=50)
    for a, b in zip(once, three, strict=True):
        assert (b.value, b.ci_low, b.n_clusters) == (pytest.approx(a.value), pytest.approx(a.ci_low), 100)
    share = np.array([e.value for e in once])
    assert adjust_prevalence(probs, TRAINED, share / share.sum()).mean(axis=0) == pytest.approx(share, abs=1e-5)


def test_no_cases_give_nan_and_wrong_shares_an_error() -> None:
    assert np.isnan(estimate_prevalence(np.zeros((0, 3)), TRAINED, 0)[0].value)
    for trained, population in ((np.array([1.0, 0.0, 0.0]), POPULATION), (TRAINED, POPULATION / 2)):
        with pytest.raises(InputError, match="must be above 0 and sum to 1"):
            adjust_prevalence(np.full((1, 3), 1 / 3), trained, population)
