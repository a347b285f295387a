"""Comparison of replicas: copies of values, or of their shards, that several devices hold must be equal bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32


def local_checksums(values: PyTree[Array]) -> list[dict[str, int]]:
    """For every device of this process, the checksum of each shard that it holds, by the leaf's name and the shard's bounds.

    The checksum is the sum of a shard's elements, their bits read as unsigned integers, modulo 2^32: any single changed
    bit changes it.
    """
    shards_by_device: dict[jax.Device, dict[str, Array]] = {device: {} for device in jax.local_devices()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(values):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for shard in leaf.addressable_shards:
            shards_by_device[shard.device][name + _bounds(shard.index, leaf.shape)] = shard.data
    checksums = [jax.device_get(_checksums(list(shards.values()))) for shards in shards_by_device.values()]
    return [
        dict(zip(shards, map(int, sums), strict=True))
        for shards, sums in zip(shards_by_device.values(), checksums, strict=True)
    ]


def first_difference(checksums: Mapping[int, Sequence[Mapping[str, int]]]) -> tuple[int, str] | None:
    """The process whose copy differs from the majority (from the first copy, if there is none), and the leaf's name.

    None if all copies of each shard are equal. A shard that only one device holds cannot be compared. `checksums` are the
    `local_checksums` of every process.
    """
    copies: dict[str, list[tuple[int, int]]] = {}
    for process in sorted(checksums):
        for device_checksums in checksums[process]:
            for name, checksum in device_checksums.items():
                copies.setdefault(name, []).append((process, checksum))
    for name, checksums_of_copies in copies.items():
        majority = Counter(checksum for _, checksum in checksums_of_copies).most_common(1)[0][0]
        for process, checksum in checksums_of_copies:
            if checksum != majority:
                return process, name
    return None


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A shard's bounds within its leaf, as `[0:4, 8:16]`; empty if it is the whole leaf."""
    bounds = [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
    if all(bound == (0, size) for bound, size in zip(bounds, shape, strict=True)):
        return ""
    return "[" + ", ".join(f"{first}:{end}" for first, end in bounds) + "]"


@jax.jit
def _checksums(shards: list[Any]) -> list[UInt32[Array, ""]]:
    return [jnp.sum(_bits(shard).astype(jnp.uint32), dtype=jnp.uint32) for shard in shards]


def _bits(values: Array) -> Array:
    if jnp.issubdtype(values.dtype, jnp.bool_):
        return values
    return jax.lax.bitcast_convert_type(values, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[values.dtype.itemsize])
