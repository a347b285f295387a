"""Formulas of confusion matrices over the last two axes, reference by predicted class, for one study or many resamples.

A value that the counts do not determine is NaN. Gradients are derivatives with respect to the share of each cell: the
influence of a case is the gradient of its cell minus the mean gradient.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Real
from numpy.typing import ArrayLike

from crcjax.errors import InputError

Confusions = Real[np.ndarray, "*study reference predicted"]
ByClass = Float[np.ndarray, "*study class"]
ByStudy = Float[np.ndarray, "*study"]


def confusion_matrix(
    label: Int[np.ndarray, " unit"], predicted: Int[np.ndarray, " unit"], classes: int
) -> Int[np.ndarray, "reference predicted"]:
    """Counts of units by reference class (rows) and predicted class (columns).

    Raises InputError for a class outside 0 to `classes` - 1.
    """
    for name, values in (("reference", label), ("predicted", predicted)):
        if len(values) and not (values.min() >= 0 and values.max() < classes):
            wrong = values[(values < 0) | (values >= classes)][0]
            raise InputError(f"a {name} class must be from 0 to {classes - 1}, got {wrong}; check the classes' order")
    return np.bincount(label * classes + predicted, minlength=classes**2).reshape(classes, classes)


def accuracies(confusion: Confusions) -> ByStudy:
    """The share of cases on the diagonal."""
    return _divide(_hits(confusion).sum(axis=-1), confusion.sum(axis=(-2, -1)))


def sensitivities(confusion: Confusions) -> ByClass:
    """The share of each reference class that is predicted as such; NaN if the class has no case."""
    return _divide(_hits(confusion), confusion.sum(axis=-1))


def specificities(confusion: Confusions) -> ByClass:
    """The share of all other reference classes that is not predicted as the class."""
    others = confusion.sum(axis=(-2, -1))[..., None] - confusion.sum(axis=-1)
    return _divide(others - (confusion.sum(axis=-2) - _hits(confusion)), others)


def positive_predictive_values(confusion: Confusions) -> ByClass:
    """The share of each predicted class that is right, at the prevalence of the study."""
    return _divide(_hits(confusion), confusion.sum(axis=-2))


def negative_predictive_values(confusion: Confusions) -> ByClass:
    """The share of the cases not predicted as the class that are not of it, at the prevalence of the study."""
    others = confusion.sum(axis=(-2, -1))[..., None] - confusion.sum(axis=-2)
    return _divide(others - (confusion.sum(axis=-1) - _hits(confusion)), others)


def f1_scores(confusion: Confusions) -> ByClass:
    """2 TP / (2 TP + FP + FN) of each class; NaN if it is neither present nor predicted."""
    return _divide(2 * _hits(confusion), confusion.sum(axis=-1) + confusion.sum(axis=-2))


def balanced_accuracies(confusion: Confusions) -> ByStudy:
    """The mean sensitivity; NaN if a class has no case."""
    return np.asarray(sensitivities(confusion).mean(axis=-1))


def macro_f1_scores(confusion: Confusions) -> ByStudy:
    """The mean F1 score over the classes."""
    return np.asarray(f1_scores(confusion).mean(axis=-1))


def matthews_correlations(confusion: Confusions) -> ByStudy:
    """Matthews' correlation coefficient for several classes (Gorodkin 2004); NaN if all cases are of one class."""
    share = _shares(confusion)
    reference, predicted = share.sum(axis=-1), share.sum(axis=-2)
    covariance = _hits(share).sum(axis=-1) - (reference * predicted).sum(axis=-1)
    spread = (1 - (reference**2).sum(axis=-1)) * (1 - (predicted**2).sum(axis=-1))
    return _divide(covariance, np.sqrt(np.maximum(spread, 0)))


def disagreement_weights(classes: int, scale: str = "nominal") -> Float[np.ndarray, "class class"]:
    """How much a pair of classes counts as disagreement: 0 or 1, or the distance of ordered classes, or its square."""
    distance = np.abs(np.subtract.outer(np.arange(classes), np.arange(classes))).astype(float)
    return (distance > 0).astype(float) if scale == "nominal" else distance ** (2 if scale == "quadratic" else 1)


def kappas(confusion: Confusions, weights: Float[np.ndarray, "class class"] | None = None) -> ByStudy:
    """Cohen's kappa, with the weights of disagreements; NaN if both give every case the same class."""
    share = _shares(confusion)
    weights = disagreement_weights(share.shape[-1]) if weights is None else weights
    by_chance = share.sum(axis=-1)[..., :, None] * share.sum(axis=-2)[..., None, :]
    observed, expected = ((table * weights).sum(axis=(-2, -1)) for table in (share, by_chance))
    return _divide(expected - observed, expected)


def f1_gradients(
    confusion: Real[np.ndarray, "reference predicted"],
) -> Float[np.ndarray, "class reference predicted"]:
    """The gradient of each class's F1 score (Takahashi et al. 2022)."""
    share, classes = _shares(confusion), np.arange(len(confusion))
    is_row = (classes[:, None] == classes)[:, :, None]
    is_column = is_row.transpose(0, 2, 1)
    score = f1_scores(confusion)[:, None, None]
    return _divide(
        2 * (is_row & is_column) - score * (is_row * 1.0 + is_column),
        (share.sum(axis=1) + share.sum(axis=0))[:, None, None],
    )


def matthews_gradient(
    confusion: Real[np.ndarray, "reference predicted"],
) -> Float[np.ndarray, "reference predicted"]:
    """The gradient of Matthews' correlation coefficient."""
    share = _shares(confusion)
    reference, predicted = share.sum(axis=1), share.sum(axis=0)
    spread_reference, spread_predicted = 1 - (reference**2).sum(), 1 - (predicted**2).sum()
    covariance_gradient = np.eye(len(share)) - predicted[:, None] - reference[None, :]
    # The logarithmic derivative of the two spreads under the root.
    shrinkage = _divide(reference, spread_reference)[:, None] + _divide(predicted, spread_predicted)[None, :]
    value = matthews_correlations(share)
    return _divide(covariance_gradient, np.sqrt(spread_reference * spread_predicted)) + value * shrinkage


def kappa_gradient(
    confusion: Real[np.ndarray, "reference predicted"], weights: Float[np.ndarray, "class class"] | None = None
) -> Float[np.ndarray, "reference predicted"]:
    """The gradient of Cohen's kappa; its multinomial variance is that of Fleiss, Cohen and Everitt (1969)."""
    share = _shares(confusion)
    weights = disagreement_weights(len(share)) if weights is None else weights
    first, second = share.sum(axis=1), share.sum(axis=0)
    chance_gradient = (weights @ second)[:, None] + (first @ weights)[None, :]
    return _divide((1 - kappas(share, weights)) * chance_gradient - weights, first @ weights @ second)


def cell_influence(
    gradient: Float[np.ndarray, "reference predicted"],
    label: Int[np.ndarray, " unit"],
    predicted: Int[np.ndarray, " unit"],
) -> Float[np.ndarray, " unit"]:
    """The influence of every unit on a statistic of the confusion matrix."""
    influence = gradient[label, predicted]
    return influence - influence.mean()


def _shares(confusion: Confusions) -> Confusions:
    return _divide(confusion, confusion.sum(axis=(-2, -1), keepdims=True))


def _hits(confusion: Confusions) -> np.ndarray:
    return np.diagonal(confusion, axis1=-2, axis2=-1)


def _divide(numerator: ArrayLike, denominator: ArrayLike) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.asarray(numerator) / np.asarray(denominator, float)
    return np.where(np.isfinite(ratio), ratio, np.nan)
