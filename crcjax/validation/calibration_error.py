"""Calibration errors over bins of confidence, each beside its distribution for a perfectly calibrated model.

The expected calibration error of a finite sample is above zero even if the model is calibrated; its size depends on the number
of cases and of bins. Read it only beside its null distribution, which samples the labels from the predicted probabilities
(consistency resampling, Bröcker and Smith 2007).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from crcjax.validation.bootstrap import Resamples, number_patients
from crcjax.validation.estimate import LEVEL, Estimate, TestResult, undetermined
from crcjax.validation.influence import count_clusters
from crcjax.validation.proportions import proportion

BINS = 15
NULL_SAMPLES = 2000
# Cases below which calibration is described, not judged.
FEW = 100
Clusters = Int[np.ndarray, " unit"] | None
Binning = Literal["width", "mass"]


def bins_of(
    confidence: Float[np.ndarray, " unit"], bins: int = BINS, binning: Binning = "width"
) -> tuple[Int[np.ndarray, " unit"], int]:
    """The bin of every unit from 0, and the number of bins.

    Bins are closed on the right, and the first includes 0. `width` divides (0, 1] equally; `mass` divides the units equally,
    with fewer bins where units are tied.
    """
    if binning == "width":
        edges = np.arange(1, bins) / bins
    else:
        edges = np.unique(np.quantile(confidence, np.arange(1, bins) / bins, method="inverted_cdf"))
    return np.searchsorted(edges, confidence, side="left"), len(edges) + 1


@dataclass(frozen=True)
class CalibrationBin:
    """One bin of a reliability diagram.

    Attributes:
      confidence: the mean confidence of its units.
      accuracy: the share of them that is correct, with Wilson's interval.
      consistent_low: the lower limit of the shares that a calibrated model would show in this bin.
      consistent_high: the upper limit.
    """

    confidence: float
    accuracy: Estimate
    consistent_low: float
    consistent_high: float

    @property
    def cases(self) -> int:
        """The number of units."""
        return self.accuracy.n


def reliability_bins(
    confidence: Float[np.ndarray, " unit"],
    correct: Bool[np.ndarray, " unit"],
    seed: int,
    cluster: Clusters = None,
    *,
    bins: int = BINS,
    binning: Binning = "width",
    samples: int = NULL_SAMPLES,
) -> list[CalibrationBin]:
    """The bins that have units, with consistency bands.

    Args:
      confidence: the probability of each unit's event: that the predicted class is right, or that the unit is of a class.
      correct: whether the event happened.
      seed: the seed of the consistency bands.
      cluster: the patient of each unit.
      bins: the number of bins.
      binning: equal width or equal mass.
      samples: the number of label sets that the bands are made of.
    """
    place, _ = bins_of(confidence, bins, binning)
    uniform = _uniforms(number_patients(cluster, confidence), seed, samples)
    events = uniform < confidence[:, None]
    filled = []
    for b in np.unique(place):
        inside = place == b
        low, high = np.quantile(events[inside].mean(axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        accuracy = proportion(correct[inside], None if cluster is None else cluster[inside])
        filled.append(CalibrationBin(float(confidence[inside].mean()), accuracy, float(low), float(high)))
    return filled


@dataclass(frozen=True)
class CalibrationError:
    """A calibration error beside its distribution under perfect calibration.

    Attributes:
      error: the error. It is biased upwards; its interval shows how it varies from sample to sample.
      excess: the error less its mean under perfect calibration.
      null_mean: the mean under perfect calibration.
      null_high: the 95th percentile under perfect calibration.
      test: that the model is calibrated, by the share of null samples with an error at least as large.
    """

    error: Estimate
    excess: Estimate
    null_mean: float
    null_high: float
    test: TestResult


def top_label_error(
    label: Int[np.ndarray, " unit"],
    probs: Float[np.ndarray, "unit class"],
    seed: int,
    cluster: Clusters = None,
    *,
    bins: int = BINS,
    binning: Binning = "width",
    norm: Literal["mean", "root mean square", "maximum"] = "mean",
    samples: int = NULL_SAMPLES,
) -> CalibrationError:
    """The calibration error of the predicted class: ECE, with other norms RMSCE and MCE.

    Args:
      label: the reference classes.
      probs: the probabilities.
      seed: the seed of the bootstrap and of the null distribution.
      cluster: the patient of each unit; in the null distribution the units of a patient share a random number.
      bins: the number of bins.
      binning: equal width or equal mass.
      norm: how the gaps of the bins are combined; "maximum" rests on the bin with the fewest units.
      samples: the number of null samples, and of resamples.
    """
    confidence = probs.max(axis=1)
    kinds = [(confidence, probs.argmax(axis=1))]
    name = {"mean": "ECE", "root mean square": "RMSCE", "maximum": "MCE"}[norm]
    return _calibration_error(label, probs, kinds, name, norm, seed, cluster, bins, binning, samples)


def classwise_error(
    label: Int[np.ndarray, " unit"],
    probs: Float[np.ndarray, "unit class"],
    seed: int,
    cluster: Clusters = None,
    *,
    bins: int = BINS,
    binning: Binning = "width",
    samples: int = NULL_SAMPLES,
) -> CalibrationError:
    """The mean over classes of the calibration error of the class's probability; arguments as for `top_label_error`."""
    kinds = [(probs[:, k], np.full(len(probs), k)) for k in range(probs.shape[1])]
    return _calibration_error(label, probs, kinds, "classwise ECE", "mean", seed, cluster, bins, binning, samples)


def _calibration_error(
    label: np.ndarray,
    probs: np.ndarray,
    kinds: list[tuple[np.ndarray, np.ndarray]],
    name: str,
    norm: str,
    seed: int,
    cluster: Clusters,
    bins: int,
    binning: Binning,
    samples: int,
) -> CalibrationError:
    """`kinds` are pairs of a confidence and the class that it is of; their errors are averaged."""
    n, method = len(label), f"{name}, {bins} bins of equal {binning}"
    if n == 0 or (cluster is not None and len(np.unique(cluster)) < 2):
        nothing = undetermined(method, n, "fewer than two patients", count_clusters(cluster))
        return CalibrationError(
            nothing, nothing, np.nan, np.nan, TestResult(np.nan, np.nan, method, warnings=nothing.warnings)
        )
    patient = number_patients(cluster, label, probs)
    uniform = _uniforms(patient, seed, samples)
    sampled = (uniform[:, :, None] >= probs.cumsum(axis=1)[:, None, :-1]).sum(axis=-1)
    resamples = Resamples.sample(patient, seed, samples)
    observed = np.zeros(1 + samples)
    null = np.zeros(samples)
    for confidence, of_class in kinds:
        place, count = bins_of(confidence, bins, binning)
        one_hot = np.zeros((n, count))
        one_hot[np.arange(n), place] = 1
        gap = ((label == of_class) - confidence)[:, None] * one_hot
        observed += _norm(resamples.totals(gap), resamples.totals(one_hot), norm) / len(kinds)
        null_gaps = one_hot.T @ ((sampled == of_class[:, None]) - confidence[:, None])
        null += _norm(null_gaps, one_hot.sum(axis=0)[:, None], norm) / len(kinds)
    error = resamples.estimate(observed, centred=True)
    warnings = error.warnings + ((f"{n} cases are too few to judge calibration",) if n < FEW else ())
    mean, value = float(null.mean()), error.value
    low, high = max(0.0, error.ci_low), min(1.0, error.ci_high)
    p_value = float((1 + (null >= value - 1e-12).sum()) / (1 + samples))

    def estimate(offset: float, what: str) -> Estimate:
        return Estimate(
            value - offset,
            low - offset,
            high - offset,
            f"{what}; {error.method}",
            n,
            warnings=warnings,
            n_clusters=count_clusters(cluster),
        )

    return CalibrationError(
        estimate(0.0, method),
        estimate(mean, f"{method}, less its mean under calibration"),
        mean,
        float(np.quantile(null, LEVEL)),
        TestResult(value, p_value, f"consistency resampling, {samples} samples", warnings=warnings),
    )


def _norm(
    gaps: Float[np.ndarray, "bin sample"],
    sizes: Float[
        np.ndarray,
        (
            bin  # sample
        ),
    ],
    norm: str,
) -> np.ndarray:
    """Combines the bins, whose `gaps` are sums over their units."""
    if norm == "mean":
        return np.abs(gaps).sum(axis=0) / sizes.sum(axis=0)
    mean_gap = gaps / np.maximum(sizes, 1)
    if norm == "maximum":
        return np.abs(mean_gap).max(axis=0)
    return np.sqrt((gaps * mean_gap).sum(axis=0) / sizes.sum(axis=0))


def _uniforms(patient: Int[np.ndarray, " unit"], seed: int, samples: int) -> Float[np.ndarray, "unit sample"]:
    """A random number from 0 to 1 for every patient and sample."""
    rng = np.random.default_rng([seed, 21])
    return rng.random((int(patient.max(initial=-1)) + 1, samples))[patient]
