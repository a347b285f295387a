"""Formulas of confusion matrices against scikit-learn, and gradients against differences."""

import numpy as np
import pytest
from sklearn import metrics

from crcjax.errors import InputError
from crcjax.validation import confusion as formulas
from crcjax.validation.confusion import confusion_matrix

GOLDEN = np.array([[58, 4, 11], [5, 19, 4], [9, 3, 34]])


def test_the_golden_matrix_has_the_published_values() -> None:
    assert formulas.accuracies(GOLDEN) == pytest.approx(0.7551020, abs=1e-6)
    assert formulas.balanced_accuracies(GOLDEN) == pytest.approx(0.7374075, abs=1e-6)
    assert formulas.macro_f1_scores(GOLDEN) == pytest.approx(0.7398311, abs=1e-6)
    assert formulas.matthews_correlations(GOLDEN) == pytest.approx(0.6045350, abs=1e-6)
    assert formulas.kappas(GOLDEN) == pytest.approx(0.6042181, abs=1e-6)
    assert formulas.sensitivities(GOLDEN)[1] == pytest.approx(0.678571, abs=1e-6)
    assert formulas.specificities(GOLDEN)[1] == pytest.approx(0.941176, abs=1e-6)
    assert formulas.positive_predictive_values(GOLDEN)[1] == pytest.approx(0.730769, abs=1e-6)
    assert formulas.negative_predictive_values(GOLDEN)[1] == pytest.approx(0.925620, abs=1e-6)
    assert formulas.f1_scores(GOLDEN)[1] == pytest.approx(0.703704, abs=1e-6)


def test_formulas_equal_scikit_learn_s_for_one_matrix_and_for_many() -> None:
    rng = np.random.default_rng(0)
    tables = []
    for _ in range(20):
        label, predicted = rng.integers(4, size=60), rng.integers(4, size=60)
        table = confusion_matrix(label, predicted, 4)
        assert (table == metrics.confusion_matrix(label, predicted)).all()
        assert formulas.accuracies(table) == pytest.approx(metrics.accuracy_score(label, predicted))
        assert formulas.balanced_accuracies(table) == pytest.approx(metrics.balanced_accuracy_score(label, predicted))
        assert formulas.macro_f1_scores(table) == pytest.approx(metrics.f1_score(label, predicted, average="macro"))
        assert formulas.matthews_correlations(table) == pytest.approx(metrics.matthews_corrcoef(label, predicted))
        assert formulas.kappas(table) == pytest.approx(metrics.cohen_kappa_score(label, predicted))
        tables.append(table)
    for formula in (formulas.specificities, formulas.negative_predictive_values, formulas.kappas):
        np.testing.assert_allclose(formula(np.stack(tables)), np.stack([formula(table) for table in tables]))


@pytest.mark.parametrize("name", ["f1", "matthews", "kappa"])
def test_gradients_equal_differences_up_to_a_constant(name: str) -> None:
    values, gradients = {
        "f1": (formulas.f1_scores, formulas.f1_gradients),
        "matthews": (formulas.matthews_correlations, lambda t: formulas.matthews_gradient(t)[None]),
        "kappa": (formulas.kappas, lambda t: formulas.kappa_gradient(t)[None]),
    }[name]
    share, step = GOLDEN / GOLDEN.sum(), 1e-6
    for k, gradient in enumerate(gradients(GOLDEN)):
        measured = np.zeros((3, 3))
        for cell in np.ndindex(3, 3):
            # Mixing in a little of one cell: the derivative is the gradient there less its mean.
            mixed = [(1 - e) * share for e in (step, -step)]
            mixed[0][cell], mixed[1][cell] = mixed[0][cell] + step, mixed[1][cell] - step
            up, down = (np.atleast_1d(values(m))[k] for m in mixed)
            measured[cell] = (up - down) / (2 * step)
        np.testing.assert_allclose(gradient - (share * gradient).sum(), measured, atol=1e-7)


def test_values_that_the_counts_do_not_determine_are_nan() -> None:
    absent = np.array([[5, 0, 0], [1, 4, 0], [0, 0, 0]])
    assert np.isnan(formulas.balanced_accuracies(absent))
    assert np.isnan(formulas.macro_f1_scores(absent))
    assert np.isnan(formulas.positive_predictive_values(absent)[2])
    assert formulas.specificities(absent)[2] == 1
    one_class = np.diag([9, 0])
    assert np.isnan(formulas.matthews_correlations(one_class))
    assert np.isnan(formulas.kappas(one_class))
    assert np.isnan(formulas.accuracies(np.zeros((2, 2), int)))
    # Everything is predicted as one class: the correlation is not defined, kappa is 0.
    assert np.isnan(formulas.matthews_correlations(np.array([[3, 0], [4, 0]])))
    assert formulas.kappas(np.array([[3, 0], [4, 0]])) == 0


def test_unknown_classes_are_refused() -> None:
    with pytest.raises(InputError, match="a reference class must be from 0 to 1, got 2"):
        confusion_matrix(np.array([0, 2]), np.array([0, 1]), 2)
    with pytest.raises(InputError, match="a predicted class must be from 0 to 1, got -1"):
        confusion_matrix(np.array([0, 1]), np.array([0, -1]), 2)
