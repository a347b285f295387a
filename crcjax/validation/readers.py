"""A system beside human readers: does it agree with them as well as they agree with each other?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from crcjax.errors import InputError
from crcjax.validation.agreement import MISSING, Ratings
from crcjax.validation.bootstrap import Resamples, number_patients
from crcjax.validation.confusion import kappas
from crcjax.validation.estimate import Estimate, undetermined

_FEWEST_READERS = 2


@dataclass(frozen=True)
class ReaderComparison:
    """Mean pairwise kappas.

    Attributes:
      system: of the system with each reader.
      readers: of the readers with each other.
      difference: the first less the second; judge non-inferiority by its lower limit.
      by_reader: of the system with each single reader.
    """

    system: Estimate
    readers: Estimate
    difference: Estimate
    by_reader: list[Estimate]


def compare_with_readers(
    system: Int[np.ndarray, " case"], ratings: Ratings, classes: int, seed: int, replicates: int = 2000
) -> ReaderComparison:
    """Compares a system with readers by bootstrapping both cases and readers, so that the result holds for other readers too.

    Two copies of one reader in a resample are not compared with each other. With fewer than five readers the intervals are rough.

    Args:
      system: the class that the system gave each case, or `agreement.MISSING`.
      ratings: the class that each reader gave it, or `agreement.MISSING`; a pair of readers is compared on the cases of both.
      classes: the number of classes.
      seed: the seed of the resamples.
      replicates: the number of resamples.

    Raises:
      InputError: a rating is no class.
    """
    every = np.column_stack([system, ratings])
    if ((every < MISSING) | (every >= classes)).any():
        wrong = every[(every < MISSING) | (every >= classes)][0]
        raise InputError(
            f"a rating must be a class from 0 to {classes - 1}, or {MISSING} if it is missing, got {wrong}"
        )
    n, readers = ratings.shape
    method = f"mean pairwise kappa, bootstrap over cases and readers, percentile, {replicates} resamples"
    if readers < _FEWEST_READERS or n < 2:
        nothing = undetermined(method, n, "a comparison needs two readers and two cases")
        return ReaderComparison(nothing, nothing, nothing, [nothing] * readers)
    # Readers and cases are numbered by their ratings, so that the order of the columns and rows does not matter.
    order = _reader_order(system, ratings)
    resamples = Resamples.sample(number_patients(None, system, ratings[:, order]), seed, replicates)
    rng = np.random.default_rng([seed, 23])
    chosen = rng.multinomial(readers, np.full(readers, 1 / readers), size=replicates)
    reader_weights = np.ones((1 + replicates, readers))
    reader_weights[1:, order] = chosen

    with_system = np.stack([_kappas(resamples, system, rating, classes) for rating in ratings.T], axis=1)
    pair_values, pair_weights = [], []
    for i in range(readers):
        for j in range(i):
            pair_values.append(_kappas(resamples, ratings[:, i], ratings[:, j], classes))
            pair_weights.append(reader_weights[:, i] * reader_weights[:, j])
    system_mean = _weighted_mean(with_system, reader_weights)
    reader_mean = _weighted_mean(np.stack(pair_values, axis=1), np.stack(pair_weights, axis=1))

    def estimate(values: Float[np.ndarray, " column"], method: str = method) -> Estimate:
        return replace(resamples.estimate(values), method=method, n_clusters=None)

    one = f"kappa, bootstrap over cases, percentile, {replicates} resamples"
    return ReaderComparison(
        estimate(system_mean),
        estimate(reader_mean),
        estimate(system_mean - reader_mean),
        [estimate(values, one) for values in with_system.T],
    )


def _reader_order(system: np.ndarray, ratings: np.ndarray) -> Int[np.ndarray, " reader"]:
    """The readers in an order that depends on neither that of the columns nor that of the rows."""
    keys = []
    for reader in range(ratings.shape[1]):
        others = np.sort(ratings, axis=1)
        rows = np.column_stack([ratings[:, reader], system, others])
        keys.append(rows[np.lexsort(rows.T[::-1])].ravel().tolist())
    return np.array(sorted(range(len(keys)), key=lambda reader: keys[reader]))


def _kappas(resamples: Resamples, first: np.ndarray, second: np.ndarray, classes: int) -> Float[np.ndarray, " column"]:
    cells, both = np.zeros((len(first), classes**2)), np.flatnonzero((first != MISSING) & (second != MISSING))
    cells[both, first[both] * classes + second[both]] = 1
    return kappas(resamples.totals(cells).T.reshape(-1, classes, classes))


def _weighted_mean(
    values: Float[np.ndarray, "column pair"], weights: Float[np.ndarray, "column pair"]
) -> Float[np.ndarray, " column"]:
    """The mean over the pairs that have a value; NaN if there is none."""
    known = np.isfinite(values) & (weights > 0)
    total = (weights * known).sum(axis=1)
    mean = (np.where(known, values, 0) * weights).sum(axis=1) / np.maximum(total, 1e-300)
    return np.where(total > 0, mean, np.nan)
