"""Statistics of predictions against reference labels, by case. NumPy alone; every estimate carries its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

LEVEL = 0.95
BINS = 15


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; NaN, with the reason in `warnings`, where the data do not determine it."""

    value: float
    ci_low: float
    ci_high: float
    method: str
    n: int
    level: float = LEVEL
    warnings: tuple[str, ...] = field(default=())


def aggregate_cases(
    case_ids: list[str], probs: Float[np.ndarray, "slide class"]
) -> tuple[list[str], Float[np.ndarray, "case class"]]:
    """Cases in order of appearance and their probabilities: the mean log-probability over slides, normalised."""
    cases = list(dict.fromkeys(case_ids))
    index = {case: i for i, case in enumerate(cases)}
    total = np.zeros((len(cases), probs.shape[1]))
    np.add.at(total, [index[case] for case in case_ids], np.log(np.maximum(probs, 1e-15)))
    total /= np.bincount([index[case] for case in case_ids])[:, None]
    shifted = np.exp(total - total.max(axis=1, keepdims=True))
    return cases, shifted / shifted.sum(axis=1, keepdims=True)


def confusion_matrix(
    label: Int[np.ndarray, " case"], called: Int[np.ndarray, " case"], classes: int
) -> Int[np.ndarray, "reference called"]:
    """Counts; rows are the reference."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (label, called), 1)
    return counts


def wilson(successes: int, n: int) -> Estimate:
    """A proportion with Wilson's score interval."""
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, "Wilson", 0, warnings=("no cases",))
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), "Wilson", n)


def balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Mean recall over the last two axes' matrices; NaN where a class has no case."""
    return np.asarray(_recalls(confusion).mean(axis=-1))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over classes."""
    return np.asarray(f1(confusion).mean(axis=-1))


def f1(confusion: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) of each class; NaN where a class is neither present nor called."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore"):
        return 2 * hits / (confusion.sum(axis=-1) + confusion.sum(axis=-2))


def _f1_of(k: int, confusion: np.ndarray) -> np.ndarray:
    return f1(confusion)[..., k]


def _recalls(confusion: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.diagonal(confusion, axis1=-2, axis2=-1) / confusion.sum(axis=-1)


def auroc(positive: np.ndarray, score: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counted half; NaN with one class alone."""
    n1 = int(positive.sum())
    n0 = len(positive) - n1
    if n1 == 0 or n0 == 0:
        return float("nan")
    ranks = stats.rankdata(score)
    return float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def macro_auroc(label: Int[np.ndarray, " case"], probs: Float[np.ndarray, "case class"]) -> float:
    """Mean over classes of the one-versus-rest AUROC."""
    return float(np.mean([auroc(label == k, probs[:, k]) for k in range(probs.shape[1])]))


@dataclass(frozen=True)
class Resamples:
    """Bootstrap resamples of cases, as how often each case was drawn; one set serves every statistic."""

    weights: Int[np.ndarray, "resample case"]

    @classmethod
    def draw(cls, cases: int, seed: int, count: int = 2000) -> Resamples:
        rng = np.random.default_rng([seed, 20])
        return cls(rng.multinomial(cases, np.full(cases, 1 / cases), size=count))

    def confusions(self, label: np.ndarray, called: np.ndarray, classes: int) -> np.ndarray:
        """All resamples' confusion matrices by one matrix product."""
        cells = np.zeros((len(label), classes * classes), np.int64)
        cells[np.arange(len(label)), label * classes + called] = 1
        return (self.weights @ cells).reshape(-1, classes, classes)

    def macro_aurocs(self, label: np.ndarray, probs: np.ndarray) -> np.ndarray:
        """All resamples' macro AUROC, from the matrix of who outscores whom."""
        total = np.zeros(len(self.weights))
        for k in range(probs.shape[1]):
            up, down = self.weights[:, label == k].astype(float), self.weights[:, label != k].astype(float)
            score, other = probs[label == k, k][:, None], probs[label != k, k][None]
            wins = (score > other) + 0.5 * (score == other)
            with np.errstate(invalid="ignore"):
                total += ((up @ wins) * down).sum(axis=1) / (up.sum(axis=1) * down.sum(axis=1))
        return total / probs.shape[1]


def percentile_interval(value: float, resampled: np.ndarray, n: int) -> Estimate:
    """The value with the bootstrap's percentile interval; resamples that lack a class are left out and counted."""
    usable = resampled[np.isfinite(resampled)]
    method = f"bootstrap over cases, percentile, {len(resampled)} resamples"
    if not np.isfinite(value) or len(usable) < 0.5 * len(resampled):
        return Estimate(value, np.nan, np.nan, method, n, warnings=("a class has too few cases",))
    low, high = np.quantile(usable, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    dropped = len(resampled) - len(usable)
    warnings = [f"{dropped} resamples lacked a class"] if dropped else []
    if low == high:
        warnings.append("the resamples do not vary: the true uncertainty is larger, as Wilson's intervals show")
    return Estimate(value, float(low), float(high), method, n, warnings=tuple(warnings))


@dataclass(frozen=True)
class CalibrationBin:
    """Cases of like confidence: how many, their mean confidence, the share that is right."""

    cases: int
    confidence: float
    accuracy: float


def calibration_bins(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[CalibrationBin]:
    """The filled ones among `bins` right-closed bins of equal width."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return [
        CalibrationBin(int((place == b).sum()), float(confidence[place == b].mean()), float(right[place == b].mean()))
        for b in np.unique(place)
    ]


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Top-label ECE over right-closed bins of equal width."""
    filled = calibration_bins(confidence, right, bins)
    return sum(b.cases * abs(b.accuracy - b.confidence) for b in filled) / len(confidence)


def calibrated_ece(probs: Float[np.ndarray, "case class"], seed: int, count: int = 1000) -> np.ndarray:
    """ECEs that a perfectly calibrated model with these probabilities would show: labels drawn from them."""
    rng = np.random.default_rng([seed, 21])
    confidence, called = probs.max(axis=1), probs.argmax(axis=1)
    cumulative = probs.cumsum(axis=1)
    sampled = (rng.random((count, len(probs), 1)) > cumulative[None, :, :-1]).sum(axis=-1)
    return np.array([expected_calibration_error(confidence, labels == called) for labels in sampled])


def brier(label: np.ndarray, probs: np.ndarray) -> float:
    """Brier score, the sum over classes (0 to 2)."""
    return float(((probs - np.eye(probs.shape[1])[label]) ** 2).sum(axis=1).mean())


def entropy(probs: Float[np.ndarray, " class"]) -> float:
    """Entropy in nats."""
    return float(-(probs * np.log(np.maximum(probs, 1e-300))).sum())


Statistic = Callable[[np.ndarray], np.ndarray]


def evaluate(
    label: Int[np.ndarray, " case"],
    probs: Float[np.ndarray, "case class"],
    classes: tuple[str, ...],
    seed: int,
    no_calls: int = 0,
) -> dict:
    """Every statistic of the report over cases with a prediction and a reference: Estimates and plain numbers.

    `no_calls` further cases have a reference, but none of their slides could be predicted.
    """
    n, called = len(label), probs.argmax(axis=1)
    confusion = confusion_matrix(label, called, len(classes))
    resamples = Resamples.draw(n, seed)
    confusions = resamples.confusions(label, called, len(classes))
    confidence, right = probs.max(axis=1), called == label
    ece = expected_calibration_error(confidence, right)
    null = calibrated_ece(probs, seed)

    def with_interval(statistic: Statistic) -> Estimate:
        return percentile_interval(float(statistic(confusion)), statistic(confusions), n)

    return {
        "accuracy": wilson(int(right.sum()), n),
        "accuracy, no-calls counted wrong": wilson(int(right.sum()), n + no_calls),
        "no-call rate": wilson(no_calls, n + no_calls),
        "balanced_accuracy": with_interval(balanced_accuracy),
        "macro AUROC": percentile_interval(macro_auroc(label, probs), resamples.macro_aurocs(label, probs), n),
        "macro F1": with_interval(macro_f1),
        **{f"F1 {name}": with_interval(partial(_f1_of, k)) for k, name in enumerate(classes)},
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
