"""Statistics of predictions against reference labels, by case, with intervals. Needs NumPy and SciPy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from crcjax.validation.estimate import LEVEL, Estimate

# Bins of the expected calibration error.
BINS = 15


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


def confusion_matrix(
    label: Int[np.ndarray, " case"], predicted: Int[np.ndarray, " case"], classes: int
) -> Int[np.ndarray, "reference predicted"]:
    """Counts of cases by reference class (rows) and predicted class (columns)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (label, predicted), 1)
    return counts


def wilson(successes: int, n: int) -> Estimate:
    """A proportion with Wilson's score interval."""
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, "Wilson", 0, warnings=("no cases",))
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), "Wilson", n)


def balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    """The mean recall of confusion matrices (last two axes); NaN if a class has no case."""
    return np.asarray(_recalls(confusion).mean(axis=-1))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """The mean F1 over the classes of confusion matrices (last two axes)."""
    return np.asarray(f1(confusion).mean(axis=-1))


def f1(confusion: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) of each class; NaN if a class is neither present nor predicted."""
    true_positives = np.diagonal(confusion, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore"):
        return 2 * true_positives / (confusion.sum(axis=-1) + confusion.sum(axis=-2))


def _class_f1(k: int, confusion: np.ndarray) -> np.ndarray:
    return f1(confusion)[..., k]


def _recalls(confusion: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.diagonal(confusion, axis1=-2, axis2=-1) / confusion.sum(axis=-1)


def auroc(positive: np.ndarray, score: np.ndarray) -> float:
    """The probability that a positive scores above a negative; ties count half. NaN if either is absent."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    ranks = stats.rankdata(score)
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def macro_auroc(label: Int[np.ndarray, " case"], probs: Float[np.ndarray, "case class"]) -> float:
    """The mean AUROC of every class against the rest."""
    return float(np.mean([auroc(label == k, probs[:, k]) for k in range(probs.shape[1])]))


@dataclass(frozen=True)
class Resamples:
    """Bootstrap resamples, as the number of times each contains a case; all statistics share one set."""

    weights: Int[np.ndarray, "resample case"]

    @classmethod
    def sample(cls, cases: int, seed: int, count: int = 2000) -> Resamples:
        """Samples `cases` cases with replacement, `count` times."""
        rng = np.random.default_rng([seed, 20])
        return cls(rng.multinomial(cases, np.full(cases, 1 / cases), size=count))

    def confusions(self, label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
        """The confusion matrix of every resample, by one matrix product."""
        cells = np.zeros((len(label), classes * classes), np.int64)
        cells[np.arange(len(label)), label * classes + predicted] = 1
        return (self.weights @ cells).reshape(-1, classes, classes)

    def macro_aurocs(self, label: np.ndarray, probs: np.ndarray) -> np.ndarray:
        """The macro AUROC of every resample, from the matrix of positives that score above negatives."""
        total = np.zeros(len(self.weights))
        for k in range(probs.shape[1]):
            positives = self.weights[:, label == k].astype(float)
            negatives = self.weights[:, label != k].astype(float)
            positive_score, negative_score = probs[label == k, k][:, None], probs[label != k, k][None]
            wins = (positive_score > negative_score) + 0.5 * (positive_score == negative_score)
            with np.errstate(invalid="ignore"):
                pairs = positives.sum(axis=1) * negatives.sum(axis=1)
                total += ((positives @ wins) * negatives).sum(axis=1) / pairs
        return total / probs.shape[1]


def percentile_interval(value: float, resampled: np.ndarray, n: int) -> Estimate:
    """The value with the percentile interval of its resamples; a warning counts the omitted resamples that lack a class."""
    usable = resampled[np.isfinite(resampled)]
    method = f"bootstrap over cases, percentile, {len(resampled)} resamples"
    if not np.isfinite(value) or len(usable) < 0.5 * len(resampled):
        return Estimate(value, np.nan, np.nan, method, n, warnings=("a class has too few cases",))
    low, high = np.quantile(usable, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    omitted = len(resampled) - len(usable)
    warnings = [f"{omitted} resamples lacked a class"] if omitted else []
    if low == high:
        warnings.append("the resamples do not vary: the true uncertainty is larger, as Wilson's intervals show")
    return Estimate(value, float(low), float(high), method, n, warnings=tuple(warnings))


@dataclass(frozen=True)
class CalibrationBin:
    """The number of cases in a bin of confidence, their mean confidence, and their accuracy."""

    cases: int
    confidence: float
    accuracy: float


def calibration_bins(confidence: np.ndarray, is_correct: np.ndarray, bins: int = BINS) -> list[CalibrationBin]:
    """The non-empty ones of `bins` right-closed bins of equal width over (0, 1]."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return [
        CalibrationBin(
            int((place == b).sum()), float(confidence[place == b].mean()), float(is_correct[place == b].mean())
        )
        for b in np.unique(place)
    ]


def expected_calibration_error(confidence: np.ndarray, is_correct: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error of the predicted class, over right-closed bins of equal width."""
    filled = calibration_bins(confidence, is_correct, bins)
    return sum(b.cases * abs(b.accuracy - b.confidence) for b in filled) / len(confidence)


def calibrated_ece(probs: Float[np.ndarray, "case class"], seed: int, count: int = 1000) -> np.ndarray:
    """ECEs of a perfectly calibrated model: its labels are sampled from the probabilities, `count` times."""
    rng = np.random.default_rng([seed, 21])
    confidence, predicted = probs.max(axis=1), probs.argmax(axis=1)
    cumulative = probs.cumsum(axis=1)
    sampled = (rng.random((count, len(probs), 1)) > cumulative[None, :, :-1]).sum(axis=-1)
    return np.array([expected_calibration_error(confidence, labels == predicted) for labels in sampled])


def brier(label: np.ndarray, probs: np.ndarray) -> float:
    """The mean Brier score, summed over classes (0 to 2)."""
    return float(((probs - np.eye(probs.shape[1])[label]) ** 2).sum(axis=1).mean())


def entropy(probs: Float[np.ndarray, " class"]) -> float:
    """The entropy in nats."""
    return float(-(probs * np.log(np.maximum(probs, 1e-300))).sum())


Statistic = Callable[[np.ndarray], np.ndarray]


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
    n, predicted = len(label), probs.argmax(axis=1)
    confusion = confusion_matrix(label, predicted, len(classes))
    resamples = Resamples.sample(n, seed)
    confusions = resamples.confusions(label, predicted, len(classes))
    confidence, is_correct = probs.max(axis=1), predicted == label
    ece = expected_calibration_error(confidence, is_correct)
    null = calibrated_ece(probs, seed)

    def with_interval(statistic: Statistic) -> Estimate:
        return percentile_interval(float(statistic(confusion)), statistic(confusions), n)

    return {
        "accuracy": wilson(int(is_correct.sum()), n),
        "accuracy, no-calls counted wrong": wilson(int(is_correct.sum()), n + no_calls),
        "no-call rate": wilson(no_calls, n + no_calls),
        "balanced_accuracy": with_interval(balanced_accuracy),
        "macro AUROC": percentile_interval(macro_auroc(label, probs), resamples.macro_aurocs(label, probs), n),
        "macro F1": with_interval(macro_f1),
        **{f"F1 {name}": with_interval(partial(_class_f1, k)) for k, name in enumerate(classes)},
        **{
            f"sensitivity {name}": wilson(int(confusion[k, k]), int(confusion[k].sum()))
            for k, name in enumerate(classes)
        },
        "no-information rate": float(confusion.sum(axis=1).max() / n),
        "Brier score": brier(label, probs),
        "ECE": ece,
        "ECE expected if calibrated": float(null.mean()),
        "ECE p-value": float((1 + (null >= ece).sum()) / (1 + len(null))),
        "confusion matrix": confusion.tolist(),
    }
