"""Predictive values at a stated prevalence. Those of the study hold only for the study's mix of patients.

The study gives the rates at which each reference class is predicted as each class; Bayes' rule gives the predictive values.
Intervals are symmetric on the logit scale, by the delta method (Mercaldo, Lau and Zhou 2007, extended to several classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from crcjax.errors import InputError
from crcjax.validation.confusion import confusion_matrix
from crcjax.validation.estimate import Estimate, undetermined
from crcjax.validation.influence import Z, clustered_error, count_clusters
from crcjax.validation.proportions import proportion, rarity

Labels = Int[np.ndarray, " unit"]
Clusters = Int[np.ndarray, " unit"] | None


@dataclass(frozen=True)
class PredictiveValues:
    """The probability that a case predicted as the class is of it (PPV), and that another case is not (NPV)."""

    ppv: Estimate
    npv: Estimate


@dataclass(frozen=True)
class PredictiveValueCurve:
    """The predictive values of a class by its prevalence."""

    prevalence: Float[np.ndarray, " point"]
    values: list[PredictiveValues]


def predictive_values(
    label: Labels, predicted: Labels, prevalence: Float[np.ndarray, " class"], cluster: Clusters = None
) -> list[PredictiveValues]:
    """The predictive values of every class in a population with the stated prevalence of the classes.

    Raises InputError for a prevalence that is negative or does not sum to 1.
    """
    if not (prevalence >= 0).all() or abs(prevalence.sum() - 1) > 1e-6:
        raise InputError(
            f"the prevalence must be 0 or more and sum to 1, got {prevalence.tolist()}; state every class's"
        )
    return [_of_class(label, predicted, prevalence, k, cluster) for k in range(len(prevalence))]


def predictive_value_curve(
    label: Labels,
    predicted: Labels,
    classes: int,
    k: int,
    cluster: Clusters = None,
    prevalence: Sequence[float] = tuple(np.arange(1, 20) / 20),
) -> PredictiveValueCurve:
    """The predictive values of class `k` over its prevalence; the other classes keep their proportions in the study."""
    counts = confusion_matrix(label, predicted, classes).sum(axis=1)
    others = np.where(np.arange(classes) == k, 0.0, counts)
    values = []
    for share in prevalence:
        if others.sum() == 0:
            nothing = undetermined("logit, delta", len(label), f"every case is of class {k}")
            values.append(PredictiveValues(nothing, nothing))
            continue
        population = (1 - share) * others / others.sum() + share * (np.arange(classes) == k)
        values.append(_of_class(label, predicted, population, k, cluster))
    return PredictiveValueCurve(np.array(prevalence, float), values)


def _of_class(label: Labels, predicted: Labels, prevalence: np.ndarray, k: int, cluster: Clusters) -> PredictiveValues:
    confusion_matrix(label, predicted, len(prevalence))  # refuses unknown classes
    is_class = np.arange(len(prevalence)) == k
    return PredictiveValues(
        _share_right(label, predicted == k, is_class, prevalence, cluster, f"class {k} is never predicted"),
        _share_right(label, predicted != k, ~is_class, prevalence, cluster, f"class {k} is always predicted"),
    )


def _share_right(
    label: Labels,
    decided: Bool[np.ndarray, " unit"],
    is_right: Bool[np.ndarray, " class"],
    prevalence: Float[np.ndarray, " class"],
    cluster: Clusters,
    never: str,
) -> Estimate:
    """Of the cases with a decision in the population, the share of the classes for which it is right.

    Args:
      label: the reference classes.
      decided: whether each unit has the decision.
      is_right: the classes for which the decision is right.
      prevalence: the classes' shares of the population.
      cluster: the patients.
      never: the warning if no case has the decision.
    """
    classes, n, method = len(prevalence), len(label), "logit, delta"
    counts = np.bincount(label, minlength=classes)
    absent = np.flatnonzero((counts == 0) & (prevalence > 0))
    if len(absent):
        return undetermined(method, n, f"class {absent[0]} has no case", count_clusters(cluster))
    # A class without cases has no part in the population either; a rate of zero stands for it.
    rate = np.bincount(label, decided, classes) / np.maximum(counts, 1)
    warnings = tuple(w for j in np.flatnonzero(is_right & (counts > 0)) for w in rarity(int(counts[j]), f"class {j}"))
    right, wrong = float((prevalence * rate)[is_right].sum()), float((prevalence * rate)[~is_right].sum())
    if right + wrong == 0:
        return undetermined(method, n, never, count_clusters(cluster))
    value = right / (right + wrong)
    if right > 0 and wrong > 0:
        weight = np.where(is_right, 1 / right, -1 / wrong) * prevalence / np.maximum(counts, 1) * n
        error = clustered_error(weight[label] * (decided - rate[label]), cluster)
        centre = np.log(right / wrong)
        low, high = (float(1 / (1 + np.exp(-(centre + sign * Z * error)))) for sign in (-1, 1))
        return Estimate(value, low, high, method, n, warnings=warnings, n_clusters=count_clusters(cluster))
    # A rate of zero has no variance on the logit scale: every rate is set to its least favourable limit.
    rates = [
        proportion(decided[label == j], None if cluster is None else cluster[label == j])
        if counts[j]
        else Estimate(0.0, 0.0, 0.0, "", 0)
        for j in range(classes)
    ]
    low_rate, high_rate = (prevalence * [getattr(r, limit) for r in rates] for limit in ("ci_low", "ci_high"))
    limits = []
    for favourable, adverse in ((low_rate, high_rate), (high_rate, low_rate)):
        total = favourable[is_right].sum() + adverse[~is_right].sum()
        limits.append(float(favourable[is_right].sum() / total) if total > 0 else float(right > 0))
    return Estimate(
        value,
        limits[0],
        limits[1],
        "Wilson's limits of the rates",
        n,
        warnings=warnings,
        n_clusters=count_clusters(cluster),
    )
