"""Which checkpoints of a run are kept: the newest, the best by each of several metrics, and every L-th."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Metrics = Mapping[str, float]
# Metrics with one of these endings are better when they are lower; all others when they are higher.
_LOWER_IS_BETTER = ("loss", "error", "nll", "ece", "brier")


@dataclass(frozen=True)
class Retention:
    """How many checkpoints are kept.

    Attributes:
      newest: the newest ones. With two, a damaged one costs one interval.
      best: the best ones by the rank that prediction chooses by, and by each of `metrics`.
      metrics: names of validation metrics.
      every: checkpoints of steps that are multiples of it are kept for ever; 0 for none.
    """

    newest: int = 2
    best: int = 1
    metrics: tuple[str, ...] = ()
    every: int = 0


def rank(metrics: Metrics) -> float:
    """The score of a checkpoint; the best one has the highest. The loss breaks ties in balanced accuracy."""
    # Ties are frequent, since validation sets are small.
    return metrics["balanced_accuracy"] - 1e-3 * metrics["loss"]


def scores(metrics_of_step: Mapping[int, Metrics | None], metric: str | None = None) -> dict[int, float]:
    """The score of every step that was evaluated by a metric, or by `rank` without one. The best step has the highest."""
    evaluated = {step: metrics for step, metrics in metrics_of_step.items() if metrics}
    if metric is None:
        score_of_step = {step: rank(metrics) for step, metrics in evaluated.items()}
    else:
        sign = -1 if metric.endswith(_LOWER_IS_BETTER) else 1
        score_of_step = {step: sign * metrics[metric] for step, metrics in evaluated.items() if metric in metrics}
    # Nothing is larger or smaller than NaN, which would make the order random.
    return {step: score for step, score in score_of_step.items() if not math.isnan(score)}


def best_step(metrics_of_step: Mapping[int, Metrics | None], metric: str | None = None) -> int | None:
    """The step with the highest score, of equally good ones the newest; None if none was evaluated by the metric."""
    score_of_step = scores(metrics_of_step, metric)
    return max(score_of_step, key=lambda step: (score_of_step[step], step)) if score_of_step else None


def steps_to_keep(metrics_of_step: Mapping[int, Metrics | None], retention: Retention) -> set[int]:
    """The steps whose checkpoints are kept. Of equally good ones, the newer is kept.

    Args:
      metrics_of_step: the validation metrics of every checkpoint; None for one that was not evaluated.
      retention: how many are kept.
    """
    steps = sorted(metrics_of_step)
    keep = set(steps[-retention.newest :])
    if retention.every:
        keep |= {step for step in steps if step % retention.every == 0}
    for metric in (None, *retention.metrics):
        score_of_step = scores(metrics_of_step, metric)
        ordered = sorted(score_of_step, key=lambda step: (score_of_step[step], step))
        keep |= set(ordered[-retention.best :])
    return keep
