"""All statistics of a table of predictions for every resample of a bootstrap over patients, by matrix products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from crcjax.validation import confusion as formulas
from crcjax.validation.bootstrap import REPLICATES, Interval, Resamples, Weights, number_patients
from crcjax.validation.calibration_error import bins_of
from crcjax.validation.estimate import Estimate

Replicates = Float[np.ndarray, "*value replicate"]


def table_statistics(
    label: Int[np.ndarray, " unit"],
    probs: Float[np.ndarray, "unit class"],
    seed: int,
    cluster: Int[np.ndarray, " unit"] | None = None,
    stratum: Int[np.ndarray, " unit"] | None = None,
    *,
    predicted: Int[np.ndarray, " unit"] | None = None,
    replicates: int = REPLICATES,
    interval: Interval = "percentile",
) -> dict[str, Estimate]:
    """Bootstrap estimates of every statistic of a table of predictions.

    Args:
      label: the reference classes.
      probs: the probabilities.
      seed: the seed of the resamples.
      cluster: the patient of each unit; None if each unit is a patient of its own.
      stratum: the stratum of each unit, such as its site and class.
      predicted: the decisions; by default the classes with the largest probability.
      replicates: the number of resamples.
      interval: "bca" for small studies.

    Returns:
      Estimates by name; those of a class end with its index, such as `sensitivity_0`.
    """
    predicted = probs.argmax(axis=1) if predicted is None else predicted
    resamples = _resample(label, (predicted, probs), seed, cluster, stratum, replicates, interval)
    values = _replicates(resamples, label, probs, predicted)
    return {name: resamples.estimate(value, centred=name == "ece") for name, value in values.items()}


def compare_tables(
    label: Int[np.ndarray, " unit"],
    first: Float[np.ndarray, "unit class"],
    second: Float[np.ndarray, "unit class"],
    seed: int,
    cluster: Int[np.ndarray, " unit"] | None = None,
    stratum: Int[np.ndarray, " unit"] | None = None,
    *,
    replicates: int = REPLICATES,
    interval: Interval = "percentile",
) -> dict[str, Estimate]:
    """Every statistic of `first` less that of `second`, for two systems on the same units in the same resamples.

    Lower is better for `brier`, `log_loss` and `ece`. Judge one of them that was named before the data were unblinded. Arguments
    and names as for `table_statistics`.
    """
    resamples = _resample(label, (first, second), seed, cluster, stratum, replicates, interval)
    values, others = (_replicates(resamples, label, probs, probs.argmax(axis=1)) for probs in (first, second))
    return {name: resamples.estimate(value - others[name]) for name, value in values.items()}


def _resample(
    label: np.ndarray,
    predictions: tuple[np.ndarray, ...],
    seed: int,
    cluster: np.ndarray | None,
    stratum: np.ndarray | None,
    replicates: int,
    interval: Interval,
) -> Resamples:
    strata = np.zeros(len(label), int) if stratum is None else stratum
    patient = number_patients(cluster, strata, label, *predictions)
    return Resamples.sample(patient, seed, replicates, stratum, interval)


def _replicates(
    resamples: Resamples, label: np.ndarray, probs: np.ndarray, predicted: np.ndarray
) -> dict[str, Float[np.ndarray, " column"]]:
    return {
        **decision_replicates(resamples, label, predicted, probs.shape[1]),
        **ranking_replicates(resamples, label, probs),
        **probability_replicates(resamples, label, probs),
    }


def decision_replicates(
    resamples: Resamples, label: Int[np.ndarray, " unit"], predicted: Int[np.ndarray, " unit"], classes: int
) -> dict[str, Float[np.ndarray, " column"]]:
    """Statistics of the confusion matrix, which is a sum over patients."""
    cells = np.zeros((len(label), classes**2))
    cells[np.arange(len(label)), label * classes + predicted] = 1
    confusions = resamples.totals(cells).T.reshape(-1, classes, classes)
    of_study = {
        "accuracy": formulas.accuracies,
        "balanced_accuracy": formulas.balanced_accuracies,
        "macro_f1": formulas.macro_f1_scores,
        "mcc": formulas.matthews_correlations,
        "kappa": formulas.kappas,
    }
    of_class = {
        "sensitivity": formulas.sensitivities,
        "specificity": formulas.specificities,
        "ppv": formulas.positive_predictive_values,
        "npv": formulas.negative_predictive_values,
        "f1": formulas.f1_scores,
    }
    values = {name: formula(confusions) for name, formula in of_study.items()}
    for name, formula in of_class.items():
        by_class = formula(confusions)
        values |= {f"{name}_{k}": by_class[:, k] for k in range(classes)}
    return values


def ranking_replicates(
    resamples: Resamples, label: Int[np.ndarray, " unit"], probs: Float[np.ndarray, "unit class"]
) -> dict[str, Float[np.ndarray, " column"]]:
    """AUROC and average precision of every class against the rest, their means, and the M of Hand and Till."""
    values: dict[str, np.ndarray] = {}
    pairs: list[np.ndarray] = []
    classes = range(probs.shape[1])
    for k in classes:
        auroc, precision, *against = resamples.evaluate(weighted_areas(label, k, probs[:, k], resamples.patient))
        values |= {f"auroc_{k}": auroc, f"average_precision_{k}": precision}
        pairs.extend(area for other, area in enumerate(against) if other != k)
    for name in ("auroc", "average_precision"):
        values[f"macro_{name}"] = np.mean([values[f"{name}_{k}"] for k in classes], axis=0)
    return values | {"hand_till": np.mean(pairs, axis=0)}


def weighted_areas(
    label: Int[np.ndarray, " unit"], k: int, score: Float[np.ndarray, " unit"], patient: Int[np.ndarray, " unit"]
) -> Callable[[Weights], Float[np.ndarray, "area replicate"]]:
    """The statistic whose rows are the areas of a score for class `k`.

    They are the AUROC against all other classes, with ties counting half; the average precision; and, for every class, the
    AUROC against that class alone, which is NaN for `k` itself. All are NaN without a unit of either side.
    """
    classes = max(int(label.max(initial=0)), k) + 1
    order = np.argsort(-score, kind="stable")
    positive, negative = order[label[order] == k], order[label[order] != k]
    falling, falling_negative = -score[positive], -score[negative]
    # For each negative, the positives that score above it, and those that score at least as high.
    above = np.searchsorted(falling, falling_negative, side="left")
    not_below = np.searchsorted(falling, falling_negative, side="right")
    has_ties = bool((above != not_below).any())
    # For each positive, the units of either side that its threshold accepts.
    accepted = np.searchsorted(falling, falling, side="right")
    accepted_negative = np.searchsorted(falling_negative, falling, side="right")
    is_class = (label[negative] == np.arange(classes)[:, None]).astype(float)

    def areas(weights: Weights) -> Float[np.ndarray, "area replicate"]:
        positives, negatives = weights[patient[positive]], weights[patient[negative]]
        cumulative, cumulative_negative = _from_zero(positives), _from_zero(negatives)
        beaten_by = cumulative[above]
        if has_ties:
            beaten_by = (beaten_by + cumulative[not_below]) / 2
        total, total_negative = cumulative[-1], cumulative_negative[-1]
        wins, opponents = is_class @ (negatives * beaten_by), is_class @ negatives
        true_positives = cumulative[accepted]
        predicted = np.maximum(true_positives + cumulative_negative[accepted_negative], 1)
        precision = np.einsum("ij,ij->j", positives, true_positives / predicted) / total
        auroc = wins.sum(axis=0) / (total * total_negative)
        # Without negatives every threshold is right, which is no achievement.
        return np.vstack([auroc, np.where(total_negative > 0, precision, np.nan), wins / (total * opponents)])

    return areas


def _from_zero(weights: Weights) -> Float[np.ndarray, "threshold replicate"]:
    """Cumulative sums over rows, with a first row of zeros."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def probability_replicates(
    resamples: Resamples, label: Int[np.ndarray, " unit"], probs: Float[np.ndarray, "unit class"]
) -> dict[str, Float[np.ndarray, " column"]]:
    """Brier score, log loss and expected calibration error."""
    n = len(label)
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == label
    place, bins = bins_of(confidence)
    columns = np.zeros((n, 3 + bins))
    columns[:, 0] = 1
    columns[:, 1] = ((probs - np.eye(probs.shape[1])[label]) ** 2).sum(axis=1)
    columns[:, 2] = -np.log(np.maximum(probs[np.arange(n), label], 1e-15))
    columns[np.arange(n), 3 + place] = correct - confidence
    by_patient = resamples.sums(columns).T

    def scores(weights: Weights) -> Replicates:
        size, brier, loss, *gaps = by_patient @ weights
        return np.stack([brier / size, loss / size, np.abs(gaps).sum(axis=0) / size])

    brier, loss, ece = resamples.evaluate(scores)
    return {"brier": brier, "log_loss": loss, "ece": ece}
