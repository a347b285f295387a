"""The encoder in the training step: from bags to features of augmented tiles, and the BatchNorm running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float32, Int, Key, Num
from ml_collections import ConfigDict

from crcjax.data.augment import Augmentation, augment
from crcjax.data.bags import Bag
from crcjax.errors import InputError
from crcjax.models.mil import MILModel, Params, Statistics, every
from crcjax.slides.stain.methods import StainEstimate
from crcjax.slides.stain.normalisation import StainNormaliser

Encode = Callable[
    [Params, Bag, Augmentation, Key[Array, " batch"]],
    tuple[Float32[Array, "batch region slot feature"], Statistics | None],
]


def build_encode(graph: nnx.GraphDef, config: ConfigDict, mesh: Mesh, normaliser: StainNormaliser | None) -> Encode:
    """Returns a function that augments and encodes bags on all devices, with one key per bag for dropout.

    With config.model.batch_norm_momentum the function also returns the BatchNorm batch statistics.

    Args:
      graph: the model's graph.
      config: the whole config.
      mesh: the devices.
      normaliser: normalises stains before tiles are augmented.
    """
    devices_per_bag, uses_batch_statistics = mesh.shape["bag"], bool(config.model.batch_norm_momentum)
    axes = ("data", "bag") if mesh.shape["data"] * devices_per_bag > 1 else ()

    def encode(
        params: Params,
        tiles: Array,
        mask: Array,
        stain: StainEstimate | None,
        augmentation: Augmentation,
        key: Key[Array, " batch"],
    ) -> tuple[Float32[Array, "batch region slot feature"], Statistics | None]:
        model = nnx.merge(graph, params)
        if config.data.features:
            return model.encode_stored(tiles, key), None
        if not uses_batch_statistics:
            return encode_augmented(model, tiles, stain, augmentation, normaliser), None
        chunks = _chunk_count(config.model.encode_regions, tiles.shape[1], devices_per_bag)

        def prepare(pixels: Array, number: Int[Array, ""] | int) -> Array:
            chunk_augmentation = jax.tree.map(
                lambda parameter: parameter if parameter.shape[1] == 1 else every(parameter, number, chunks, axis=1),
                augmentation,
            )
            return augment(_normalise(pixels, stain, normaliser), chunk_augmentation)

        return model.encode_batch(tiles, mask, chunks, axes, prepare)

    # The encoder merges bags and regions into one axis of tiles. XLA's partitioner can do that only by gathering the pixels
    # of a bag on one device, if both axes are divided. With shard_map, each device encodes its own regions, and the
    # encoder's gradient is summed over devices once per step in float32, not once per chunk in the type of the
    # computation. Batch norms then see one device's tiles and sum their statistics over the mesh axes themselves.
    def encode_on_mesh(
        params: Params, bag: Bag, augmentation: Augmentation, key: Key[Array, " batch"]
    ) -> tuple[Float32[Array, "batch region slot feature"], Statistics | None]:
        # shard_map refuses a mesh of one device.
        if not axes:
            return encode(params, jnp.asarray(bag.tiles), jnp.asarray(bag.mask), bag.stain, augmentation, key)
        by_bag, by_region = PartitionSpec("data"), PartitionSpec("data", "bag")
        parameters, tree = jax.tree.flatten(augmentation)
        # A parameter that a slide's tiles share has one region, which cannot be divided.
        parameter_specs = [by_bag if parameter.shape[1] == 1 else by_region for parameter in parameters]
        return jax.shard_map(
            lambda params, tiles, mask, stain, parameters, key: encode(
                params, tiles, mask, stain, jax.tree.unflatten(tree, parameters), key
            ),
            mesh=mesh,
            axis_names={"data", "bag"},
            in_specs=(PartitionSpec(), by_region, by_region, by_bag, parameter_specs, by_bag),
            out_specs=(by_region, PartitionSpec()),
            check_vma=False,
        )(params, jnp.asarray(bag.tiles), jnp.asarray(bag.mask), bag.stain, parameters, key)

    return encode_on_mesh


def encode_augmented(
    model: MILModel,
    pixels: Num[Array, "batch region slot y x 3"],
    stain: StainEstimate | None,
    augmentation: Augmentation,
    normaliser: StainNormaliser | None,
) -> Float32[Array, "batch region slot feature"]:
    """The features of bags whose tiles are first normalised in stain, then augmented."""

    def prepare(pixels: Array, first_region: Int[Array, ""] | int) -> Array:
        return augment(_normalise(pixels, stain, normaliser), augmentation, first_region)

    return model.encode_bag(pixels, prepare)


def update_running_statistics(params: Params, batch_statistics: Statistics | None, momentum: float) -> Params:
    """Moves the BatchNorm running statistics in `params` towards a step's batch statistics.

    Args:
      params: the parameters, which include the running statistics.
      batch_statistics: those of the step; None, or statistics of no valid tile, change nothing.
      momentum: config.model.batch_norm_momentum, the weight of the batch statistics.
    """
    if batch_statistics is None:
        return params
    tile_count, sums = batch_statistics

    def update(running: Any, batch_sum: Any) -> Any:
        if isinstance(running, dict):
            return {
                name: update(value, batch_sum[name]) if name in batch_sum else value for name, value in running.items()
            }
        batch_mean = batch_sum / jnp.maximum(tile_count, 1.0)
        return running + jnp.where(tile_count > 0, momentum, 0.0) * (batch_mean - running)

    return update(params, sums)


def _chunk_count(encode_regions: int, device_regions: int, devices: int) -> int:
    """The number of chunks that a bag is encoded in, the same for any mesh; the batch statistics of each are its own.

    `device_regions` are the regions of a bag on each of `devices`.
    """
    regions = device_regions * devices
    chunks = -(-regions // encode_regions)
    if device_regions % chunks:
        raise InputError(
            "config.model.encode_regions must divide config.data.regions_per_bag and be a multiple of the devices along bag with "
            f"config.model.batch_norm_momentum, got {encode_regions}, which does not divide {regions} regions on {devices} "
            f"devices into equal chunks; try {regions}"
        )
    return chunks


def _normalise(pixels: Array, stain: StainEstimate | None, normaliser: StainNormaliser | None) -> Array:
    return normaliser.batch(pixels, stain) if normaliser and stain is not None else pixels
