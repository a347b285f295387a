"""Whether the copies of values, or of parts of them, that several devices hold are the same to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32


def local_sums(values: PyTree[Array]) -> list[dict[str, int]]:
    """For every device of this process a checksum of what it holds of each leaf, by the leaf's name and the part of it.

    The checksum is the sum of a leaf's bits as unsigned numbers modulo 2^32: any single changed bit changes it.
    """
    held: dict[jax.Device, dict[str, Array]] = {device: {} for device in jax.local_devices()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(values):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for shard in leaf.addressable_shards:
            held[shard.device][name + _part(shard.index, leaf.shape)] = shard.data
    sums = [jax.device_get(_sums(list(parts.values()))) for parts in held.values()]
    return [dict(zip(parts, map(int, found), strict=True)) for parts, found in zip(held.values(), sums, strict=True)]


def disagreement(sums: Mapping[int, Sequence[Mapping[str, int]]]) -> tuple[int, str] | None:
    """The process whose copy differs from the most (from the first's, if as many), and the first leaf that differs.

    None if all copies of a part are the same; a part that one device alone holds has nothing that it should equal. `sums`
    are `local_sums` of every process.
    """
    copies: dict[str, list[tuple[int, int]]] = {}
    for process in sorted(sums):
        for held in sums[process]:
            for name, value in held.items():
                copies.setdefault(name, []).append((process, value))
    for name, found in copies.items():
        usual = Counter(value for _, value in found).most_common(1)[0][0]
        for process, value in found:
            if value != usual:
                return process, name
    return None


def _part(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """Which part of a leaf it is, as `[0:4, 8:16]`; nothing for all of it."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    if all(bound == (0, size) for bound, size in zip(bounds, shape, strict=True)):
        return ""
    return "[" + ", ".join(f"{first}:{end}" for first, end in bounds) + "]"


@jax.jit
def _sums(leaves: list[Any]) -> list[UInt32[Array, ""]]:
    return [jnp.sum(_bits(leaf).astype(jnp.uint32), dtype=jnp.uint32) for leaf in leaves]


def _bits(leaf: Array) -> Array:
    if jnp.issubdtype(leaf.dtype, jnp.bool_):
        return leaf
    return jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
