"""Heads: class probabilities and uncertainty from the logits of a bag."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.special import digamma, xlogy
from jaxtyping import Array, Float32

Logits = Float32[Array, "batch class"]


@dataclass(frozen=True)
class HeadOutput:
    """Probabilities, expected entropy in nats and, for an evidential head, Dirichlet parameters and vacuity.

    The expected entropy is the aleatoric uncertainty: the mean entropy over the head's distribution of class probabilities.
    For softmax this distribution is a single point.
    """

    probs: Float32[Array, "batch class"]
    expected_entropy: Float32[Array, " batch"]
    alpha: Float32[Array, "batch class"] | None = None
    vacuity: Float32[Array, " batch"] | None = None


def softmax_head(logits: Logits) -> HeadOutput:
    """Softmax; the expected entropy is the entropy of its probabilities."""
    probs = jax.nn.softmax(logits)
    return HeadOutput(probs, -xlogy(probs, probs).sum(axis=-1))


def evidential_head(logits: Logits) -> HeadOutput:
    """Evidential head (Sensoy et al. 2018, section 3): evidence = softplus(logits), alpha = evidence + 1.

    The probabilities are alpha / sum(alpha), the vacuity is K / sum(alpha) for K classes. The published ReLU in place of
    softplus would give no gradient to bags without evidence.
    """
    return dirichlet(jax.nn.softplus(logits) + 1.0)


def dirichlet(alpha: Float32[Array, "batch class"]) -> HeadOutput:
    """Probabilities, expected entropy and vacuity of Dirichlet distributions with parameters `alpha`."""
    strength = alpha.sum(axis=-1, keepdims=True)
    probs = alpha / strength
    expected = (probs * (digamma(strength + 1.0) - digamma(alpha + 1.0))).sum(axis=-1)
    return HeadOutput(probs, jnp.asarray(expected), alpha, alpha.shape[-1] / strength[:, 0])


# Evidential in training; prediction scales the evidence by the bag's feature density.
BY_DENSITY = "evidential_density"
HEADS = {"softmax": softmax_head, "evidential": evidential_head, BY_DENSITY: evidential_head}


class TaskHeads(nnx.Module):
    """One linear head per auxiliary task, applied to every instance.

    Args:
      outputs: the number of outputs of each head, by task.
      features: the number of features of an instance.
      learned: whether `log_variance` holds log-variances that weight the losses: first the subtype's, then the tasks'.
      rngs: the random keys of the initialisation.
    """

    def __init__(self, outputs: dict[str, int], features: int, learned: bool, rngs: nnx.Rngs):
        self.heads = nnx.Dict({name: nnx.Linear(features, size, rngs=rngs) for name, size in outputs.items()})
        if learned:
            self.log_variance = nnx.Param(jnp.zeros(1 + len(outputs)))

    def __call__(self, features: Float32[Array, "*instance feature"]) -> dict[str, Float32[Array, "*instance output"]]:
        """The outputs of every head, by task."""
        return {name: head(features) for name, head in self.heads.items()}
