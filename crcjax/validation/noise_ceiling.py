"""The noise ceiling: what agreement a system can reach with a reference that itself has errors.

The reference is right with the same probability in every case, and an error falls on each other class equally often and
independently of the system's errors. Agreement above the reference's own accuracy is then chance, or shared errors.
"""

from __future__ import annotations

import numpy as np

from crcjax.errors import InputError
from crcjax.validation.estimate import Estimate


def expected_agreement(accuracy: float, reference_accuracy: float, classes: int) -> float:
    """The agreement with the reference of a system that gives the true class with probability `accuracy`."""
    _check(reference_accuracy, classes)
    if not 0 <= accuracy <= 1:
        raise InputError(f"an accuracy must be from 0 to 1, got {accuracy:g}")
    return accuracy * reference_accuracy + (1 - accuracy) * (1 - reference_accuracy) / (classes - 1)


def accuracy_for_truth(agreement: Estimate, reference_accuracy: float, classes: int) -> Estimate:
    """The accuracy for the true class that an observed agreement implies (after Rogan and Gladen 1978).

    A sensitivity analysis: it stands on the assumptions above, and on the reference's accuracy, which is taken as known.
    Accuracies beyond 0 and 1 are cut there, with a warning.
    """
    _check(reference_accuracy, classes)
    chance = (1 - reference_accuracy) / (classes - 1)
    value, low, high = (
        (limit - chance) / (reference_accuracy - chance)
        for limit in (agreement.value, agreement.ci_low, agreement.ci_high)
    )
    warnings = agreement.warnings
    if value > 1:
        reason = f"the agreement is above the ceiling of {reference_accuracy:g}: errors are shared, or it is by chance"
        warnings = (*warnings, reason)
    method = f"{agreement.method}, for a reference that is right in {reference_accuracy:g} (sensitivity analysis)"
    value, low, high = (float(np.clip(limit, 0, 1)) for limit in (value, low, high))
    return Estimate(value, low, high, method, agreement.n, agreement.level, warnings, agreement.n_clusters)


def reference_accuracy(repeat_agreement: Estimate, classes: int) -> Estimate:
    """The accuracy of a reference whose repetitions, such as calls of two samples, agree so often.

    Repetitions agree where both are right, or both wrong in the same way: q² + (1 - q)² / (classes - 1). Agreement below what
    chance gives is taken as chance, with a warning. Raises InputError for fewer than two classes.
    """
    _check(1.0, classes)
    least = 1 / classes

    def inverted(agreement: float) -> float:
        # The larger root of the quadratic in q; below chance the root is that of chance.
        a, b, c = classes / (classes - 1), -2 / (classes - 1), 1 / (classes - 1) - max(agreement, least)
        return float((-b + np.sqrt(max(0.0, b * b - 4 * a * c))) / (2 * a))

    values = (repeat_agreement.value, repeat_agreement.ci_low, repeat_agreement.ci_high)
    value, low, high = (inverted(limit) if np.isfinite(limit) else np.nan for limit in values)
    warnings = repeat_agreement.warnings
    if repeat_agreement.value < least:
        warnings = (*warnings, "repetitions agree less often than by chance")
    method = f"{repeat_agreement.method}, of repetitions with independent errors"
    return Estimate(value, low, high, method, repeat_agreement.n, repeat_agreement.level, warnings)


def _check(reference_accuracy: float, classes: int) -> None:
    if classes < 2:
        raise InputError(f"there must be two classes or more, got {classes}")
    if not 1 / classes < reference_accuracy <= 1:
        raise InputError(
            f"the reference's accuracy must be above 1/{classes}, which is chance, and at most 1, got {reference_accuracy:g}"
        )
