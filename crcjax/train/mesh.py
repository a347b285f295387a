"""The devices as a mesh."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

AXES = ("data", "bag", "model")


def device_mesh() -> Mesh:
    """All devices along `data` (slides); `bag` (regions of a slide) and `model` (weights) are 1."""
    return jax.make_mesh((jax.device_count(), 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh() -> Mesh:
    """The devices of this process along `data`, for work that it does by itself."""
    sides = (jax.local_device_count(), 1, 1)
    return jax.make_mesh(sides, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.local_devices())


def on_local_mesh(values: PyTree[Array], mesh: Mesh, local: Mesh) -> PyTree[Array]:
    """Values of the whole mesh, copied whole to every device of this process; all processes call it together."""
    if jax.process_count() == 1:
        return values
    whole = jax.jit(lambda values: values, out_shardings=replicated(mesh))(values)

    def copied(leaf: Array) -> Array:
        copies = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(local), copies)

    return jax.tree.map(copied, whole)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))
