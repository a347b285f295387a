"""Whether a window of cases is like all cases before it: an exact permutation test of the maximum mean discrepancy (MMD)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

_PERMUTATIONS = 999
# Cases before the window that are compared with it, sampled anew for each window.
_MOST = 300


def median_distance(values: Float[np.ndarray, "case feature"]) -> float:
    """The median distance between cases, the usual width of the kernel; 1 if most cases are equal."""
    sample = values[:_MOST]
    distances = _squared_distances(sample)[np.triu_indices(len(sample), 1)]
    return float(np.sqrt(np.median(distances))) if len(distances) and np.median(distances) > 0 else 1.0


def window_p_value(
    before: Float[np.ndarray, "case feature"],
    window: Float[np.ndarray, "window feature"],
    width: float,
    rng: np.random.Generator,
) -> float:
    """The p-value that the window's cases and those before are exchangeable, by MMD with a Gaussian kernel (Gretton et al. 2012).

    Ties are broken at random, so the p-value is uniform if nothing changed, for any number of cases. If each window is compared
    with all cases before it, the reference and earlier windows, the p-values of successive windows are independent then: each
    depends on how the cases are divided into window and past alone, and the next ones on the undivided cases.

    Args:
      before: the cases before the window, of which at most 300 are sampled.
      window: the window's cases.
      width: the kernel's.
      rng: for the permutations.
    """
    past = before[rng.permutation(len(before))[:_MOST]]
    values = np.concatenate([window, past])
    kernel = np.exp(-_squared_distances(values) / (2 * width**2))
    n, m = len(window), len(past)
    # A column of `parts` is a division: 1/n in the window, -1/m in the past. MMD² is its quadratic form.
    parts = np.full((len(values), _PERMUTATIONS + 1), -1 / m)
    parts[:n, 0] = 1 / n
    order = (
        rng.random((len(values), _PERMUTATIONS)).argpartition(n - 1, axis=0)[:n]
        if n < len(values)
        else np.zeros((0, 0), int)
    )
    parts[order, np.arange(1, _PERMUTATIONS + 1)] = 1 / n
    statistic = np.einsum("ij,ij->j", parts, kernel @ parts)
    observed, others = statistic[0], statistic[1:]
    tolerance = 1e-12 * max(1.0, abs(float(observed)))
    larger, equal = int((others > observed + tolerance).sum()), int((np.abs(others - observed) <= tolerance).sum())
    return float((larger + rng.uniform() * (equal + 1)) / (_PERMUTATIONS + 1))


def _squared_distances(values: np.ndarray) -> np.ndarray:
    squares = (values**2).sum(axis=1)
    return np.maximum(0.0, squares[:, None] + squares[None] - 2 * values @ values.T)
