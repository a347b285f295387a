"""The training step and the forward passes, as pure functions of the model's split state, compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int, Key, Num
from ml_collections import ConfigDict

from crcjax.data.augment import augment, draw_augmentation
from crcjax.data.bags import Bag
from crcjax.data.mining import Mining, after_step
from crcjax.models.mil import MILModel, Params, Prediction, params_of
from crcjax.slides.normaliser import StainNormaliser
from crcjax.slides.stain import Estimate
from crcjax.train.losses import bag_losses, supervised_contrastive, weighted_mean
from crcjax.train.mesh import over_data, replicated


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds: everything that the next step depends on, besides the config; `mining`, if it mines."""

    step: Int[Array, ""]
    params: Params
    moments: optax.OptState
    mining: Mining | None = None


Metrics = dict[str, Float32[Array, ""]]


def init_state(
    model: MILModel, optimizer: optax.GradientTransformation, mesh: Mesh, mining: Mining | None = None
) -> TrainState:
    """The state before the first step, on every device."""
    params = params_of(model)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), mining)
    # Copied: the step donates its state, and the model keeps its own arrays.
    return jax.tree.map(lambda value: jax.device_put(jnp.array(value), replicated(mesh)), state)


def build_step(
    model: MILModel,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh,
    normaliser: StainNormaliser | None = None,
) -> Callable[[TrainState, Bag], tuple[TrainState, Metrics]]:
    """The jitted step: state and bags to the next state and metrics. The state is donated."""
    graph = nnx.graphdef(model)
    seed = jax.random.key(config.seed)

    @partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(replicated(mesh), over_data(mesh)),
        out_shardings=(replicated(mesh), replicated(mesh)),
    )
    def step(state: TrainState, bag: Bag) -> tuple[TrainState, Metrics]:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(seed, state.step))
        label, weight = jnp.asarray(bag.label), jnp.asarray(bag.weight)
        batch, regions, slots = bag.mask.shape
        # Normalised tiles no longer have the stain that was estimated.
        drawn = draw_augmentation(
            augment_key, (batch, regions, slots), config.augment, None if normaliser else bag.stain
        )

        def prepare(pixels: Array, first: Int[Array, ""] | int) -> Array:
            if normaliser and bag.stain is not None:
                pixels = normaliser.batch(pixels, bag.stain)
            return augment(pixels, drawn, first)

        def loss_of(params: Params) -> tuple[Array, tuple[Prediction, Array]]:
            model = nnx.merge(graph, params)
            rest = (bag.mask, bag.position, dropout_key, label)
            if config.data.features:
                prediction = model.pool(model.encode_stored(jnp.asarray(bag.tiles)), *rest)
            else:
                prediction = model(bag.tiles, *rest, prepare)
            losses = bag_losses(prediction, label, state.step, config.train)
            loss = weighted_mean(losses, weight)
            if config.train.contrastive_weight:
                embedding, temperature = jnp.asarray(prediction.embedding), config.train.contrastive_temperature
                loss += config.train.contrastive_weight * supervised_contrastive(embedding, label, temperature)
            return loss, (prediction, losses)

        (loss, (prediction, losses)), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, moments = optimizer.update(gradient, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        right = prediction.logits.argmax(axis=-1) == label
        metrics = {"loss": loss, "accuracy": right.mean(), "gradient_norm": optax.tree.norm(gradient)}
        mining = state.mining
        if mining is not None:
            seen = jnp.asarray(bag.slide), jnp.asarray(bag.region), losses, ~right
            attention = jnp.asarray(prediction.region_attention)
            mining = after_step(mining, state.step + 1, config.data.mine_every, *seen, attention)
        return TrainState(state.step + 1, params, moments, mining), metrics

    return step


class Forward:
    """A whole bag of any length through the model: regions encoded in chunks, features pooled in padded buckets.

    Training's evaluation and prediction both use it. XLA compiles one program for the chunks and one a bucket.
    """

    def __init__(
        self,
        model: MILModel,
        buckets: tuple[int, ...],
        chunk: int,
        mesh: Mesh,
        normaliser: StainNormaliser | None = None,
        stored: bool = False,
    ):
        graph = nnx.graphdef(model)
        devices = mesh.shape["data"]
        self.chunk = -(-chunk // devices) * devices
        self._buckets = sorted(buckets)
        self.normaliser, self.stored = normaliser, stored
        self._over_data = over_data(mesh)

        def encode(params: Params, tiles: Array, stain: Estimate | None) -> Array:
            model = nnx.merge(graph, params)
            if stored:
                return model.encode_stored(tiles)
            return model.encode(normaliser(tiles, stain) if normaliser and stain is not None else tiles)

        self._encode = jax.jit(
            encode,
            in_shardings=(replicated(mesh), over_data(mesh), replicated(mesh)),
            out_shardings=replicated(mesh),
        )
        self._pool = jax.jit(lambda params, *bag: nnx.merge(graph, params).pool(*bag))

    def encode(
        self, params: Params, tiles: Num[np.ndarray, "region slot *tile"], stain: Estimate | None = None
    ) -> Array:
        """Features of at most `chunk` regions, padded to `chunk`; not waited for. `stain` is for the normaliser.

        `tiles` are pixels, or with `stored`, what a published encoder gave for them.
        """
        padding = [(0, self.chunk - len(tiles)), *[(0, 0)] * (tiles.ndim - 1)]
        return self._encode(params, jax.device_put(np.pad(tiles, padding), self._over_data), stain)

    def pool(
        self,
        params: Params,
        features: Float32[np.ndarray, "region slot feature"],
        mask: Bool[np.ndarray, "region slot"],
        position: Float32[np.ndarray, "region 2"],
        key: Key[Array, ""] | None = None,
    ) -> Prediction:
        """The prediction for one bag, as arrays of the host without its padding; with a key, with dropout."""
        regions = len(mask)
        result = jax.device_get(self._pool(params, *self.padded(features, mask, position), key))
        return replace(
            result,
            region_attention=result.region_attention[:, :regions],
            slot_attention=result.slot_attention[:, :regions],
            class_attention=result.class_attention[:, :regions],
        )

    def padded(
        self,
        features: Float32[np.ndarray, "region slot feature"],
        mask: Bool[np.ndarray, "region slot"],
        position: Float32[np.ndarray, "region 2"],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A batch of one bag, with regions added up to a bucket's."""
        largest = self._buckets[-1]
        # Bags above the largest bucket are padded to its multiples.
        size = next((size for size in self._buckets if size >= len(mask)), -(-len(mask) // largest) * largest)
        padding = ((0, size - len(mask)), (0, 0))
        whole = (np.pad(features, (*padding, (0, 0))), np.pad(mask, padding), np.pad(position, padding))
        return whole[0][None], whole[1][None], whole[2][None]

    def bag(
        self,
        params: Params,
        chunks: Iterable[Num[np.ndarray, "region slot *tile"]],
        mask: Bool[np.ndarray, "region slot"],
        position: Float32[np.ndarray, "region 2"],
        stain: Estimate | None = None,
    ) -> Prediction:
        """The prediction for one bag from its regions, `chunk` at a time."""
        features = [np.asarray(self.encode(params, tiles, stain))[: len(tiles)] for tiles in chunks]
        return self.pool(params, np.concatenate(features), mask, position)
