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
from jaxtyping import Array, Bool, Float32, Int, UInt8
from ml_collections import ConfigDict

from crcjax.data.augment import augment, draw_augmentation
from crcjax.data.bags import Bag
from crcjax.models.mil import MILModel, Params, Prediction, params_of
from crcjax.train.losses import bag_losses, weighted_mean
from crcjax.train.mesh import over_data, replicated


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds: everything that the next step depends on, besides the config."""

    step: Int[Array, ""]
    params: Params
    moments: optax.OptState


Metrics = dict[str, Float32[Array, ""]]


def init_state(model: MILModel, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, on every device."""
    params = params_of(model)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    # Copied: the step donates its state, and the model keeps its own arrays.
    return jax.tree.map(lambda value: jax.device_put(jnp.array(value), replicated(mesh)), state)


def build_step(
    model: MILModel, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
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
        drawn = draw_augmentation(augment_key, (batch, regions, slots), config.augment)

        def loss_of(params: Params) -> tuple[Array, Prediction]:
            prediction = nnx.merge(graph, params)(
                bag.pixels,
                bag.mask,
                bag.position,
                dropout_key,
                label,
                lambda pixels, first: augment(pixels, drawn, first),
            )
            return weighted_mean(bag_losses(prediction, label, state.step, config.train), weight), prediction

        (loss, prediction), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, moments = optimizer.update(gradient, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        right = prediction.logits.argmax(axis=-1) == label
        metrics = {"loss": loss, "accuracy": right.mean(), "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, moments), metrics

    return step


class Forward:
    """A whole bag of any length through the model: regions encoded in chunks, features pooled in padded buckets.

    Training's evaluation and prediction both use it. XLA compiles one program for the chunks and one a bucket.
    """

    def __init__(self, model: MILModel, buckets: tuple[int, ...], chunk: int, mesh: Mesh):
        graph = nnx.graphdef(model)
        devices = mesh.shape["data"]
        self.chunk = -(-chunk // devices) * devices
        self._buckets = sorted(buckets)
        self._encode = jax.jit(
            lambda params, pixels: nnx.merge(graph, params).encode(pixels),
            in_shardings=(replicated(mesh), over_data(mesh)),
            out_shardings=replicated(mesh),
        )
        self._pool = jax.jit(
            lambda params, features, mask, position: nnx.merge(graph, params).pool(features, mask, position)
        )

    def encode(self, params: Params, pixels: UInt8[np.ndarray, "region slot y x 3"]) -> Array:
        """Features of at most `chunk` regions, padded to `chunk`; not waited for."""
        padding = [(0, self.chunk - len(pixels)), *[(0, 0)] * (pixels.ndim - 1)]
        return self._encode(params, np.pad(pixels, padding))

    def pool(
        self,
        params: Params,
        features: Float32[np.ndarray, "region slot feature"],
        mask: Bool[np.ndarray, "region slot"],
        position: Float32[np.ndarray, "region 2"],
    ) -> Prediction:
        """The prediction for one bag, as arrays of the host without its padding."""
        regions = len(mask)
        largest = self._buckets[-1]
        # Bags above the largest bucket are padded to its multiples.
        padded = next((size for size in self._buckets if size >= regions), -(-regions // largest) * largest)
        padding = ((0, padded - regions), (0, 0))
        padded_bag = (np.pad(features, (*padding, (0, 0))), np.pad(mask, padding), np.pad(position, padding))
        result = jax.device_get(self._pool(params, *(part[None] for part in padded_bag)))
        return replace(
            result,
            region_attention=result.region_attention[:, :regions],
            slot_attention=result.slot_attention[:, :regions],
            class_attention=result.class_attention[:, :regions],
        )

    def bag(
        self,
        params: Params,
        chunks: Iterable[UInt8[np.ndarray, "region slot y x 3"]],
        mask: Bool[np.ndarray, "region slot"],
        position: Float32[np.ndarray, "region 2"],
    ) -> Prediction:
        """The prediction for one bag from its regions, `chunk` at a time."""
        features = [np.asarray(self.encode(params, pixels))[: len(pixels)] for pixels in chunks]
        return self.pool(params, np.concatenate(features), mask, position)
