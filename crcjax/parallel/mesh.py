"""The devices as a mesh: `data` (slides), `bag` (regions of a slide), `model` (weights)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import gcd
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from crcjax.errors import InputError

AXES = ("data", "bag", "model")


def device_mesh(config: ConfigDict | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (by default all) along the axes of `config`, the whole config; without one, all along `data`.

    Sizes of 0 are chosen: `data` is the largest that divides the bags of a step, and `bag` has the remaining devices.
    Devices of one process are neighbours along `model`, then along `bag`, whose traffic comes in every layer; along `data`
    it crosses hosts once a step. Raises InputError for sizes that do not divide the devices, the bags or the regions.
    """
    devices = jax.devices() if devices is None else devices
    shape = (len(devices), 1, 1) if config is None else _shape(config, len(devices))
    return Mesh(_arranged(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh() -> Mesh:
    """This process's own devices, all along `data`: for work that processes divide among themselves."""
    return device_mesh(devices=jax.local_devices())


def described(mesh: Mesh) -> str:
    """A description of the mesh for the log."""
    return _described(mesh.devices)


def on_local_mesh(values: PyTree[Array], mesh: Mesh, local: Mesh) -> PyTree[Array]:
    """Values of the whole mesh, copied whole to every device of this process; all processes call it together."""
    replicated_values = _replicate(mesh)(values)

    def copied(leaf: Array) -> Array:
        copies = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(local), copies)

    return jax.tree.map(copied, replicated_values)


@lru_cache(maxsize=8)
def _replicate(mesh: Mesh) -> Callable[[PyTree[Array]], PyTree[Array]]:
    """One jitted function a mesh: a new one would be compiled at every call."""
    return jax.jit(lambda values: values, out_shardings=replicated(mesh))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def _shape(config: ConfigDict, count: int) -> tuple[int, int, int]:
    sizes, data = config.mesh, config.data
    if min(sizes.data, sizes.bag, sizes.model) < 0 or not sizes.model:
        raise InputError(f"config.mesh {_sizes_text(sizes)}: sizes are at least 1, or 0 for data and bag to be chosen")
    rest = count // sizes.model
    bags = data.batch_size // config.train.micro_batches
    along_data = sizes.data or (rest // sizes.bag if sizes.bag else gcd(rest, bags))
    along_bag = sizes.bag or rest // along_data
    if not (sizes.data or sizes.bag) and along_data * along_bag == rest and data.regions_per_bag % along_bag:
        raise InputError(
            f"{rest} devices share neither config.data.batch_size {data.batch_size} nor each bag's config.data.regions_per_bag {data.regions_per_bag}: make "
            f"bags a multiple of {rest * config.train.micro_batches}, or regions one of {along_bag}"
        )
    if along_data * along_bag * sizes.model != count:
        raise InputError(
            f"config.mesh {_sizes_text(sizes)}: does not make {count} devices; set sizes whose product is that"
        )
    if data.batch_size % (along_data * config.train.micro_batches):
        raise InputError(
            f"config.data.batch_size {data.batch_size} is no multiple of {along_data} devices along data x config.train.micro_batches "
            f"{config.train.micro_batches}; change one"
        )
    if data.regions_per_bag % along_bag:
        raise InputError(
            f"config.data.regions_per_bag {data.regions_per_bag} is no multiple of {along_bag} devices along bag; change config.mesh.bag"
        )
    return along_data, along_bag, sizes.model


def _arranged(devices: Sequence[Any], shape: tuple[int, int, int]) -> np.ndarray:
    # jax.make_mesh orders devices differently on each platform; this order decides which traffic crosses hosts.
    return np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)


def _described(devices: np.ndarray) -> str:
    contents = ("the slides", "each slide's regions", "each layer's weights")
    axes = ", ".join(
        f"{size} x {axis} ({content})" for size, axis, content in zip(devices.shape, AXES, contents, strict=True)
    )
    processes = len({device.process_index for device in devices.flat})
    description = f"{devices.size} {devices.flat[0].platform} devices of {processes} processes as {axes}"
    if any(len({device.process_index for device in row.flat}) > 1 for row in devices):
        description += "; bag x model exceeds the devices of a process, so that every layer waits for the network"
    return description


def _sizes_text(sizes: ConfigDict) -> str:
    return ", ".join(f"{axis} {sizes[axis]}" for axis in AXES)
