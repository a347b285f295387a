"""Sequential tests whose probability of ever raising a false alarm is stated.

An e-process starts at 1 and, as long as nothing changes, exceeds 1/error at any time with probability `error` at most (Ville's
inequality), so it may be looked at after every window without a correction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

# Fractions of the wealth that are bet on a mean above or below its expectation.
_STAKES = (0.1, 0.25, 0.5, 0.75)


def e_value(p_value: float) -> float:
    """The e-value of a p-value: the mean of k * p ** (k - 1) over k in (0, 1) (Vovk and Wang 2021, section 2)."""
    if p_value >= 1:
        return 0.5
    logarithm = float(np.log(p_value))
    return (1 - p_value + p_value * logarithm) / (p_value * logarithm**2)


def change_point_evidence(e_values: Iterable[float]) -> list[float]:
    """The evidence for a change before or at each window, from independent e-values.

    The mean over the window at which the change begins, with weights 1/(n(n+1)), of the product of the e-values since. It is an
    e-process, as a mean of products of e-values is, and a long time without a change takes little from its power.
    """
    evidence, products = [], 0.0
    for number, value in enumerate(e_values, 1):
        products = value * (products + 1 / (number * (number + 1)))
        # Changes that begin later have the product 1.
        evidence.append(products + 1 / (number + 1))
    return evidence


def mean_evidence(
    values: Sequence[float] | Float[np.ndarray, " case"],
    expected: Sequence[float] | Float[np.ndarray, " case"],
    tolerance: float,
) -> tuple[list[float], list[float]]:
    """Evidence, after each value, that values lie below, and above, their expectations by more than a tolerance.

    Each is an e-process while the conditional mean of (value - expectation) is within ±tolerance: the mean over `_STAKES` of a
    gambler's wealth (Waudby-Smith and Ramdas 2024), mixed over the case at which the change begins.

    Args:
      values, expected: in [0, 1].
      tolerance: the largest acceptable mean difference.
    """
    below, above = np.zeros(len(_STAKES)), np.zeros(len(_STAKES))
    evidence: tuple[list[float], list[float]] = ([], [])
    for number, (value, mean) in enumerate(zip(values, expected, strict=True), 1):
        start = 1 / (number * (number + 1))
        for products, difference, history in ((below, mean - value, evidence[0]), (above, value - mean, evidence[1])):
            # A stake of 1/(1 + tolerance) could lose everything by one value; the largest one here stays below that.
            factors = 1 + np.array(_STAKES) * (difference - tolerance) / (1 + tolerance)
            products[:] = factors * (products + start)
            history.append(float(products.mean()) + 1 / (number + 1))
    return evidence
