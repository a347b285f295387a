"""Metrics of predictions against labels, as clu metrics that can be merged and computed at the end."""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jaxtyping import Array, Bool, Float32, Int


def confusion(
    scores: Float32[Array, "*instance class"], labels: Int[Array, "*instance"], mask: Bool[Array, "*instance"]
) -> Float32[Array, "class class"]:
    """Counts the valid instances of each class (rows) by predicted class (columns)."""
    counts = jnp.zeros((scores.shape[-1],) * 2)
    return counts.at[jnp.maximum(labels, 0), scores.argmax(axis=-1)].add(mask)


@flax.struct.dataclass
class BalancedAccuracy(metrics.Metric):
    """The mean recall over the classes that have an instance."""

    # Float32[Array, "class class"]; rows are labels.
    confusion: Any

    @classmethod
    def from_model_output(cls, probs: Array, labels: Array, mask: Array | None = None, **_: Any) -> BalancedAccuracy:
        """The metric of one batch; without a mask, every instance counts."""
        return cls(confusion(probs, labels, jnp.ones(labels.shape, bool) if mask is None else mask))

    def merge(self, other: BalancedAccuracy) -> BalancedAccuracy:
        """The metric over the instances of two."""
        return type(self)(self.confusion + other.confusion)

    def compute(self) -> Any:
        """The balanced accuracy, 0 to 1."""
        counts = np.asarray(self.confusion)
        has_instances = counts.sum(axis=1) > 0
        return (counts.diagonal()[has_instances] / counts.sum(axis=1)[has_instances]).mean()


# `loss` is the negative log-likelihood of the labels, in nats.
ValidationMetrics = metrics.Collection.create(
    loss=metrics.Average.from_output("nll"), balanced_accuracy=BalancedAccuracy
)


@jax.jit
def validation_metrics(probs: Float32[Array, "bag class"], labels: Int[Array, " bag"]) -> metrics.Collection:
    """The negative log-likelihood (nats) and balanced accuracy of predicted probabilities."""
    label_probs = jnp.take_along_axis(probs, labels[:, None], axis=1)[:, 0]
    nll = -jnp.log(jnp.maximum(label_probs, 1e-12))
    return ValidationMetrics.single_from_model_output(nll=nll, probs=probs, labels=labels)
