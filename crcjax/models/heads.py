"""Heads: a bag's logits to probabilities, and to the doubt that stands behind them."""

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
    """Probabilities, their expected entropy (nats) and, of an evidential head, Dirichlet parameters and vacuity.

    The entropy is expected over the distributions that the head holds possible: with softmax, one alone.
    """

    probs: Float32[Array, "batch class"]
    expected_entropy: Float32[Array, " batch"]
    alpha: Float32[Array, "batch class"] | None = None
    vacuity: Float32[Array, " batch"] | None = None


def softmax_head(logits: Logits) -> HeadOutput:
    """Softmax, which holds one distribution possible."""
    probs = jax.nn.softmax(logits)
    return HeadOutput(probs, -xlogy(probs, probs).sum(axis=-1))


def evidential_head(logits: Logits) -> HeadOutput:
    """Evidence is softplus of the logits (Sensoy et al. 2018, section 3), alpha = evidence + 1.

    Probabilities alpha / sum(alpha), vacuity K / sum(alpha). ReLU, as published, would leave bags without any evidence
    no gradient.
    """
    return dirichlet(jax.nn.softplus(logits) + 1.0)


def dirichlet(alpha: Float32[Array, "batch class"]) -> HeadOutput:
    """What a Dirichlet distribution says."""
    strength = alpha.sum(axis=-1, keepdims=True)
    probs = alpha / strength
    expected = (probs * (digamma(strength + 1.0) - digamma(alpha + 1.0))).sum(axis=-1)
    return HeadOutput(probs, jnp.asarray(expected), alpha, alpha.shape[-1] / strength[:, 0])


BY_DENSITY = "evidential_density"  # evidential in training; prediction weighs its evidence by the bag's density
HEADS = {"softmax": softmax_head, "evidential": evidential_head, BY_DENSITY: evidential_head}


class TaskHeads(nnx.Module):
    """A linear head of instances for every task, by name, of so many outputs.

    With `learned`, it holds the log-variances that weigh the losses, the subtype's first.
    """

    def __init__(self, outputs: dict[str, int], features: int, learned: bool, rngs: nnx.Rngs):
        self.heads = nnx.Dict({name: nnx.Linear(features, size, rngs=rngs) for name, size in outputs.items()})
        if learned:
            self.log_variance = nnx.Param(jnp.zeros(1 + len(outputs)))

    def __call__(self, features: Float32[Array, "*instance feature"]) -> dict[str, Float32[Array, "*instance output"]]:
        """What each head says of instances."""
        return {name: head(features) for name, head in self.heads.items()}
