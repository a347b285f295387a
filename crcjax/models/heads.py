"""Heads: from a bag's logits to class probabilities and their uncertainty."""

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
    """Probabilities, their expected entropy in nats and, for an evidential head, Dirichlet parameters and vacuity.

    The expected entropy is the aleatoric uncertainty: the mean entropy over the head's distribution of class probabilities,
    which for softmax is a single point.
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
    """Evidence is softplus of the logits (Sensoy et al. 2018, section 3), alpha = evidence + 1.

    Probabilities alpha / sum(alpha), vacuity K / sum(alpha). The published ReLU would give no gradient to
    bags without evidence.
    """
    return dirichlet(jax.nn.softplus(logits) + 1.0)


def dirichlet(alpha: Float32[Array, "batch class"]) -> HeadOutput:
    """Probabilities, expected entropy and vacuity of Dirichlet distributions."""
    strength = alpha.sum(axis=-1, keepdims=True)
    probs = alpha / strength
    expected = (probs * (digamma(strength + 1.0) - digamma(alpha + 1.0))).sum(axis=-1)
    return HeadOutput(probs, jnp.asarray(expected), alpha, alpha.shape[-1] / strength[:, 0])


# Evidential in training; prediction scales the evidence by the bag's feature density.
BY_DENSITY = "evidential_density"
HEADS = {"softmax": softmax_head, "evidential": evidential_head, BY_DENSITY: evidential_head}


class TaskHeads(nnx.Module):
    """One linear head per auxiliary task, applied to every instance; `outputs` are their sizes by name.

    With `learned`, `log_variance` holds the log-variances that weight the losses, the subtype's first.
    """

    def __init__(self, outputs: dict[str, int], features: int, learned: bool, rngs: nnx.Rngs):
        self.heads = nnx.Dict({name: nnx.Linear(features, size, rngs=rngs) for name, size in outputs.items()})
        if learned:
            self.log_variance = nnx.Param(jnp.zeros(1 + len(outputs)))

    def __call__(self, features: Float32[Array, "*instance feature"]) -> dict[str, Float32[Array, "*instance output"]]:
        """Each head's outputs for every instance."""
        return {name: head(features) for name, head in self.heads.items()}
