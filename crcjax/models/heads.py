"""Heads: a bag's logits to probabilities and, if evidential, to the Dirichlet distribution behind them."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float32

Logits = Float32[Array, "batch class"]
HeadOutput = tuple[Float32[Array, "batch class"] | None, Float32[Array, "batch class"], Float32[Array, " batch"] | None]


def softmax_head(logits: Logits) -> HeadOutput:
    """(None, probabilities, None)."""
    return None, jax.nn.softmax(logits), None


def evidential_head(logits: Logits) -> HeadOutput:
    """(alpha, probabilities, vacuity): evidence is softplus of the logits (Sensoy et al. 2018, section 3).

    alpha = evidence + 1, probabilities alpha / sum(alpha), vacuity K / sum(alpha). ReLU, as published, would leave bags
    without any evidence no gradient.
    """
    alpha = jax.nn.softplus(logits) + 1.0
    strength = alpha.sum(axis=-1, keepdims=True)
    return alpha, alpha / strength, alpha.shape[-1] / strength[:, 0]


HEADS = {"softmax": softmax_head, "evidential": evidential_head}
