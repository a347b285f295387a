"""The bootstrap over patients as weights: a resample is the number of times it contains each patient.

All statistics of a study share one set of resamples. A statistic that is a function of sums over patients takes one matrix
product for all resamples. The weights also hold the study itself and, for the jackknife of BCa intervals, the study without
each patient in turn, so that one evaluation gives the value, its replicates and their correction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt16
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.estimate import LEVEL, Estimate

REPLICATES = 10_000
# Replicates evaluated at a time; their intermediate values stay in the processor's cache.
_CHUNK = 128
# Patients below which the distribution of the replicates says little.
_FEW = 10
Interval = Literal["percentile", "bca"]
Weights = Float[np.ndarray, "patient replicate"]
Statistic = Callable[[Weights], Float[np.ndarray, "*value replicate"]]


def number_patients(
    cluster: Int[np.ndarray, " unit"] | None, *columns: Shaped[np.ndarray, "unit ..."]
) -> Int[np.ndarray, " unit"]:
    """Numbers the patients 0, 1, … in the order of their data, and returns the patient of every unit.

    The resamples of a seed then depend on neither the patients' names nor the order of the rows. Patients with the same data
    may change places.

    Args:
      cluster: the patient of each unit; None if each unit is a patient of its own.
      columns: everything that the statistics use of a unit.
    """
    table = np.column_stack(
        [np.asarray(column, float).reshape(len(column), int(np.prod(column.shape[1:]))) for column in columns]
    )
    _, kind = np.unique(table, axis=0, return_inverse=True)
    if cluster is None:
        return np.argsort(np.argsort(kind, kind="stable"), kind="stable")
    _, patient = np.unique(cluster, return_inverse=True)
    kinds: list[list[int]] = [[] for _ in range(int(patient.max(initial=-1)) + 1)]
    for unit in np.argsort(kind, kind="stable"):
        kinds[patient[unit]].append(int(kind[unit]))
    order = sorted(range(len(kinds)), key=lambda i: kinds[i])
    number = np.empty(len(kinds), int)
    number[order] = np.arange(len(kinds))
    return number[patient]


@dataclass(frozen=True)
class Resamples:
    """The weights of patients in the study, in the study without each patient, and in resamples.

    Attributes:
      weights: a column of ones; for BCa intervals, one column for each left-out patient; then the replicates.
      patient: the patient of each unit, from 0.
      stratum: the stratum of each patient, from 0; every resample has as many patients of a stratum as the study.
      interval: the kind of interval that the weights are for.
    """

    weights: UInt16[np.ndarray, "patient column"]
    patient: Int[np.ndarray, " unit"]
    stratum: Int[np.ndarray, " patient"]
    interval: Interval

    @classmethod
    def sample(
        cls,
        patient: Int[np.ndarray, " unit"],
        seed: int,
        replicates: int = REPLICATES,
        stratum: Int[np.ndarray, " unit"] | None = None,
        interval: Interval = "percentile",
    ) -> Resamples:
        """Samples patients with replacement.

        Args:
          patient: the patient of each unit, as `number_patients` numbers them.
          seed: the seed.
          replicates: the number of resamples.
          stratum: the stratum of each unit, such as its site and class; the units of a patient have the same.
          interval: `percentile` gives quantiles of the replicates; `bca` corrects them for bias and skewness (Efron 1987; with
            strata, Davison and Hinkley 1997, section 5.3).

        Raises:
          InputError: a patient has units in two strata.
        """
        patients = int(patient.max(initial=-1)) + 1
        by_patient = np.zeros(patients, int)
        if stratum is not None:
            _, place = np.unique(stratum, return_inverse=True)
            by_patient[patient] = place
            if (by_patient[patient] != place).any():
                raise InputError(
                    "the units of a patient must be in one stratum, got two; stratify by the patient's own site and class"
                )
        left_out = patients if interval == "bca" else 0
        weights = np.ones((patients, 1 + left_out + replicates), np.uint16)
        weights[:, 1 : 1 + left_out] -= np.eye(patients, left_out, dtype=np.uint16)
        rng = np.random.default_rng([seed, 20])
        for group in np.unique(by_patient):
            members = np.flatnonzero(by_patient == group)
            chosen = rng.integers(len(members), size=(replicates, len(members)))
            cell = chosen * replicates + np.arange(replicates)[:, None]
            counts = np.bincount(cell.ravel(), minlength=len(members) * replicates)
            weights[members, 1 + left_out :] = counts.reshape(len(members), replicates)
        return cls(weights, patient, by_patient, interval)

    @property
    def patients(self) -> int:
        """The number of patients."""
        return len(self.weights)

    @property
    def replicates(self) -> int:
        """The number of resamples."""
        return self.weights.shape[1] - self._first_replicate

    @property
    def _first_replicate(self) -> int:
        return 1 + self.patients * (self.interval == "bca")

    def sums(self, values: Shaped[np.ndarray, "unit ..."]) -> Float[np.ndarray, "patient ..."]:
        """The sum of the values of each patient's units."""
        total = np.zeros((self.patients, *values.shape[1:]))
        np.add.at(total, self.patient, values)
        return total

    def totals(self, values: Shaped[np.ndarray, "unit value"]) -> Float[np.ndarray, "value column"]:
        """The sum of the values over the units of the study and of every resample, by matrix products."""
        by_patient = self.sums(values).T
        return self.evaluate(lambda weights: by_patient @ weights)

    def evaluate(self, statistic: Statistic) -> Float[np.ndarray, "*value column"]:
        """The values of a statistic for every column of the weights."""
        columns = self.weights.shape[1]
        chunks = [self.weights[:, start : start + _CHUNK].astype(float) for start in range(0, columns, _CHUNK)]
        # A resample may lack a class, and the study without its only patient has no unit.
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.concatenate([statistic(chunk) for chunk in chunks], axis=-1)

    def estimate(self, values: Float[np.ndarray, " column"], *, centred: bool = False) -> Estimate:
        """The study's value with the interval of its replicates.

        With `centred`, the bias of the replicates is subtracted, for statistics that are larger in every resample, as distances
        are. Replicates that lack a class are omitted and counted in a warning.
        """
        interval = "centred" if centred else self.interval
        value, replicates = float(values[0]), values[self._first_replicate :]
        usable = replicates[np.isfinite(replicates)]
        strata = "" if self.stratum.max(initial=0) == 0 else ", stratified"
        name = {"percentile": "percentile", "bca": "BCa", "centred": "percentile less bias"}[interval]
        method = f"bootstrap over patients{strata}, {name}, {self.replicates} resamples"
        n, patients = len(self.patient), self.patients

        def result(low: float, high: float, *warnings: str) -> Estimate:
            return Estimate(value, low, high, method, n, warnings=warnings, n_clusters=patients)

        if not np.isfinite(value):
            return result(np.nan, np.nan, "the data do not determine the value: a class has no case")
        if patients < 2 or len(usable) < 0.5 * self.replicates:
            return result(np.nan, np.nan, "too few patients, or too few of a class, for an interval")
        # Sums over patients differ by rounding.
        if np.ptp(usable) <= 1e-12:
            return result(np.nan, np.nan, "the resamples do not vary, which determines no interval")
        warnings = []
        if patients < _FEW:
            warnings.append(f"{patients} patients hardly determine an interval")
        alone = int((np.bincount(self.stratum) == 1).sum()) if strata else 0
        if alone:
            warnings.append(f"{alone} strata have a single patient, whose variance is not part of the interval")
        if len(usable) < self.replicates:
            warnings.append(f"{self.replicates - len(usable)} resamples lacked a class and are omitted")
        levels = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        if interval == "bca":
            corrected = self._bca_levels(value, usable, values[1 : 1 + patients], levels)
            if corrected is None:
                warnings.append("a correction for bias cannot be determined; the interval is the percentile one")
            else:
                levels = corrected
        low, high = np.quantile(usable, levels) - (usable.mean() - value if interval == "centred" else 0.0)
        return result(float(low), float(high), *warnings)

    def _bca_levels(
        self, value: float, usable: np.ndarray, left_out: np.ndarray, levels: np.ndarray
    ) -> np.ndarray | None:
        below = ((usable < value - 1e-12).mean() + (usable <= value + 1e-12).mean()) / 2
        if not 0 < below < 1 or not np.isfinite(left_out).all():
            return None
        bias, normal = stats.norm.ppf(below), stats.norm.ppf(levels)
        skewed, squared = 0.0, 0.0
        for group in np.unique(self.stratum):
            in_group = left_out[self.stratum == group]
            size = len(in_group)
            influence = (size - 1) * (in_group.mean() - in_group)
            skewed += (influence**3).sum() / size**3
            squared += (influence**2).sum() / size**2
        acceleration = skewed / (6 * squared**1.5) if squared > 0 else 0.0
        return stats.norm.cdf(bias + (bias + normal) / (1 - acceleration * (bias + normal)))
