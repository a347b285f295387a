"""HierarchicalAttentionMIL: self-attention between a region's slots, then between a slide's regions."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int
from ml_collections import ConfigDict

from crcjax.models.aggregators.pooling import Instances, Pooled
from crcjax.models.attention import (
    REMAT,
    AttentionScores,
    Remat,
    attend_on_chip,
    in_blocks,
    kernel,
    masked_softmax,
    rotary,
)
from crcjax.models.linear import Linear
from crcjax.models.tiled_attention import attend_in_tiles

# In sides of a region: the distance up to which the slowest rotary angle distinguishes positions.
_LONGEST = 256.0
# Per bag, on CPUs: instances processed at a time; query-key pairs whose scores are computed at once; and, with more pairs,
# the tile of queries and keys, which stays in the caches.
_INSTANCES, _PAIRS, _TILE = 2**11, 2**21, (2**8, 2**9)
# Of all bags, on other devices, which small blocks would leave idle.
_INSTANCES_ELSEWHERE, _PAIRS_ELSEWHERE = 2**16, 2**25
# With fewer queries at a time, accumulating the gradients of all keys would dominate the time.
_LEAST_QUERIES = 16


class HierarchicalAttentionMIL(nnx.Module):
    """Self-attention and gated pooling, first over a region's slots, then over the slide's regions.

    Slots have learned embeddings of their magnification and of their place in the region. Regions have rotary position
    embeddings, so that only relative positions matter. A slide that lacks a magnification has its slots masked. One gated
    branch per class pools the regions. `factors` are the tiles along a region's side, per magnification.
    """

    def __init__(self, config: ConfigDict, classes: int, factors: tuple[int, ...], *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, small = config.features, nnx.initializers.normal(0.02)
        self.count = sum(factor**2 for factor in factors)
        self.magnification_of = tuple(i for i, factor in enumerate(factors) for _ in range(factor**2))
        self.magnification = nnx.Param(small(rngs.params(), (len(factors), width)))
        self.place = nnx.Param(small(rngs.params(), (self.count, width)))
        self.remat = REMAT[config.remat]
        block = partial(Block, width, config.heads, self.remat, dtype=dtype, rngs=rngs)
        self.within = block() if self.count > 1 else None
        self.pool_slots = AttentionScores(width, config.attention, 1, gated=True, dtype=dtype, rngs=rngs)
        self.across = nnx.List([block() for _ in range(config.layers)])
        self.pool_regions = AttentionScores(width, config.attention, classes, gated=True, dtype=dtype, rngs=rngs)
        self.classify = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, bag: Instances, label: Int[Array, " batch"] | None = None) -> Pooled:
        batch, _, width = bag.features.shape
        slots = bag.features.reshape(batch, -1, self.count, width)
        slot_mask = bag.mask.reshape(batch, -1, self.count)
        largest = max(1, _instances(batch) // self.count)
        regions, slot_attention = in_blocks(self._pool_slots, largest, slots, slot_mask, remat=self.remat)
        mask = slot_mask.any(axis=2)
        position = bag.position[:, :: self.count]
        for block in self.across:
            regions = block(regions, mask, position)
        attention = masked_softmax(self.pool_regions(regions), mask)
        embeddings = jnp.einsum("brk,brf->bkf", attention, regions.astype(jnp.float32))
        # Each branch is classified by the weights of its own class alone.
        logits = jnp.einsum("bkk->bk", self.classify(embeddings))
        by_instance = attention[:, :, None] * slot_attention[..., None]
        by_instance = by_instance.reshape(batch, -1, attention.shape[-1])
        return Pooled(logits, embeddings.mean(axis=1), by_instance, jnp.zeros(batch))

    def _pool_slots(
        self, slots: Float[Array, "batch some slot feature"], mask: Bool[Array, "batch some slot"]
    ) -> tuple[Float32[Array, "batch some feature"], Float32[Array, "batch some slot"]]:
        """The features of some regions, and the attention to their slots."""
        lead, (count, width) = slots.shape[:2], slots.shape[2:]
        slots, mask = slots.reshape(-1, count, width), mask.reshape(-1, count)
        if self.within is not None:
            slots = slots + self.magnification[...][jnp.array(self.magnification_of)] + self.place[...]
            slots = self.within(slots, mask)
        attention = masked_softmax(self.pool_slots(slots), mask)[..., 0]
        regions = jnp.einsum("rs,rsf->rf", attention, slots.astype(jnp.float32))
        return regions.reshape(*lead, -1), attention.reshape(*lead, -1)


class Block(nnx.Module):
    """Pre-norm self-attention over unmasked instances and a two-layer perceptron, each added to its input.

    Between instances with positions, the device's fused attention `kernel` is used if there is one. Set `fused` to False
    where devices share a bag.
    """

    def __init__(self, width: int, heads: int, remat: Remat, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads, self.remat, self.fused = heads, remat, True
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.project = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.merge = Linear(width, width, dtype=dtype, rngs=rngs)
        self.perceptron = nnx.List(
            [Linear(width, 2 * width, dtype=dtype, rngs=rngs), Linear(2 * width, width, dtype=dtype, rngs=rngs)]
        )

    def __call__(
        self,
        values: Float[Array, "batch instance feature"],
        mask: Bool[Array, "batch instance"],
        position: Float32[Array, "batch instance 2"] | None = None,
    ) -> Float[Array, "batch instance feature"]:
        batch, count, _ = values.shape

        def projected(
            tokens: Float[Array, "batch some feature"], *place: Float32[Array, "batch some 2"]
        ) -> tuple[Float[Array, "batch some head channel"], ...]:
            parts = self.project(self.norms[0](tokens)).reshape(*tokens.shape[:2], 3, self.heads, -1)
            query, key, value = jnp.moveaxis(parts, 2, 0)
            for at in place:
                query, key = rotary(query, at, _LONGEST), rotary(key, at, _LONGEST)
            return query, key, value

        rows = (values,) if position is None else (values, position)
        query, key, value = in_blocks(projected, _instances(batch), *rows, remat=self.remat)
        if position is not None and self.fused and (implementation := kernel(query.dtype, query.shape[-1])):
            unmasked_first = jnp.argsort(~mask, axis=1, stable=True)[..., None, None]
            key, value = (jnp.take_along_axis(part, unmasked_first, axis=1) for part in (key, value))
            attention_output = attend_on_chip(query, key, value, mask.sum(axis=1), implementation)
        else:
            attention_output = attend_in_tiles(query, key, value, mask, _tile(batch, count))

        def following(
            tokens: Float[Array, "batch some feature"], attended: Float[Array, "batch some head channel"]
        ) -> tuple[Float[Array, "batch some feature"]]:
            tokens = tokens + self.merge(attended.reshape(tokens.shape))
            return (tokens + self.perceptron[1](jax.nn.gelu(self.perceptron[0](self.norms[1](tokens)))),)

        return in_blocks(following, _instances(batch), values, attention_output, remat=self.remat)[0]


def _instances(batch: int) -> int:
    """The number of instances of each bag that are processed at a time."""
    return _INSTANCES if jax.default_backend() == "cpu" else max(_INSTANCES, _INSTANCES_ELSEWHERE // batch)


def _tile(batch: int, count: int) -> tuple[int, int]:
    """The queries and keys of each bag whose scores are computed at a time."""
    if jax.default_backend() == "cpu":
        return (count, count) if count**2 <= _PAIRS else _TILE
    return max(_LEAST_QUERIES, _PAIRS_ELSEWHERE // batch // count), count
