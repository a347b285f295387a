"""Losses: pure functions, in float32."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int


def cross_entropy(
    logits: Float32[Array, "batch class"], label: Int[Array, " batch"], weight: Float[Array, " batch"], smoothing: float
) -> Float32[Array, ""]:
    """Weighted mean of the cross-entropy against labels smoothed by `smoothing` (0 to 1), in nats."""
    target = optax.smooth_labels(jnp.eye(logits.shape[-1])[label], smoothing)
    losses = optax.softmax_cross_entropy(logits, target)
    return (losses * weight).sum() / jnp.maximum(weight.sum(), 1e-9)
