import numpy as np
import pytest

from crcjax.validation.statistics import aggregate_cases, entropy, evaluate


def test_doubled_slides_of_a_case_change_neither_value_nor_interval() -> None:
    rng = np.random.default_rng(2)
    label, probs = rng.integers(0, 3, 30), rng.dirichlet(np.ones(3), 30)
    ids = [f"c{i}" for i in range(30)]
    cases, once = aggregate_cases(ids, probs)
    _, twice = aggregate_cases([*ids, *ids], np.concatenate([probs, probs]))
    assert cases == ids
    np.testing.assert_allclose(once, twice, atol=1e-12)
    assert (
        evaluate(label, once, ("a", "b", "c"), 0)["accuracy"] == evaluate(label, twice, ("a", "b", "c"), 0)["accuracy"]
    )


def test_cases_are_the_normalised_mean_of_log_probabilities() -> None:
    _, probs = aggregate_cases(["A", "A"], np.array([[0.8, 0.2], [0.5, 0.5]]))
    np.testing.assert_allclose(probs, [[2 / 3, 1 / 3]], atol=1e-12)


def test_perfect_constant_and_absent_classes_give_bounds_or_a_warning() -> None:
    label = np.repeat([0, 1, 2], 5)
    perfect = evaluate(label, np.eye(3)[label] * 0.97 + 0.01, ("a", "b", "c"), 0)
    assert perfect["balanced_accuracy"].value == perfect["macro AUROC"].value == perfect["macro AUROC"].ci_high == 1
    constant = evaluate(label, np.full((15, 3), 1 / 3), ("a", "b", "c"), 0)
    assert constant["macro AUROC"].value == 0.5
    absent = evaluate(np.repeat([0, 1], 5), np.full((10, 3), 1 / 3), ("a", "b", "c"), 0)["balanced_accuracy"]
    assert np.isnan(absent.value)
    assert absent.warnings


def test_the_entropy_of_equal_probabilities_is_the_logarithm_of_their_number() -> None:
    assert entropy(np.full(3, 1 / 3)) == pytest.approx(np.log(3))
    assert entropy(np.array([1.0, 0.0])) == 0
