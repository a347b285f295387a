"""The MIL model, which predicts the class of a bag of tiles: tile encoder, aggregator and head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Key, Num
from ml_collections import ConfigDict

from crcjax.errors import InputError
from crcjax.models.aggregators.pooling import Instances
from crcjax.models.aggregators.registry import build_aggregator
from crcjax.models.attention import REMAT
from crcjax.models.encoders.convnets import Batch, use_batch_statistics
from crcjax.models.encoders.registry import StoredEncoder, build_encoder
from crcjax.models.feature_scaling import drop_columns
from crcjax.models.heads import HEADS, TaskHeads
from crcjax.models.prediction import Prediction
from crcjax.models.random_keys import Purpose, run_key

# A nested dictionary of arrays, as optax and Orbax accept it; nnx.merge restores the model.
Params = dict[str, Any]
# BatchNorm batch statistics: the number of valid tiles, and by layer the mean and variance times that number.
Statistics = tuple[Float32[Array, ""], Params]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


# Jitted functions return predictions.
jax.tree_util.register_dataclass(Prediction)


class MILModel(nnx.Module):
    """Tile encoder, aggregator and head.

    Args:
      config: config.model.
      classes: the number of classes.
      factors: the number of tiles along a region's side at each magnification.
      rngs: the random keys of the initialisation.

    Attributes:
      tasks: heads of auxiliary tasks, which training may add; predictions do not depend on them.

    Raises:
      InputError: a field of config.model has an impossible value.
    """

    tasks: TaskHeads

    def __init__(self, config: ConfigDict, classes: int, factors: tuple[int, ...], rngs: nnx.Rngs):
        for field, choices in (("dtype", DTYPES), ("remat", REMAT), ("head", HEADS)):
            if config[field] not in choices:
                raise InputError(f"config.model.{field} {config[field]!r}: choose one of {', '.join(choices)}")
        if config.features % (4 * config.heads):
            raise InputError(f"config.model.features {config.features} is no multiple of 4 x {config.heads} heads")
        dtype = DTYPES[config.dtype]
        self.dropout, self.feature_dropout = config.dropout, config.feature_dropout
        self.encode_regions, self.remat = config.encode_regions, REMAT[config.remat]
        self.head = HEADS[config.head]
        self.encoder = build_encoder(config, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(config.features, rngs=rngs)
        self.slots = sum(factor**2 for factor in factors)
        self.aggregator = build_aggregator(config, classes, factors, dtype=dtype, rngs=rngs)

    def encode_stored(
        self, features: Float[Array, "*instance stored"], key: Key[Array, " batch"] | None = None
    ) -> Float32[Array, "*instance feature"]:
        """As `encode`, from stored features. With one key per bag, the first axis is that of bags, and dropout is active."""
        leading_axes = features.shape[:-1]
        assert isinstance(self.encoder, StoredEncoder)
        if self.encoder.standardiser:
            features = self.encoder.standardiser(features)
        if key is not None and self.feature_dropout:
            features = drop_columns(features, self.feature_dropout, key)
        encoded = self.encoder.project(features.reshape(-1, features.shape[-1]))
        return self.norm(encoded.astype(jnp.float32)).reshape(*leading_axes, -1)

    def encode(self, pixels: Num[Array, "*instance y x 3"]) -> Float32[Array, "*instance feature"]:
        """Encodes tiles of 8-bit intensities (0 to 255) of any numeric type."""
        leading_axes = pixels.shape[:-3]
        features = self.encoder(pixels.reshape(-1, *pixels.shape[-3:]))  # type: ignore[operator]
        return self.norm(features.astype(jnp.float32)).reshape(*leading_axes, -1)

    def pool(
        self,
        features: Float[Array, "batch region slot feature"],
        mask: Bool[Array, "batch region slot"],
        position: Float32[Array, "batch region 2"] | None = None,
        key: Key[Array, " batch"] | None = None,
        label: Int[Array, " batch"] | None = None,
    ) -> Prediction:
        """Predicts bags from the features of their instances.

        Args:
          features: the features.
          mask: the valid instances.
          position: (x, y) of each region in sides of a region; without it, all regions have the same position.
          key: one key per bag, which activates dropout.
          label: the class of each bag, which activates the aggregator's instance loss.
        """
        batch, regions, slots, width = features.shape
        if slots != self.slots:
            raise ValueError(f"bags must have {self.slots} slots per region, as the model was built for, got {slots}")
        instances = features.reshape(batch, regions * slots, width)
        if key is not None and self.dropout:
            # Dropout is sampled bag by bag, so that a bag drops the same values in a smaller batch or on another device.
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
        """Encodes the tiles of bags in chunks of `config.encode_regions` regions.

        The backward pass recomputes the encoder; `config.remat` decides what it saves. Only the memory of the features
        grows with the bag.

        Args:
          pixels: the tiles.
          prepare: maps the pixels of a chunk and the index of its first region to the encoder's input.
        """
        regions = pixels.shape[1]
        size = min(self.encode_regions, regions)

        def encode_chunk(first: Int[Array, ""] | int) -> Float32[Array, "batch chunk_region slot feature"]:
            chunk = jax.lax.dynamic_slice_in_dim(pixels, first, size, axis=1)
            return self.encode(prepare(chunk, first))

        if size == regions:
            return encode_chunk(0)
        count = -(-regions // size)
        # If the size does not divide the number of regions, the last chunk overlaps the previous one.
        starts = jnp.minimum(jnp.arange(count) * size, regions - size)
        chunks = jax.lax.map(self.remat(encode_chunk), starts)
        all_but_last = jnp.moveaxis(chunks[:-1], 0, 1).reshape(len(pixels), (count - 1) * size, *chunks.shape[3:])
        return jnp.concatenate([all_but_last, chunks[-1][:, count * size - regions :]], axis=1)

    def encode_batch(
        self,
        pixels: Num[Array, "batch region slot y x 3"],
        mask: Bool[Array, "batch region slot"],
        chunks: int,
        axes: tuple[str, ...] = (),
        prepare: Callable[[Array, Int[Array, ""] | int], Array] = lambda pixels, index: pixels,
    ) -> tuple[Float32[Array, "batch region slot feature"], Statistics]:
        """Encodes the tiles of bags in equal chunks of regions; BatchNorm uses the statistics of each chunk's valid tiles.

        Chunk i holds every `chunks`-th region of all bags from region i on, of all devices, so that its content does not
        depend on how the bags are divided among devices.

        Args:
          pixels: the tiles.
          mask: the valid tiles.
          chunks: the number of chunks.
          axes: the mesh axes over which this function is mapped, and over which statistics are summed.
          prepare: maps the pixels and the index of a chunk to the encoder's input.

        Returns:
          The features, and the BatchNorm statistics of all chunks.
        """
        graph, params = nnx.graphdef(self), params_of(self)

        def encode_chunk(index: Int[Array, ""] | int) -> tuple[Array, Statistics]:
            # A copy of the model, which receives the batch statistics of this chunk.
            model = nnx.merge(graph, params)
            chunk, valid = (every(value, index, chunks, axis=1) for value in (pixels, mask))
            count = jax.lax.psum(valid.sum().astype(jnp.float32), axes)
            use_batch_statistics(model, Batch(valid.reshape(-1), count, axes))
            features = model.encode(prepare(chunk, index))
            batch_statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return features, (count, jax.tree.map(lambda value: count * value, batch_statistics))

        if chunks == 1:
            return encode_chunk(0)
        by_chunk, statistics = jax.lax.map(self.remat(encode_chunk), jnp.arange(chunks))
        features = jnp.moveaxis(by_chunk, 0, 2).reshape(*mask.shape, -1)
        return features, jax.tree.map(lambda value: value.sum(axis=0), statistics)

    def __call__(
        self,
        pixels: Num[Array, "batch region slot y x 3"],
        mask: Bool[Array, "batch region slot"],
        position: Float32[Array, "batch region 2"] | None = None,
    ) -> Prediction:
        """Predicts bags from the pixels of their tiles; `position` as in `pool`."""
        return self.pool(self.encode_bag(pixels), mask, position)


def build_model(config: ConfigDict, classes: int, seed: int, factors: tuple[int, ...] = (1,)) -> MILModel:
    """Builds the model with parameters sampled from `seed` (config.seed); other arguments and errors as for `MILModel`."""
    return MILModel(config, classes, factors, nnx.Rngs(run_key(seed, Purpose.INITIALISATION)))


def abstract_model(config: ConfigDict, classes: int, factors: tuple[int, ...] = (1,)) -> MILModel:
    """As `build_model`, with shapes in place of parameter values, which a checkpoint then provides."""
    return nnx.eval_shape(lambda: build_model(config, classes, 0, factors))


def every(value: Array, start: Int[Array, ""] | int, step: int, axis: int) -> Array:
    """Every `step`-th element along an axis from index `start` on; no element moves between devices that share the axis."""
    split = value.reshape(*value.shape[:axis], -1, step, *value.shape[axis + 1 :])
    return jax.lax.dynamic_index_in_dim(split, start, axis=axis + 1, keepdims=False)


def params_of(model: MILModel) -> Params:
    """The model's parameters as plain nested dictionaries."""
    return nnx.to_pure_dict(nnx.state(model))
