"""Attention that pools instances to a bag."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float


class GatedAttention(nnx.Module):
    """Gated attention pooling (Ilse et al. 2018, equation 9), with instances that may be absent."""

    def __init__(self, features: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.content = nnx.Linear(features, hidden, dtype=dtype, rngs=rngs)
        self.gate = nnx.Linear(features, hidden, dtype=dtype, rngs=rngs)
        self.score = nnx.Linear(hidden, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self, instances: Float[Array, "batch instance feature"], mask: Bool[Array, "batch instance"]
    ) -> tuple[Float[Array, "batch feature"], Float[Array, "batch instance"]]:
        """The bag's embedding and the attention: sums to one over unmasked instances, zero where there are none."""
        hidden = jnp.tanh(self.content(instances)) * jax.nn.sigmoid(self.gate(instances))
        scores = self.score(hidden)[..., 0].astype(jnp.float32)
        attention = masked_softmax(scores, mask)
        embedding = jnp.einsum("bi,bif->bf", attention, instances.astype(jnp.float32))
        return embedding, attention


def masked_softmax(
    scores: Float[Array, "batch instance"], mask: Bool[Array, "batch instance"]
) -> Float[Array, "batch instance"]:
    """Softmax over unmasked instances; all zeros, not NaN, for a bag that has none."""
    lowest = jnp.finfo(scores.dtype).min
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, lowest), axis=-1), 0.0)
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), jnp.finfo(scores.dtype).tiny)
