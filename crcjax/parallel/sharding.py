"""Sharding rules: which device holds which part of the parameters, of their optimiser state and of a bag."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# Axis of the kernel that is sharded over `model`: its outputs (-1) or its inputs (-2). Of two consecutive layers, the first
# shards its outputs and the second its inputs, so that devices exchange one sum per pair (Shoeybi et al. 2019). A kernel
# may hold heads, gates and values one after the other; where a shard crosses them, the partitioner moves the values.
_MODEL_RULES = (
    (r"(attn\.qkv|mlp\.fc1|within\.project|across\.\d+\.project|perceptron\.0|layers\.\d+\.project)\.kernel", -1),
    (r"(attn\.proj|mlp\.fc2|within\.merge|across\.\d+\.merge|perceptron\.1|layers\.\d+\.merge)\.kernel", -2),
    (r"encoder\.merges\.\d+\.kernel|encoder\.project\.kernel", -1),
    (r"published\..*(conv|downsample|stem|reduction).*\.kernel", -1),
    (r"(score|pool_slots|pool_regions)\.hidden\.kernel|compress\.kernel|query\.0\.kernel", -1),
    (r"(score|pool_slots|pool_regions)\.score\.kernel|query\.1\.kernel", -2),
)


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, fsdp_min_size: int) -> Any:
    """A NamedSharding for every array of a state, concrete or abstract.

    Kernels are sharded over `model` by their names. Arrays of at least `fsdp_min_size` numbers (0: none) are also sharded
    over `data`, along the longest remaining axis that divides evenly; so is their optimiser state (ZeRO, Rajbhandari et
    al. 2020, stage 3).
    """

    def sharding_of(path: tuple, value: Any) -> NamedSharding:
        axes: list[str | None] = [None] * value.ndim
        model, data = mesh.shape["model"], mesh.shape["data"]
        name = ".".join(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey))
        model_axis = next((axis for rule, axis in _MODEL_RULES if value.ndim > 1 and re.search(rule, name)), None)
        if model_axis is not None and value.shape[model_axis] % model == 0:
            axes[model_axis] = "model"
        if fsdp_min_size and value.size >= fsdp_min_size:
            unsharded = [i for i, axis in enumerate(axes) if axis is None and value.shape[i] % data == 0]
            if unsharded:
                axes[max(unsharded, key=lambda i: value.shape[i])] = "data"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding_of, state)
