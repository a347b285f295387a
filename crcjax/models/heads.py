"""Heads: a slide's embedding to class scores."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32


class SoftmaxHead(nnx.Module):
    """Logits by one linear layer, in float32."""

    def __init__(self, features: int, classes: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(features, classes, rngs=rngs)

    def __call__(self, embedding: Float[Array, "batch feature"]) -> Float32[Array, "batch class"]:
        return self.linear(embedding.astype(jnp.float32))
