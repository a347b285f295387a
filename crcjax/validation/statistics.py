"""The statistics of the short report, by case, with intervals."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from crcjax.validation import decisions
from crcjax.validation.calibration_error import top_label_error
from crcjax.validation.confusion import confusion_matrix
from crcjax.validation.probability_scores import brier_score
from crcjax.validation.proportions import wilson
from crcjax.validation.ranking import macro_auroc_estimate


def aggregate_cases(
    case_ids: list[str], probs: Float[np.ndarray, "slide class"]
) -> tuple[list[str], Float[np.ndarray, "case class"]]:
    """Combines the slides of each case: the mean log-probability over slides, normalised.

    Returns:
      The case ids in order of appearance, and the probabilities of each case.
    """
    cases = list(dict.fromkeys(case_ids))
    index = {case: i for i, case in enumerate(cases)}
    total = np.zeros((len(cases), probs.shape[1]))
    np.add.at(total, [index[case] for case in case_ids], np.log(np.maximum(probs, 1e-15)))
    total /= np.bincount([index[case] for case in case_ids])[:, None]
    shifted = np.exp(total - total.max(axis=1, keepdims=True))
    return cases, shifted / shifted.sum(axis=1, keepdims=True)


def entropy(probs: Float[np.ndarray, " class"]) -> float:
    """The entropy in nats."""
    return float(-(probs * np.log(np.maximum(probs, 1e-300))).sum())


def evaluate(
    label: Int[np.ndarray, " case"],
    probs: Float[np.ndarray, "case class"],
    classes: tuple[str, ...],
    seed: int,
    no_calls: int = 0,
) -> dict:
    """Computes all statistics of the report.

    Args:
      label: the reference classes of the cases with a prediction.
      probs: the probabilities of these cases.
      classes: the names of the classes.
      seed: the seed of the bootstrap.
      no_calls: the number of further cases that have a reference but no slide with a prediction.

    Returns:
      Estimates and plain numbers by name.
    """
    n, predicted, count = len(label), probs.argmax(axis=1), len(classes)
    correct = int((predicted == label).sum())
    rates = decisions.class_rates(label, predicted, count)
    calibration = top_label_error(label, probs, seed)
    return {
        "accuracy": wilson(correct, n),
        "accuracy, no-calls counted wrong": wilson(correct, n + no_calls),
        "no-call rate": wilson(no_calls, n + no_calls),
        "balanced_accuracy": decisions.balanced_accuracy(label, predicted, count),
        "macro AUROC": macro_auroc_estimate(label, probs),
        "macro F1": decisions.macro_f1(label, predicted, count),
        **{f"F1 {name}": rate.f1 for name, rate in zip(classes, rates, strict=True)},
        **{f"sensitivity {name}": rate.sensitivity for name, rate in zip(classes, rates, strict=True)},
        "no-information rate": decisions.no_information_rate(label, predicted).rate,
        "Brier score": brier_score(label, probs),
        "ECE": calibration.error,
        "ECE expected if calibrated": calibration.null_mean,
        "ECE p-value": calibration.test.p_value,
        "confusion matrix": confusion_matrix(label, predicted, count).tolist(),
    }
