"""The encoder within the step: augmented bags to features on every device, and batch norms' running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float32, Int, Num
from ml_collections import ConfigDict

from crcjax.data.augment import Augmentation, augment
from crcjax.data.bags import Bag
from crcjax.errors import InputError
from crcjax.models.mil import MILModel, Params, Statistics, every
from crcjax.slides.stain.methods import StainEstimate
from crcjax.slides.stain.normalisation import StainNormaliser

Encode = Callable[[Params, Bag, Augmentation], tuple[Float32[Array, "batch region slot feature"], Statistics | None]]


def build_encode(graph: nnx.GraphDef, config: ConfigDict, mesh: Mesh, normaliser: StainNormaliser | None) -> Encode:
    """Returns a function from augmented bags to features and, with config.model.batch_norm_momentum, BatchNorm statistics."""
    devices, by_batch = mesh.shape["bag"], bool(config.model.batch_norm_momentum)
    axes = ("data", "bag") if mesh.shape["data"] * devices > 1 else ()

    def encode(
        params: Params, tiles: Array, mask: Array, stain: StainEstimate | None, augmentation: Augmentation
    ) -> tuple[Float32[Array, "batch region slot feature"], Statistics | None]:
        model = nnx.merge(graph, params)
        if config.data.features:
            return model.encode_stored(tiles), None
        if not by_batch:
            return encode_drawn(model, tiles, stain, augmentation, normaliser), None
        parts = _encoded_parts(config.model.encode_regions, tiles.shape[1], devices)

        def prepare(pixels: Array, number: Int[Array, ""] | int) -> Array:
            own = jax.tree.map(
                lambda part: part if part.shape[1] == 1 else every(part, number, parts, axis=1), augmentation
            )
            return augment(_normalised(pixels, stain, normaliser), own)

        return model.encode_batch(tiles, mask, parts, axes, prepare)

    # The encoder merges bags and regions into one axis of tiles, which the partitioner, where both are divided, can only
    # do by bringing the pixels of a bag together. Mapped by hand, each device encodes what it holds; and the encoder's
    # gradient is summed over devices once a step, in float32, not once a part in the type of the computation. Batch norms
    # then see a device's tiles alone, and sum over the axes by themselves.
    def mapped(
        params: Params, bag: Bag, augmentation: Augmentation
    ) -> tuple[Float32[Array, "batch region slot feature"], Statistics | None]:
        if not axes:  # nothing to map over, which the partitioner cannot do
            return encode(params, jnp.asarray(bag.tiles), jnp.asarray(bag.mask), bag.stain, augmentation)
        by_bag, by_region = PartitionSpec("data"), PartitionSpec("data", "bag")
        leaves, tree = jax.tree.flatten(augmentation)
        by_draw = [
            by_bag if draw.shape[1] == 1 else by_region for draw in leaves
        ]  # drawn for a slide, or for its tiles
        return jax.shard_map(
            lambda params, tiles, mask, stain, leaves: encode(
                params, tiles, mask, stain, jax.tree.unflatten(tree, leaves)
            ),
            mesh=mesh,
            axis_names={"data", "bag"},
            in_specs=(PartitionSpec(), by_region, by_region, by_bag, by_draw),
            out_specs=(by_region, PartitionSpec()),
            check_vma=False,
        )(params, jnp.asarray(bag.tiles), jnp.asarray(bag.mask), bag.stain, leaves)

    return mapped


def encode_drawn(
    model: MILModel,
    pixels: Num[Array, "batch region slot y x 3"],
    stain: StainEstimate | None,
    augmentation: Augmentation,
    normaliser: StainNormaliser | None,
) -> Float32[Array, "batch region slot feature"]:
    """The features of augmented bags, whose stains are normalised first."""

    def prepare(pixels: Array, first: Int[Array, ""] | int) -> Array:
        return augment(_normalised(pixels, stain, normaliser), augmentation, first)

    return model.encode_bag(pixels, prepare)


def with_running(params: Params, statistics: Statistics | None, share: float) -> Params:
    """The parameters, batch norms' running statistics with a share of the step's; none of a step without a valid tile."""
    if statistics is None:
        return params
    count, sums = statistics

    def mixed(running: Any, batch: Any) -> Any:
        if isinstance(running, dict):
            return {name: mixed(value, batch[name]) if name in batch else value for name, value in running.items()}
        return running + jnp.where(count > 0, share, 0.0) * (batch / jnp.maximum(count, 1.0) - running)

    return mixed(params, sums)


def _encoded_parts(encode_regions: int, regions: int, devices: int) -> int:
    """The parts a bag is encoded in for batch norms, the same for any layout; `regions` are those of each of `devices`."""
    parts = -(-regions * devices // encode_regions)
    if regions % parts:
        raise InputError(
            f"config.model.batch_norm_momentum: {regions * devices} regions (config.data.regions_per_bag) on {devices} devices along bag do not make "
            f"{parts} equal parts of at most config.model.encode_regions {encode_regions}, of which each device has the same share; make "
            "config.model.encode_regions a divisor of the regions and a multiple of the devices"
        )
    return parts


def _normalised(pixels: Array, stain: StainEstimate | None, normaliser: StainNormaliser | None) -> Array:
    return normaliser.batch(pixels, stain) if normaliser and stain is not None else pixels
