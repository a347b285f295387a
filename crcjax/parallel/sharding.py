"""Which device holds what: rules by parameter name, for the optimiser's moments as for the parameters themselves."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from crcjax.data.bags import WITH_REGIONS

# Axis of the kernel that is divided over `model`: what a layer makes (-1) or what it takes (-2). Of two layers in a row
# the first makes parts and the second takes them, so that one sum a pair crosses the devices (Shoeybi et al. 2019).
# Heads, gates and values stand in one kernel one after the other; the partitioner moves what a split does not meet.
_MODEL_RULES = (
    (r"(attn\.qkv|mlp\.fc1|within\.project|across\.\d+\.project|perceptron\.0|layers\.\d+\.project)\.kernel", -1),
    (r"(attn\.proj|mlp\.fc2|within\.merge|across\.\d+\.merge|perceptron\.1|layers\.\d+\.merge)\.kernel", -2),
    (r"encoder\.merges\.\d+\.kernel|encoder\.project\.kernel", -1),
    (r"published\..*(conv|downsample|stem|reduction).*\.kernel", -1),
    (r"(score|pool_slots|pool_regions)\.hidden\.kernel|compress\.kernel|query\.0\.kernel", -1),
    (r"(score|pool_slots|pool_regions)\.score\.kernel|query\.1\.kernel", -2),
)


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, fsdp_min_size: int) -> Any:
    """The layout of a state, concrete or abstract: a NamedSharding for every array.

    Matrices of layers are divided over `model` by their names; of what has at least `fsdp_min_size` numbers (0: nothing),
    the longest axis that is left and divides is, over `data`, with its moments (ZeRO, Rajbhandari et al. 2020, stage 3).
    """

    def of(path: tuple, value: Any) -> NamedSharding:
        axes: list[str | None] = [None] * value.ndim
        model, data = mesh.shape["model"], mesh.shape["data"]
        name = ".".join(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey))
        split = next((axis for rule, axis in _MODEL_RULES if value.ndim > 1 and re.search(rule, name)), None)
        if split is not None and value.shape[split] % model == 0:
            axes[split] = "model"
        if fsdp_min_size and value.size >= fsdp_min_size:
            free = [i for i, axis in enumerate(axes) if axis is None and value.shape[i] % data == 0]
            if free:
                axes[max(free, key=lambda i: value.shape[i])] = "data"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(of, state)


def bag_spec(path: tuple) -> PartitionSpec:
    """Where the part of a Bag at `path` of the tree lies: bags over `data`, and their regions over `bag`."""
    return PartitionSpec("data", "bag") if path[0].name in WITH_REGIONS else PartitionSpec("data")
