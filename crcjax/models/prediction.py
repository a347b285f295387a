"""`Prediction`, the output of a MIL model, and the mean of several; this module needs no JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Float32


# The arrays are NumPy's on the host and JAX's within jitted functions, which `models.mil` registers this class for.
@dataclass(frozen=True)
class Prediction:
    """The model's output for each bag.

    Attention sums to one over a bag and is zero where the mask is False. `class_attention` has one map per branch of the
    aggregator (one branch, or one per class); the other maps are means over the branches. `alpha` and `vacuity` (0 to 1)
    describe the Dirichlet distribution of an evidential head, and are None with another head. `expected_entropy` (nats) is
    the aleatoric uncertainty: the mean entropy over the Dirichlet distribution, the ensemble members or the dropout samples;
    for a single softmax, its entropy. `instance_loss` comes from the aggregator and is zero without labels. `density_excess` is
    the out-of-distribution score of a run with a feature density, and None for all others.
    """

    logits: Float32[Any, "batch class"]
    probs: Float32[Any, "batch class"]
    embedding: Float32[Any, "batch feature"]
    region_attention: Float32[Any, "batch region"]
    slot_attention: Float32[Any, "batch region slot"]
    class_attention: Float32[Any, "batch region slot branch"]
    alpha: Float32[Any, "batch class"] | None
    vacuity: Float32[Any, " batch"] | None
    expected_entropy: Float32[Any, " batch"]
    instance_loss: Float32[Any, " batch"]
    density_excess: Float32[Any, " batch"] | None = None


def logits_of(probs: Float[np.ndarray, "*batch class"]) -> Float[np.ndarray, "*batch class"]:
    """The logarithms of probabilities, which are logits of them."""
    return np.log(np.maximum(probs, np.finfo(np.float32).tiny))


def combine(members: Sequence[Prediction]) -> Prediction:
    """Averages the predictions of the same bags by ensemble members or dropout samples, on the host.

    The logits of the result are the logarithms of the mean probabilities. The entropy of the mean minus the mean entropy is
    the mutual information of class and member, the epistemic uncertainty (Lakshminarayanan et al. 2017, Depeweg et al. 2018).
    """
    if len(members) == 1:
        return members[0]
    present = [field.name for field in fields(Prediction) if getattr(members[0], field.name) is not None]
    means = {name: np.mean(np.stack([getattr(member, name) for member in members]), axis=0) for name in present}
    return replace(members[0], **means | {"logits": logits_of(means["probs"])})
