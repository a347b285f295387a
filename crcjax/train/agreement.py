"""Whether the copies of replicated values on all devices are the same to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32


def local_sums(values: PyTree[Array]) -> tuple[list[str], list[list[int]]]:
    """The names of the replicated leaves, and for every device of this process a checksum of each leaf's copy there.

    The checksum is the sum of a leaf's bits as unsigned numbers modulo 2^32: any single changed bit changes it. Leaves
    that are split over devices are left out, for nothing says what they should equal.
    """
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(values)
        if leaf.is_fully_replicated
    ]
    copies = [[leaf.addressable_data(place) for _, leaf in named] for place in range(len(jax.local_devices()))]
    return [name for name, _ in named], [[int(value) for value in jax.device_get(_sums(copy))] for copy in copies]


def disagreement(names: Sequence[str], sums: Mapping[int, Sequence[Sequence[int]]]) -> tuple[int, str] | None:
    """The process whose copies differ from the most (from process 0's, if as many), and the first leaf that differs.

    None if all are the same. `sums` are `local_sums` of every process.
    """
    columns = [(process, tuple(column)) for process in sorted(sums) for column in sums[process]]
    usual = Counter(column for _, column in columns).most_common(1)[0][0]
    for process, column in columns:
        if column != usual:
            return process, next(name for name, one, other in zip(names, column, usual, strict=True) if one != other)
    return None


@jax.jit
def _sums(leaves: list[Any]) -> list[UInt32[Array, ""]]:
    return [jnp.sum(_bits(leaf).astype(jnp.uint32), dtype=jnp.uint32) for leaf in leaves]


def _bits(leaf: Array) -> Array:
    if jnp.issubdtype(leaf.dtype, jnp.bool_):
        return leaf
    return jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
