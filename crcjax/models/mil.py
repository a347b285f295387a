"""The MIL model: from a bag of tiles to a prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Key, Num
from ml_collections import ConfigDict

from crcjax.errors import InputError
from crcjax.models.aggregators.hierarchical import HierarchicalAttentionMIL
from crcjax.models.aggregators.pooling import ABMIL, CLAM, DSMIL, Aggregator, Instances, MaxPool, MeanPool
from crcjax.models.aggregators.transmil import TransMIL
from crcjax.models.attention import REMAT
from crcjax.models.encoders.convnets import Batch, by_batch
from crcjax.models.encoders.registry import ImportedFeatures, PublishedEncoder, build_encoder
from crcjax.models.heads import HEADS, TaskHeads
from crcjax.models.random_keys import Purpose, run_key

# A nested dictionary of arrays, as optax and Orbax accept it; nnx.merge restores the model.
Params = dict[str, Any]
# BatchNorm batch statistics: the number of valid tiles, and that number times their mean and variance, by layer.
Statistics = tuple[Float32[Array, ""], Params]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def _flat(aggregator: Callable[..., Aggregator], **fixed: Any) -> Callable[..., Aggregator]:
    """An aggregator that does not distinguish regions and slots."""
    return lambda config, classes, factors, **others: aggregator(config, classes, **fixed, **others)


AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "hierarchical": HierarchicalAttentionMIL,
    "mean": _flat(MeanPool),
    "max": _flat(MaxPool),
    "abmil": _flat(ABMIL, gated=False),
    "gated_abmil": _flat(ABMIL, gated=True),
    "clam_sb": _flat(CLAM, multibranch=False),
    "clam_mb": _flat(CLAM, multibranch=True),
    "dsmil": _flat(DSMIL),
    "transmil": _flat(TransMIL),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prediction:
    """The model's output for each bag.

    Attention sums to one over a bag and is zero where the mask is False; `class_attention` has one map per branch of the
    aggregator (one branch, or one per class), and the other maps are their mean. `alpha` and `vacuity` (0 to 1) belong to
    the Dirichlet distribution of an evidential head, and are None with another head. `expected_entropy` (nats) is the
    aleatoric uncertainty: the mean entropy over the Dirichlet distribution, the ensemble members or the dropout samples, or
    that of softmax. `instance_loss` is the aggregator's, zero without labels.
    """

    logits: Float32[Array | np.ndarray, "batch class"]
    probs: Float32[Array | np.ndarray, "batch class"]
    embedding: Float32[Array | np.ndarray, "batch feature"]
    region_attention: Float32[Array | np.ndarray, "batch region"]
    slot_attention: Float32[Array | np.ndarray, "batch region slot"]
    class_attention: Float32[Array | np.ndarray, "batch region slot branch"]
    alpha: Float32[Array | np.ndarray, "batch class"] | None
    vacuity: Float32[Array | np.ndarray, " batch"] | None
    expected_entropy: Float32[Array | np.ndarray, " batch"]
    instance_loss: Float32[Array | np.ndarray, " batch"]


def combine(members: Sequence[Prediction]) -> Prediction:
    """The mean of predictions of the same bags by an ensemble's members or dropout's draws, on the host.

    Its logits are the logarithms of its probabilities. What the members disagree on is the entropy of the mean above
    the mean entropy: the mutual information of class and member (Lakshminarayanan et al. 2017, Depeweg et al. 2018).
    """
    if len(members) == 1:
        return members[0]
    mean = jax.tree.map(lambda *parts: np.mean(np.stack(parts), axis=0), *members)
    return replace(mean, logits=np.log(np.maximum(mean.probs, np.finfo(np.float32).tiny)))


class MILModel(nnx.Module):
    """Tile encoder, aggregator, head. `factors` are the tiles along a region's side, per magnification.

    `tasks` are the heads of auxiliary tasks that training may add; predictions do not depend on them.
    """

    tasks: TaskHeads

    def __init__(self, config: ConfigDict, classes: int, factors: tuple[int, ...], rngs: nnx.Rngs):
        for field, known in (("dtype", DTYPES), ("remat", REMAT), ("mil", AGGREGATORS), ("head", HEADS)):
            if config[field] not in known:
                raise InputError(f"config.model.{field} {config[field]!r}: choose one of {', '.join(known)}")
        if config.features % (4 * config.heads):
            raise InputError(f"config.model.features {config.features} is no multiple of 4 x {config.heads} heads")
        dtype = DTYPES[config.dtype]
        self.dropout = config.dropout
        self.encode_regions, self.remat = config.encode_regions, REMAT[config.remat]
        self.head = HEADS[config.head]
        self.encoder = build_encoder(config, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(config.features, rngs=rngs)
        self.slots = sum(factor**2 for factor in factors)
        self.aggregator = AGGREGATORS[config.mil](config, classes, factors, dtype=dtype, rngs=rngs)

    def encode_stored(self, features: Float[Array, "*instance stored"]) -> Float32[Array, "*instance feature"]:
        """`encode`, from the stored features of a published encoder."""
        lead = features.shape[:-1]
        assert isinstance(self.encoder, PublishedEncoder | ImportedFeatures)
        encoded = self.encoder.from_stored(features.reshape(-1, features.shape[-1]))
        return self.norm(encoded.astype(jnp.float32)).reshape(*lead, -1)

    def encode(self, pixels: Num[Array, "*instance y x 3"]) -> Float32[Array, "*instance feature"]:
        """Features of tiles, 8-bit intensities (0 to 255) of any numeric type."""
        lead = pixels.shape[:-3]
        features = self.encoder(pixels.reshape(-1, *pixels.shape[-3:]))  # type: ignore[operator]
        return self.norm(features.astype(jnp.float32)).reshape(*lead, -1)

    def pool(
        self,
        features: Float[Array, "batch region slot feature"],
        mask: Bool[Array, "batch region slot"],
        position: Float32[Array, "batch region 2"] | None = None,
        key: Key[Array, " batch"] | None = None,
        label: Int[Array, " batch"] | None = None,
    ) -> Prediction:
        """The prediction from a bag's features; with a key a bag, with dropout, and with labels, with the instance loss, as in training.

        `position` is each region's (x, y) in sides of a region; without it, all lie at one place.
        """
        batch, regions, slots, width = features.shape
        if slots != self.slots:
            raise ValueError(f"the model was built for {self.slots} slots a region, the bag has {slots}")
        instances = features.reshape(batch, regions * slots, width)
        if key is not None and self.dropout:
            # Sampled bag by bag, so that a bag drops the same values in a smaller batch or on another device.
            keep = jax.vmap(partial(jax.random.bernoulli, p=1 - self.dropout, shape=instances.shape[1:]))(key)
            instances = jnp.where(keep, instances / (1 - self.dropout), 0.0)
        if position is None:
            position = jnp.zeros((batch, regions, 2))
        bag = Instances(instances, mask.reshape(batch, -1), jnp.repeat(position, slots, axis=1))
        pooled = self.aggregator(bag, label)
        head = self.head(pooled.logits)
        by_class = pooled.attention.reshape(batch, regions, slots, -1)
        by_slot = by_class.mean(axis=-1)
        return Prediction(
            pooled.logits,
            head.probs,
            pooled.embedding,
            by_slot.sum(axis=-1),
            by_slot,
            by_class,
            head.alpha,
            head.vacuity,
            head.expected_entropy,
            pooled.instance_loss,
        )

    def encode_bag(
        self,
        pixels: Num[Array, "batch region slot y x 3"],
        prepare: Callable[[Array, Int[Array, ""] | int], Array] = lambda pixels, first: pixels,
    ) -> Float32[Array, "batch region slot feature"]:
        """Features of a bag's tiles, `config.encode_regions` regions at a time.

        `prepare(pixels, first)` receives the pixels of some regions and the index of the first, and returns the encoder's
        input. The backward pass recomputes the encoder (`config.remat` sets what it saves), so that only the features
        grow in memory with the bag.
        """
        regions = pixels.shape[1]
        size = min(self.encode_regions, regions)

        def encode_from(first: Int[Array, ""] | int) -> Float32[Array, "batch some slot feature"]:
            chunk = jax.lax.dynamic_slice_in_dim(pixels, first, size, axis=1)
            return self.encode(prepare(chunk, first))

        if size == regions:
            return encode_from(0)
        count = -(-regions // size)
        # The last block overlaps the one before if the size does not divide the regions.
        starts = jnp.minimum(jnp.arange(count) * size, regions - size)
        parts = jax.lax.map(self.remat(encode_from), starts)
        whole = jnp.moveaxis(parts[:-1], 0, 1).reshape(len(pixels), (count - 1) * size, *parts.shape[3:])
        return jnp.concatenate([whole, parts[-1][:, count * size - regions :]], axis=1)

    def encode_batch(
        self,
        pixels: Num[Array, "batch region slot y x 3"],
        mask: Bool[Array, "batch region slot"],
        parts: int,
        axes: tuple[str, ...] = (),
        prepare: Callable[[Array, Int[Array, ""] | int], Array] = lambda pixels, number: pixels,
    ) -> tuple[Float32[Array, "batch region slot feature"], Statistics]:
        """As `encode_bag`, in `parts` equal ones, with batch norms by the statistics of each part's valid tiles.

        A part is every `parts`-th region of all bags, of all devices along the mesh's `axes` that this is mapped over: so
        no layout changes what is in a part. `prepare` is given its pixels and its number. Statistics are those of all parts.
        """
        graph, params = nnx.graphdef(self), params_of(self)

        def encode_part(number: Int[Array, ""] | int) -> tuple[Array, Statistics]:
            # A copy, which then holds this part's batch statistics.
            model = nnx.merge(graph, params)
            chunk, valid = (every(value, number, parts, axis=1) for value in (pixels, mask))
            count = jax.lax.psum(valid.sum().astype(jnp.float32), axes)
            by_batch(model, Batch(valid.reshape(-1), count, axes))
            features = model.encode(prepare(chunk, number))
            batch_statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return features, (count, jax.tree.map(lambda value: count * value, batch_statistics))

        if parts == 1:
            return encode_part(0)
        by_part, statistics = jax.lax.map(self.remat(encode_part), jnp.arange(parts))
        features = jnp.moveaxis(by_part, 0, 2).reshape(*mask.shape, -1)
        return features, jax.tree.map(lambda value: value.sum(axis=0), statistics)

    def __call__(
        self,
        pixels: Num[Array, "batch region slot y x 3"],
        mask: Bool[Array, "batch region slot"],
        position: Float32[Array, "batch region 2"] | None = None,
    ) -> Prediction:
        """The prediction from a bag's pixels."""
        return self.pool(self.encode_bag(pixels), mask, position)


def build_model(config: ConfigDict, classes: int, seed: int, factors: tuple[int, ...] = (1,)) -> MILModel:
    """The model of `config` (config.model) with parameters sampled from `seed`, for bags of one tiling (`factors`).

    Raises InputError.
    """
    return MILModel(config, classes, factors, nnx.Rngs(run_key(seed, Purpose.INITIALISATION)))


def abstract_model(config: ConfigDict, classes: int, factors: tuple[int, ...] = (1,)) -> MILModel:
    """As `build_model`, with the shapes of the parameters in place of values, for parameters that are read from a file."""
    return nnx.eval_shape(lambda: build_model(config, classes, 0, factors))


def every(value: Array, number: Int[Array, ""] | int, parts: int, axis: int) -> Array:
    """Every `parts`-th element along an axis, from index `number` on; no element moves between devices that share the axis."""
    split = value.reshape(*value.shape[:axis], -1, parts, *value.shape[axis + 1 :])
    return jax.lax.dynamic_index_in_dim(split, number, axis=axis + 1, keepdims=False)


def params_of(model: MILModel) -> Params:
    """The model's parameters as plain nested dictionaries."""
    return nnx.to_pure_dict(nnx.state(model))
