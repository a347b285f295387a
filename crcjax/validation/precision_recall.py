"""Average precision with intervals. Its value for random scores is the prevalence, so that sites do not compare by it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

from crcjax.validation.bootstrap import REPLICATES, Interval, Resamples, number_patients
from crcjax.validation.estimate import Estimate, undetermined
from crcjax.validation.influence import Z, count_clusters
from crcjax.validation.proportions import proportion
from crcjax.validation.resampled_statistics import weighted_areas


@dataclass(frozen=True)
class AveragePrecision:
    """The area under the precision-recall curve, and the prevalence, which a random score would have."""

    area: Estimate
    baseline: Estimate


def average_precision(
    positive: Bool[np.ndarray, " unit"],
    score: Float[np.ndarray, " unit"],
    seed: int,
    cluster: Int[np.ndarray, " unit"] | None = None,
    stratum: Int[np.ndarray, " unit"] | None = None,
    *,
    replicates: int = REPLICATES,
    interval: Interval = "percentile",
) -> AveragePrecision:
    """The sum of precisions, each weighed by the recall that its threshold adds; no interpolation between thresholds.

    Patients are resampled within the classes, and within `stratum` if it is given. A patient with units of both classes is
    resampled among its like.

    Args:
      positive: whether each unit belongs to the class.
      score: its score; units whose score is not a number are excluded and counted.
      seed: the seed of the bootstrap.
      cluster: the patient of each unit.
      stratum: a stratum of patients beside the class, such as the site.
      replicates: the number of resamples.
      interval: "bca" for small studies.
    """
    known = np.isfinite(score)
    positive, score, excluded = positive[known], score[known], int((~known).sum())
    cluster = None if cluster is None else cluster[known]
    strata = np.zeros(len(score), int) if stratum is None else stratum[known]
    if not positive.any() or positive.all():
        nothing = undetermined("bootstrap", len(score), "all units are of one class", count_clusters(cluster))
        return AveragePrecision(nothing, nothing)
    patient = number_patients(cluster, strata, positive, score)
    share = np.bincount(patient, positive) / np.bincount(patient)
    _, place = np.unique(
        np.column_stack([strata, np.ceil(share[patient]) + np.floor(share[patient])]), axis=0, return_inverse=True
    )
    resamples = Resamples.sample(patient, seed, replicates, place, interval)
    areas = resamples.evaluate(weighted_areas(positive.astype(int), 1, score, patient))[1]
    area = replace(resamples.estimate(areas), n_clusters=count_clusters(cluster), n_excluded=excluded)
    return AveragePrecision(area, proportion(positive, cluster))


def logit_interval(area: float, positives: int) -> Estimate:
    """A quick interval of an average precision whose scores are not at hand, symmetric on the logit scale.

    The error is that of a proportion of the positives (Boyd, Eng and Page 2013, section 3.2). Prefer the bootstrap.
    """
    method = "logit, binomial error"
    if positives < 1 or not 0 < area < 1:
        return undetermined(method, positives, "the area must lie between 0 and 1, and a positive exist")
    width = Z / np.sqrt(positives * area * (1 - area))
    low, high = (float(special.expit(special.logit(area) + sign * width)) for sign in (-1, 1))
    return Estimate(area, low, high, method, positives)
