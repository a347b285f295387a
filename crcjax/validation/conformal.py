"""Conformal sets: sets of classes that contain the true one with a stated frequency, and what they achieve.

The guarantee holds on average over calibration sets, for cases exchangeable with the calibration cases: one row a patient, none
of them in the evaluation. At a new site nothing is guaranteed. With thresholds by class or by site it holds within each.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.estimate import Estimate, undetermined
from crcjax.validation.influence import wald_estimate
from crcjax.validation.proportions import proportion

Method = Literal["lac", "aps", "raps"]
METHODS = ("lac", "aps", "raps")
# RAPS: the penalty of each class beyond the RANK-th most probable, which keeps sets from growing beyond RANK classes.
PENALTY, RANK = 0.1, 2
_ALL = ""


def nonconformity(
    probs: Float[np.ndarray, "unit class"], method: str, uniforms: Float[np.ndarray, " unit"]
) -> Float[np.ndarray, "unit class"]:
    """The nonconformity score of every class.

    LAC: 1 - p (Sadinle et al. 2019). APS: the probability of all more probable classes plus a random share of p (Romano et
    al. 2020, equation 5). RAPS: APS plus a penalty on classes of low rank (Angelopoulos et al. 2021).

    Args:
      probs: the model's probabilities.
      method: one of `METHODS`.
      uniforms: the random share of each unit, 0 to 1; LAC does not use it.
    """
    if method == "lac":
        return 1.0 - probs
    is_above = probs[:, None, :] > probs[:, :, None]
    scores = np.where(is_above, probs[:, None, :], 0.0).sum(axis=-1) + uniforms[:, None] * probs
    if method == "raps":
        scores = scores + PENALTY * np.maximum(is_above.sum(axis=-1) + 1 - RANK, 0)
    return scores


def conformal_threshold(scores: Float[np.ndarray, " case"], error: float) -> float:
    """The ⌈(n + 1)(1 - error)⌉-th smallest score of n cases; infinite, which makes all sets full, if n is too small.

    A new score that is exchangeable with these does not exceed the threshold with a probability of at least 1 - error.
    """
    # Rounding first keeps floating-point errors out of the ceiling: (9 + 1)(1 - 0.1) must give 9.
    rank = math.ceil(round((len(scores) + 1) * (1 - error), 9))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


def coverage_range(cases: int, error: float, level: float = 0.9) -> tuple[float, float]:
    """The central range of the coverage over calibration sets of a size (Vovk 2012): a beta distribution's quantiles."""
    rank = math.ceil(round((cases + 1) * (1 - error), 9))
    if rank > cases:
        return 1.0, 1.0
    low, high = stats.beta.ppf([(1 - level) / 2, (1 + level) / 2], rank, cases + 1 - rank)
    return float(low), float(high)


@dataclass(frozen=True)
class ConformalRule:
    """Thresholds of nonconformity, fitted on calibration cases.

    Attributes:
      method: one of `METHODS`.
      error: the share of sets that may miss the true class.
      thresholds: of each class (row) in each group (column).
      groups: the names of the groups; the last one, "", stands for cases of no group with a threshold of its own.
      cases: the number of calibration cases behind each threshold.
      warnings: groups and classes with too few cases for a threshold, whose sets are full.
    """

    method: Method
    error: float
    thresholds: Float[np.ndarray, "class group"]
    groups: tuple[Hashable, ...]
    cases: Int[np.ndarray, "class group"]
    warnings: tuple[str, ...]

    def sets(
        self,
        probs: Float[np.ndarray, "unit class"],
        uniforms: Float[np.ndarray, " unit"],
        group: Sequence[Hashable] | None = None,
    ) -> Bool[np.ndarray, "unit class"]:
        """Whether each class is in each unit's set, which may be empty.

        Args:
          probs: the probabilities, of the kind that the thresholds were fitted on.
          uniforms: the random share of each unit, 0 to 1.
          group: the group of each unit, such as its site.
        """
        place = {name: i for i, name in enumerate(self.groups)}
        column = [place.get(name, place[_ALL]) for name in (group if group is not None else [_ALL] * len(probs))]
        return nonconformity(probs, self.method, uniforms) <= self.thresholds.T[column]


def fit_conformal(
    label: Int[np.ndarray, " case"],
    probs: Float[np.ndarray, "case class"],
    error: float,
    uniforms: Float[np.ndarray, " case"],
    *,
    method: Method = "lac",
    by_class: bool = False,
    group: Sequence[Hashable] | None = None,
) -> ConformalRule:
    """Fits thresholds on calibration cases, one a patient.

    Args:
      label: the reference classes.
      probs: the probabilities.
      error: the share of sets that may miss the true class.
      uniforms: a random share of each case, 0 to 1, that does not depend on the data.
      method: one of `METHODS`.
      by_class: a threshold for each class, so that every class is covered (Mondrian, class-conditional).
      group: a threshold for each group of cases, such as their sites (Mondrian, group-conditional).

    Raises:
      InputError: the error is not between 0 and 1, or the method is unknown.
    """
    if not 0 < error < 1 or method not in METHODS:
        raise InputError(
            f"error must lie between 0 and 1 and method be one of {', '.join(METHODS)}, got {error}, {method}"
        )
    scores = nonconformity(probs, method, uniforms)[np.arange(len(label)), label]
    classes, every = probs.shape[1], np.ones(len(label), bool)
    members: dict[Hashable, np.ndarray] = {}
    for name in sorted(set(group or ()), key=str):
        members[name] = np.array([other == name for other in group or ()], bool)
    members[_ALL] = every
    thresholds, cases = np.full((classes, len(members)), math.inf), np.zeros((classes, len(members)), int)
    warnings = []
    for column, (name, inside) in enumerate(members.items()):
        for k in range(classes):
            cell = inside & (label == k) if by_class else inside
            thresholds[k, column], cases[k, column] = conformal_threshold(scores[cell], error), cell.sum()
            if math.isinf(thresholds[k, column]) and (by_class or k == 0):
                where = [f"class {k}"] * by_class + [f"group {name}"] * (name != _ALL)
                warnings.append(f"{' of '.join(where) or 'the calibration'} has {cell.sum()} cases; its sets are full")
    return ConformalRule(method, error, thresholds, tuple(members), cases, tuple(warnings))


def require_separate(calibration: Sequence[Hashable], evaluation: Sequence[Hashable]) -> None:
    """Raises InputError if a patient is among the calibration and the evaluation cases."""
    both = sorted(set(calibration) & set(evaluation), key=str)
    if both:
        raise InputError(
            f"the calibration cases must not be evaluated, got {len(both)} patients in both (first: {both[0]}); fit on "
            "other patients"
        )


@dataclass(frozen=True)
class ConformalPerformance:
    """What conformal sets achieve on evaluation cases.

    Attributes:
      coverage: the share of sets that contain the true class.
      mean_size: the mean number of classes in a set.
      single: the share of sets with one class.
      empty: the share of sets without a class.
      by_class: the coverage of each reference class.
      by_group: the coverage in each group, such as the site.
      by_size: the coverage of the sets of each size; the smallest is the size-stratified coverage.
    """

    coverage: Estimate
    mean_size: Estimate
    single: Estimate
    empty: Estimate
    by_class: list[Estimate]
    by_group: dict[Hashable, Estimate]
    by_size: dict[int, Estimate]


def conformal_performance(
    sets: Bool[np.ndarray, "unit class"],
    label: Int[np.ndarray, " unit"],
    cluster: Int[np.ndarray, " unit"] | None = None,
    group: Sequence[Hashable] | None = None,
) -> ConformalPerformance:
    """Evaluates sets against the reference classes."""
    covered, sizes = sets[np.arange(len(label)), label], sets.sum(axis=1)

    def share(success: np.ndarray, among: np.ndarray, lacking: str) -> Estimate:
        if not among.any():
            return undetermined("Wilson", 0, lacking)
        return proportion(success[among], None if cluster is None else cluster[among])

    every = np.ones(len(label), bool)
    mean_size = undetermined("mean", 0, "no cases")
    if len(label):
        mean = float(sizes.mean())
        mean_size = wald_estimate(mean, sizes - mean, "mean", cluster, (0.0, float(sets.shape[1])))
    names = list(group) if group is not None else []
    return ConformalPerformance(
        coverage=share(covered, every, "no cases"),
        mean_size=mean_size,
        single=share(sizes == 1, every, "no cases"),
        empty=share(sizes == 0, every, "no cases"),
        by_class=[share(covered, label == k, f"class {k} has no case") for k in range(sets.shape[1])],
        by_group={
            name: share(covered, np.array([other == name for other in names]), "no cases")
            for name in sorted(set(names), key=str)
        },
        by_size={int(size): share(covered, sizes == size, "no cases") for size in np.unique(sizes)},
    )
