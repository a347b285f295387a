"""The model: a bag of tiles to a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Key, Num
from ml_collections import ConfigDict

from crcjax.errors import InputError
from crcjax.models.attention import GatedAttention
from crcjax.models.encoders import build_encoder
from crcjax.models.heads import SoftmaxHead

Params = dict[str, Any]  # a nested dictionary of arrays, as optax and Orbax take it; nnx.merge gives the model back
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prediction:
    """What the model says of each bag. Attention sums to one over a bag and is zero where the mask is False."""

    logits: Float32[Array | np.ndarray, "batch class"]
    probs: Float32[Array | np.ndarray, "batch class"]
    embedding: Float32[Array | np.ndarray, "batch feature"]
    region_attention: Float32[Array | np.ndarray, "batch region"]
    slot_attention: Float32[Array | np.ndarray, "batch region slot"]


class MILModel(nnx.Module):
    """Tile encoder, gated attention over all instances of the bag, softmax head."""

    def __init__(self, config: ConfigDict, classes: int, rngs: nnx.Rngs):
        if config.dtype not in DTYPES:
            raise InputError(f"config.model.dtype {config.dtype!r}: choose float32 or bfloat16")
        dtype = DTYPES[config.dtype]
        self.dropout = config.dropout
        self.encoder = build_encoder(config, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(config.features, rngs=rngs)
        self.attention = GatedAttention(config.features, config.attention, dtype=dtype, rngs=rngs)
        self.head = SoftmaxHead(config.features, classes, rngs=rngs)

    def encode(self, pixels: Num[Array, "*instance y x 3"]) -> Float32[Array, "*instance feature"]:
        """Features of tiles, 8-bit intensities (0 to 255) of any numeric type."""
        lead = pixels.shape[:-3]
        features = self.encoder(pixels.reshape(-1, *pixels.shape[-3:]))  # type: ignore[operator]
        return self.norm(features.astype(jnp.float32)).reshape(*lead, -1)

    def pool(
        self,
        features: Float[Array, "batch region slot feature"],
        mask: Bool[Array, "batch region slot"],
        key: Key[Array, ""] | None = None,
    ) -> Prediction:
        """The prediction from a bag's features; with a key, with dropout, as in training."""
        batch, regions, slots, width = features.shape
        instances = features.reshape(batch, regions * slots, width)
        if key is not None and self.dropout:
            keep = jax.random.bernoulli(key, 1 - self.dropout, instances.shape)
            instances = jnp.where(keep, instances / (1 - self.dropout), 0.0)
        embedding, attention = self.attention(instances, mask.reshape(batch, -1))
        logits = self.head(embedding)
        slot_attention = attention.reshape(batch, regions, slots)
        return Prediction(logits, jax.nn.softmax(logits), embedding, slot_attention.sum(axis=-1), slot_attention)

    def __call__(
        self,
        pixels: Num[Array, "batch region slot y x 3"],
        mask: Bool[Array, "batch region slot"],
        key: Key[Array, ""] | None = None,
    ) -> Prediction:
        """The prediction from a bag's pixels."""
        return self.pool(self.encode(pixels), mask, key)


def build_model(config: ConfigDict, classes: int, seed: int) -> MILModel:
    """The model of `config` (config.model) with parameters drawn from `seed`. Raises InputError."""
    return MILModel(config, classes, nnx.Rngs(seed))


def params_of(model: MILModel) -> Params:
    """The model's parameters as plain nested dictionaries."""
    return nnx.to_pure_dict(nnx.state(model))
