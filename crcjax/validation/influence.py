"""Standard errors from the influence of every unit on a statistic, with patients as clusters.

The influence of a unit is the derivative of the statistic with respect to its weight, times the number of units; influences
sum to zero. Units of one patient are added up before they are squared, so that copies of a slide add no information.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from crcjax.validation.estimate import LEVEL, Estimate

Z = float(stats.norm.ppf((1 + LEVEL) / 2))


def clustered_error(influence: Float[np.ndarray, " unit"], cluster: Int[np.ndarray, " unit"] | None = None) -> float:
    """The standard error of a statistic from its influences; units of one cluster may be correlated (Obuchowski 1997)."""
    if cluster is not None:
        _, place = np.unique(cluster, return_inverse=True)
        total = np.bincount(place, influence)
    else:
        total = influence
    return float(np.sqrt((total**2).sum())) / len(influence)


def count_clusters(cluster: Int[np.ndarray, " unit"] | None) -> int | None:
    """The number of patients; None if every unit is its own."""
    return None if cluster is None else len(np.unique(cluster))


def wald_estimate(
    value: float,
    influence: Float[np.ndarray, " unit"],
    method: str,
    cluster: Int[np.ndarray, " unit"] | None = None,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    warnings: tuple[str, ...] = (),
) -> Estimate:
    """The value with a symmetric interval, cut at the bounds of the statistic.

    The limits are NaN, with a warning, if no unit has an influence: a perfect result shows no variance, which does not mean
    that there is none.
    """
    error, n, clusters = clustered_error(influence, cluster), len(influence), count_clusters(cluster)
    method = method if cluster is None else f"{method}, clustered by patient"
    if not error > 1e-12 or (clusters is not None and clusters < 2):
        reason = "the data show no variance, which determines no interval"
        if clusters is not None and clusters < 2:
            reason = "all units are of one patient, which determines no interval"
        return Estimate(value, np.nan, np.nan, method, n, warnings=(*warnings, reason), n_clusters=clusters)
    low, high = max(bounds[0], value - Z * error), min(bounds[1], value + Z * error)
    return Estimate(value, low, high, method, n, warnings=warnings, n_clusters=clusters)
