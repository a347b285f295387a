"""HierarchicalAttentionMIL: self-attention between the slots of a region, then between the regions of a slide."""

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
    attention_kernel,
    in_blocks,
    masked_softmax,
    rotary,
)
from crcjax.models.linear import Linear
from crcjax.models.tiled_attention import attend_in_tiles

# The distance, in sides of a region, up to which the slowest rotary angle distinguishes positions.
_LONGEST = 256.0
# On CPUs, for each bag: the instances that are processed at a time; the query-key pairs whose scores are computed at once;
# and, for more pairs, the tile of queries and keys, which fits the caches.
_INSTANCES, _PAIRS, _TILE = 2**11, 2**21, (2**8, 2**9)
# On other devices, for all bags together; smaller blocks would leave such a device idle.
_INSTANCES_ELSEWHERE, _PAIRS_ELSEWHERE = 2**16, 2**25
# With fewer queries at a time, the accumulation of the gradients of all keys would dominate the time.
_LEAST_QUERIES = 16


class HierarchicalAttentionMIL(nnx.Module):
    """Self-attention and gated pooling, first over the slots of each region, then over the regions of the slide.

    Slots have learned embeddings of their magnification and of their place in the region. Regions have rotary position
    embeddings, so that only relative positions matter. The slots of a magnification that a slide lacks are masked. One
    gated branch per class pools the regions.

    Args:
      config: config.model.
      classes: the number of classes.
      factors: the number of tiles along a region's side at each magnification.
      dtype: the type of the computation.
      rngs: the random keys of the initialisation.
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
        # The logit of a class uses the branch of that class only.
        logits = jnp.einsum("bkk->bk", self.classify(embeddings))
        by_instance = attention[:, :, None] * slot_attention[..., None]
        by_instance = by_instance.reshape(batch, -1, attention.shape[-1])
        return Pooled(logits, embeddings.mean(axis=1), by_instance, jnp.zeros(batch))

    def _pool_slots(
        self, slots: Float[Array, "batch row slot feature"], mask: Bool[Array, "batch row slot"]
    ) -> tuple[Float32[Array, "batch row feature"], Float32[Array, "batch row slot"]]:
        """Pools the slots of each region; returns the features of the regions and the attention to their slots."""
        leading_axes, (count, width) = slots.shape[:2], slots.shape[2:]
        slots, mask = slots.reshape(-1, count, width), mask.reshape(-1, count)
        if self.within is not None:
            slots = slots + self.magnification[...][jnp.array(self.magnification_of)] + self.place[...]
            slots = self.within(slots, mask)
        attention = masked_softmax(self.pool_slots(slots), mask)[..., 0]
        regions = jnp.einsum("rs,rsf->rf", attention, slots.astype(jnp.float32))
        return regions.reshape(*leading_axes, -1), attention.reshape(*leading_axes, -1)


class Block(nnx.Module):
    """Pre-norm self-attention over unmasked instances and a two-layer perceptron, each with a residual connection.

    Instances with positions use the fused `attention_kernel` of the device, if it has one. Set `fused` to False where
    devices share a bag.
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
            tokens: Float[Array, "batch row feature"], *positions: Float32[Array, "batch row 2"]
        ) -> tuple[Float[Array, "batch row head channel"], ...]:
            projections = self.project(self.norms[0](tokens)).reshape(*tokens.shape[:2], 3, self.heads, -1)
            query, key, value = jnp.moveaxis(projections, 2, 0)
            for token_position in positions:
                query, key = rotary(query, token_position, _LONGEST), rotary(key, token_position, _LONGEST)
            return query, key, value

        inputs = (values,) if position is None else (values, position)
        query, key, value = in_blocks(projected, _instances(batch), *inputs, remat=self.remat)
        if position is not None and self.fused and (implementation := attention_kernel(query.dtype, query.shape[-1])):
            unmasked_first = jnp.argsort(~mask, axis=1, stable=True)[..., None, None]
            key, value = (jnp.take_along_axis(array, unmasked_first, axis=1) for array in (key, value))
            attention_output = attend_on_chip(query, key, value, mask.sum(axis=1), implementation)
        else:
            attention_output = attend_in_tiles(query, key, value, mask, _tile(batch, count))

        def merged(
            tokens: Float[Array, "batch row feature"], attended: Float[Array, "batch row head channel"]
        ) -> tuple[Float[Array, "batch row feature"]]:
            tokens = tokens + self.merge(attended.reshape(tokens.shape))
            return (tokens + self.perceptron[1](jax.nn.gelu(self.perceptron[0](self.norms[1](tokens)))),)

        return in_blocks(merged, _instances(batch), values, attention_output, remat=self.remat)[0]


def _instances(batch: int) -> int:
    """The number of instances of each bag that are processed at a time."""
    return _INSTANCES if jax.default_backend() == "cpu" else max(_INSTANCES, _INSTANCES_ELSEWHERE // batch)


def _tile(batch: int, count: int) -> tuple[int, int]:
    """The queries and keys of each bag whose scores are computed at a time."""
    if jax.default_backend() == "cpu":
        return (count, count) if count**2 <= _PAIRS else _TILE
    return max(_LEAST_QUERIES, _PAIRS_ELSEWHERE // batch // count), count
