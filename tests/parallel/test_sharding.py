import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from crcjax.config import get_config
from crcjax.data.hard_mining import start_mining
from crcjax.models.aggregators.hierarchical import HierarchicalAttentionMIL
from crcjax.models.encoders.convnets import ConvNeXt
from crcjax.models.encoders.vit import ViT
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import AXES, device_mesh
from crcjax.parallel.sharding import state_shardings
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import abstract_state

MESH = AbstractMesh((4, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3)


def _specs(module: nnx.Module, fsdp_min_size: int, under: str = "published") -> dict[str, PartitionSpec]:
    state = {"encoder" if under else "aggregator": {under: nnx.to_pure_dict(nnx.state(module))}}
    found = jax.tree_util.tree_leaves_with_path(state_shardings(state, MESH, fsdp_min_size))
    return {".".join(str(part.key) for part in path[2:]): sharding.spec for path, sharding in found}


def test_a_transformers_layers_are_divided_by_pairs_over_model_and_the_rest_over_data() -> None:
    vit = ViT(patch_px=16, width=64, depth=1, heads=4, hidden=256, grid=4, swiglu=True, rngs=nnx.Rngs(0))
    specs = _specs(vit, 4096)
    assert specs["blocks.0.attn.qkv.kernel"] == PartitionSpec("data", "model")
    assert specs["blocks.0.attn.proj.kernel"] == PartitionSpec("model", "data")
    assert specs["blocks.0.mlp.fc1.kernel"] == PartitionSpec("data", "model")
    assert specs["blocks.0.mlp.fc2.kernel"] == PartitionSpec("model", "data")
    assert specs["blocks.0.norm1.scale"] == PartitionSpec(None)
    assert specs["pos_embed"] == PartitionSpec(None, None, None)  # 17 x 64 is small


def test_without_shard_params_nothing_is_divided_over_data() -> None:
    vit = ViT(patch_px=16, width=64, depth=1, heads=4, hidden=256, grid=4, rngs=nnx.Rngs(0))
    assert not any("data" in spec for spec in _specs(vit, 0).values())


@pytest.mark.parametrize("name", ["stem.0.kernel", "stages.0.blocks.0.mlp.fc1.kernel", "stages.1.downsample.1.kernel"])
def test_convolutions_are_divided_by_their_output_channels(name: str) -> None:
    specs = _specs(ConvNeXt(depths=(1, 1), widths=(8, 16), rngs=nnx.Rngs(0)), 0)
    assert specs[name][-1] == "model"


def test_dense_layers_of_a_mil_model_are_divided() -> None:
    config = get_config().model
    config.features, config.attention, config.heads = 32, 16, 2
    mil = HierarchicalAttentionMIL(config, 3, (1, 2), dtype=np.float32, rngs=nnx.Rngs(0))
    specs = _specs(mil, 0, "")
    assert specs["across.0.perceptron.0.kernel"] == PartitionSpec(None, "model")
    assert specs["across.0.perceptron.1.kernel"] == PartitionSpec("model", None)
    assert specs["pool_regions.hidden.kernel"] == PartitionSpec(None, "model")


def test_what_is_remembered_for_mining_is_whole_on_every_device_however_large() -> None:
    config = get_config()
    config.data.mine_slides, config.data.mine_regions, config.mesh.fsdp_min_size = 0.3, 0.3, 8
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    model, mining = build_model(config.model, 3, 0), start_mining(config.data, 64)
    mesh = device_mesh(config, jax.devices()[:1])
    state = abstract_state(model, build_optimizer(config.optimizer, 100), config, mesh, mining)
    assert any("data" in leaf.sharding.spec for leaf in jax.tree.leaves(state.moments))
    assert not any(any(leaf.sharding.spec) for leaf in jax.tree.leaves(state.mining))
