"""Which checkpoints of a run are kept: the newest, the best by each of several metrics, and every L-th."""

from __future__ import annotations

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
    evaluated = {step: metrics for step, metrics in metrics_of_step.items() if metrics}
    scores = [{step: rank(metrics) for step, metrics in evaluated.items()}]
    for name in retention.metrics:
        sign = -1 if name.endswith(_LOWER_IS_BETTER) else 1
        scores.append({step: sign * metrics[name] for step, metrics in evaluated.items() if name in metrics})
    for score_of_step in scores:
        ordered = sorted((score, step) for step, score in score_of_step.items())
        keep |= {step for _, step in ordered[-retention.best :]}
    return keep
