"""Whether uncertainty finds the errors: risk against coverage, and the accuracy of the cases that are not deferred.

Units are accepted from the least uncertain on. The risk at a coverage is the misclassified share of the accepted units; units of
equal uncertainty count as the mean over their orders, so that the order of rows does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.bootstrap import Resamples, Weights, number_patients
from crcjax.validation.estimate import LEVEL, Estimate, undetermined
from crcjax.validation.influence import count_clusters
from crcjax.validation.proportions import proportion
from crcjax.validation.ranking import auroc_estimate

Uncertainty = Float[np.ndarray, " unit"]
Wrong = Bool[np.ndarray, " unit"]
Clusters = Int[np.ndarray, " unit"] | None
COVERAGES = (0.7, 0.8, 0.9)


@dataclass(frozen=True)
class RiskCoverageCurve:
    """The risk of accepting all units up to each uncertainty that occurs."""

    threshold: Float[np.ndarray, " point"]
    coverage: Float[np.ndarray, " point"]
    risk: Float[np.ndarray, " point"]


def risk_coverage_curve(uncertainty: Uncertainty, wrong: Wrong) -> RiskCoverageCurve:
    """The curve with one point for each value of the uncertainty."""
    threshold, place = np.unique(uncertainty, return_inverse=True)
    accepted = np.bincount(place, minlength=len(threshold)).cumsum()
    errors = np.bincount(place, wrong, len(threshold)).cumsum()
    return RiskCoverageCurve(threshold, accepted / max(len(wrong), 1), errors / np.maximum(accepted, 1))


@dataclass(frozen=True)
class SelectiveRisk:
    """How well an uncertainty separates errors from correct predictions.

    Attributes:
      area: the area under the risk-coverage curve (AURC): the mean risk over all coverages (Geifman et al. 2019, eq. 1).
      excess: the area less that of a perfect uncertainty with as many errors (E-AURC). For many units the latter tends to
        r + (1 - r) ln(1 - r) with the error rate r.
      generalised: the area under the share of all units that are accepted and wrong (AUGRC, Traub et al. 2024).
      failure_auroc: the probability that an error is more uncertain than a correct prediction.
    """

    area: Estimate
    excess: Estimate
    generalised: Estimate
    failure_auroc: Estimate


def selective_risk(
    uncertainty: Uncertainty, wrong: Wrong, seed: int, cluster: Clusters = None, *, replicates: int = 2000
) -> SelectiveRisk:
    """The areas with percentile intervals over resampled patients, and the AUROC with that of its influence function.

    Units whose uncertainty is not a number are excluded and counted.
    """
    known = np.isfinite(uncertainty)
    uncertainty, wrong, excluded = uncertainty[known], wrong[known], int((~known).sum())
    cluster = None if cluster is None else cluster[known]
    if len(wrong) == 0:
        nothing = undetermined("bootstrap", 0, "no cases")
        return SelectiveRisk(nothing, nothing, nothing, nothing)
    patient = number_patients(cluster, uncertainty, wrong)
    resamples = Resamples.sample(patient, seed, replicates)
    area, excess, generalised = (
        replace(resamples.estimate(values), n_clusters=count_clusters(cluster), n_excluded=excluded)
        for values in resamples.evaluate(_areas(uncertainty, wrong, patient))
    )
    return SelectiveRisk(
        area, replace(excess, ci_low=max(0.0, excess.ci_low)), generalised, auroc_estimate(wrong, uncertainty, cluster)
    )


def _areas(
    uncertainty: Uncertainty, wrong: Wrong, patient: Int[np.ndarray, " unit"]
) -> Callable[[Weights], Float[np.ndarray, "3 replicate"]]:
    order = np.argsort(uncertainty, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(uncertainty[order]) != 0))
    units_of_largest = np.bincount(patient).max() * (int(patient.max()) + 1)
    harmonic = np.append(0.0, (1 / np.arange(1, units_of_largest + 1)).cumsum())

    def areas(weights: Weights) -> Float[np.ndarray, "3 replicate"]:
        units = weights[patient[order]]
        at = np.add.reduceat(units, starts)
        errors_at = np.add.reduceat(units * wrong[order][:, None], starts)
        accepted, errors = at.cumsum(axis=0), errors_at.cumsum(axis=0)
        n, total = accepted[-1], errors[-1]
        before, errors_before = accepted - at, errors - errors_at
        share = errors_at / np.maximum(at, 1)
        # The sum over the units j = 1 … at of a tied block of (errors_before + share j) / (before + j).
        span = harmonic[accepted.astype(int)] - harmonic[before.astype(int)]
        area = (errors_at + (errors_before - share * before) * span).sum(axis=0) / n
        perfect = (total - (n - total) * (harmonic[n.astype(int)] - harmonic[(n - total).astype(int)])) / n
        generalised = (errors_before * at + errors_at * (at + 1) / 2).sum(axis=0) / n**2
        return np.stack([area, area - perfect, generalised])

    return areas


def selective_accuracies(
    uncertainty: Uncertainty,
    wrong: Wrong,
    seed: int,
    cluster: Clusters = None,
    *,
    coverages: Sequence[float] = COVERAGES,
    replicates: int = 2000,
) -> list[Estimate]:
    """The accuracy of the least uncertain units at each coverage; the threshold is found anew in each resample.

    Raises InputError for a coverage that is not above 0 and at most 1.
    """
    if not all(0 < coverage <= 1 for coverage in coverages):
        raise InputError(
            f"a coverage must be above 0 and at most 1, got {list(coverages)}; 0.9 accepts nine of ten units"
        )
    if len(wrong) == 0:
        return [undetermined("bootstrap", 0, "no cases") for _ in coverages]
    patient = number_patients(cluster, uncertainty, wrong)
    resamples = Resamples.sample(patient, seed, replicates)
    order = np.argsort(uncertainty, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(uncertainty[order]) != 0))

    def accuracies(weights: Weights) -> Float[np.ndarray, "coverage replicate"]:
        units = weights[patient[order]]
        at = np.add.reduceat(units, starts)
        errors_at = np.add.reduceat(units * wrong[order][:, None], starts)
        accepted = at.cumsum(axis=0)
        rows = []
        for coverage in coverages:
            wanted = coverage * accepted[-1]
            # The last tied block is accepted in part.
            part = np.clip((wanted - (accepted - at)) / np.maximum(at, 1), 0, 1)
            rows.append(1 - (part * errors_at).sum(axis=0) / wanted)
        return np.stack(rows)

    return [
        replace(resamples.estimate(values), n_clusters=count_clusters(cluster))
        for values in resamples.evaluate(accuracies)
    ]


def accuracy_below(
    threshold: float, uncertainty: Uncertainty, wrong: Wrong, cluster: Clusters = None
) -> tuple[Estimate, Estimate]:
    """The accuracy of the units whose uncertainty is at most a threshold that other cases determined, and their share.

    The interval of the accuracy is conditional on the threshold. Deferred units are counted as excluded.
    """
    accepted = uncertainty <= threshold
    coverage = proportion(accepted, cluster)
    if not accepted.any():
        return undetermined("Wilson", 0, "every unit is deferred", count_clusters(cluster)), coverage
    accuracy = proportion(~wrong[accepted], None if cluster is None else cluster[accepted])
    return replace(accuracy, n_excluded=int((~accepted).sum())), coverage


def rates_by_group(
    deferred: Bool[np.ndarray, " unit"], group: Sequence[Hashable], cluster: Clusters = None
) -> dict[Hashable, Estimate]:
    """The share of deferred units in each group (class, site, scanner, sex …), in the order of the groups' names.

    Deferral can hide unfairness: a system may defer every case of one class.
    """
    names = np.array([str(name) for name in group])
    rates = {}
    for name in sorted(set(group), key=str):
        inside = names == str(name)
        rates[name] = proportion(deferred[inside], None if cluster is None else cluster[inside])
    return rates


@dataclass(frozen=True)
class RiskGuarantee:
    """The largest uncertainty that may be accepted so that the risk stays below a target with a stated confidence.

    Attributes:
      threshold: accept units up to it; minus infinity if no threshold qualifies.
      bound: the upper bound of the risk.
      coverage: the share of units accepted.
    """

    threshold: float
    bound: float
    coverage: Estimate


def guarantee_risk(uncertainty: Uncertainty, wrong: Wrong, target: float, confidence: float = LEVEL) -> RiskGuarantee:
    """Selects a threshold by binary search with exact binomial bounds (Geifman and El-Yaniv 2017, algorithm 2).

    The units are independent calibration cases: one a patient, none of them in the evaluation. Raises InputError for a target or
    a confidence outside 0 to 1.
    """
    if not (0 < target < 1 and 0 < confidence < 1):
        raise InputError(f"target and confidence must lie between 0 and 1, got {target} and {confidence}")
    n, order = len(wrong), np.argsort(uncertainty, kind="stable")
    ordered, errors = uncertainty[order], wrong[order].cumsum()
    steps = max(1, int(np.ceil(np.log2(max(n, 2)))))
    tail = (1 - confidence) / steps
    first, last, threshold, bound = 0, n - 1, -np.inf, np.nan
    for _ in range(steps):
        if first > last:
            break
        middle = (first + last + 1) // 2
        # All units tied with the middle one are accepted with it.
        accepted = int(np.searchsorted(ordered, ordered[middle], side="right"))
        upper = float(stats.beta.isf(tail, errors[accepted - 1] + 1, accepted - errors[accepted - 1]))
        if accepted > errors[accepted - 1] and upper < target:
            threshold, bound, first = float(ordered[middle]), upper, middle + 1
        else:
            last = middle - 1
    return RiskGuarantee(threshold, bound, proportion(uncertainty <= threshold))
