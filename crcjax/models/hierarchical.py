"""HierarchicalAttentionMIL: slots see each other within a region, regions across the slide."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int
from ml_collections import ConfigDict

from crcjax.models.aggregators import Instances, Pooled
from crcjax.models.attention import AttentionScores, attend, masked_softmax, rotary

_LONGEST = 256.0  # sides of a region: the distance that the slowest rotary angle still tells apart


class HierarchicalAttentionMIL(nnx.Module):
    """Self-attention and gated pooling, first over a region's slots, then over the slide's regions.

    Slots carry learned embeddings of their magnification and of their place in the region; regions carry their place on
    the slide by rotation, so that only distances count. A slide that lacks a magnification has its slots masked. One
    gated branch a class pools the regions. `factors` are the tiles along a region's side, per magnification.
    """

    def __init__(self, config: ConfigDict, classes: int, factors: tuple[int, ...], *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, small = config.features, nnx.initializers.normal(0.02)
        self.count = sum(factor**2 for factor in factors)
        self.magnification_of = tuple(i for i, factor in enumerate(factors) for _ in range(factor**2))
        self.magnification = nnx.Param(small(rngs.params(), (len(factors), width)))
        self.place = nnx.Param(small(rngs.params(), (self.count, width)))
        self.within = Block(width, config.heads, dtype=dtype, rngs=rngs) if self.count > 1 else None
        self.pool_slots = AttentionScores(width, config.attention, 1, gated=True, dtype=dtype, rngs=rngs)
        self.across = nnx.List([Block(width, config.heads, dtype=dtype, rngs=rngs) for _ in range(config.layers)])
        self.pool_regions = AttentionScores(width, config.attention, classes, gated=True, dtype=dtype, rngs=rngs)
        self.classify = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, bag: Instances, label: Int[Array, " batch"] | None = None) -> Pooled:
        batch, _, width = bag.features.shape
        slots = bag.features.reshape(-1, self.count, width)
        slot_mask = bag.mask.reshape(-1, self.count)
        if self.within is not None:
            slots = slots + self.magnification[...][jnp.array(self.magnification_of)] + self.place[...]
            slots = self.within(slots, slot_mask)
        slot_attention = masked_softmax(self.pool_slots(slots), slot_mask)[..., 0]
        regions = jnp.einsum("rs,rsf->rf", slot_attention, slots.astype(jnp.float32)).reshape(batch, -1, width)
        mask = slot_mask.any(axis=1).reshape(batch, -1)
        position = bag.position[:, :: self.count]
        for block in self.across:
            regions = block(regions, mask, position)
        attention = masked_softmax(self.pool_regions(regions), mask)
        embeddings = jnp.einsum("brk,brf->bkf", attention, regions.astype(jnp.float32))
        logits = jnp.einsum("bkk->bk", self.classify(embeddings))  # each branch by its own class's weights alone
        by_instance = attention[:, :, None] * slot_attention.reshape(batch, -1, self.count)[..., None]
        by_instance = by_instance.reshape(batch, -1, attention.shape[-1])
        return Pooled(logits, embeddings.mean(axis=1), by_instance, jnp.zeros(batch))


class Block(nnx.Module):
    """Pre-norm self-attention over unmasked instances and a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = heads
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.project = nnx.Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.merge = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.perceptron = nnx.List(
            [nnx.Linear(width, 2 * width, dtype=dtype, rngs=rngs), nnx.Linear(2 * width, width, dtype=dtype, rngs=rngs)]
        )

    def __call__(
        self,
        values: Float[Array, "batch instance feature"],
        mask: Bool[Array, "batch instance"],
        position: Float32[Array, "batch instance 2"] | None = None,
    ) -> Float[Array, "batch instance feature"]:
        normal = self.norms[0](values)
        parts = self.project(normal).reshape(*values.shape[:2], 3, self.heads, -1)
        query, key, value = parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]
        if position is not None:
            query, key = rotary(query, position, _LONGEST), rotary(key, position, _LONGEST)
        seen = attend(query, key, value, mask).reshape(values.shape)
        values = values + self.merge(seen)
        return values + self.perceptron[1](jax.nn.gelu(self.perceptron[0](self.norms[1](values))))
