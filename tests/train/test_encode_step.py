"""Batch norms with statistics of the global batch, in the stem of a small ResNet that is trained end to end."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from crcjax.config import get_config
from crcjax.data.bags import Bag
from crcjax.errors import InputError
from crcjax.models.encoders import registry as encoders
from crcjax.models.encoders.convnets import ResNet
from crcjax.models.encoders.torch_weights import torch_tensors
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import device_mesh, local_mesh
from crcjax.predict.forward import Forward
from crcjax.predict.predictor import Predictor
from crcjax.runs.checkpoint import Checkpointer, restore_params
from crcjax.runs.train_state import TrainState
from crcjax.train.loop import train
from crcjax.train.memory_budget import MicroBatches, record_micro_batches
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import build_step, init_state

SMALL = encoders.PretrainedEncoder(partial(ResNet, depths=(), width=8), 8, 1.0, "", resize_px=32, size_px=32)

# python -c PROGRAM FOLDER LAYOUT ...: 5 steps on 8 devices, then losses and parameters to FOLDER/LAYOUT.npz.
PROGRAM = """
import sys
from functools import partial
import jax, numpy as np
from jax.sharding import NamedSharding
from crcjax.config import get_config
from crcjax.data.bags import Bag
from crcjax.models.encoders import convnets
from crcjax.models.encoders import registry as encoders
from crcjax.models.mil import build_model
from crcjax.train.memory_budget import MicroBatches, record_micro_batches
from crcjax.parallel.mesh import device_mesh
from crcjax.train.optimizer import build_optimizer
from crcjax.data.bags import bag_spec
from crcjax.train.step import build_step, init_state

build = partial(convnets.ResNet, depths=(), width=8)
encoders.PRETRAINED["small"] = encoders.PretrainedEncoder(build, 8, 1.0, "", resize_px=32, size_px=32)
rng = np.random.default_rng(0)
label = rng.integers(0, 3, 8).astype(np.int32)
tiles = rng.integers(80, 255, (8, 8, 1, 32, 32, 3)).astype(np.uint8)
for i in range(8):
    tiles[i, ..., :: 1 + label[i], :, :] //= 2
mask, position = rng.random((8, 8, 1)) < np.linspace(0.3, 1, 8)[:, None, None], np.zeros((8, 8, 2), np.float32)
bags = Bag(tiles, mask, position, label, rng.uniform(0.5, 1.5, 8).astype(np.float32))

for layout in sys.argv[2:]:
    data, along_bag, model_axis, alone = map(int, layout.split("x"))
    if alone:  # each device by itself
        convnets.Batch.mean = lambda self, maps: maps.mean(axis=(0, 1, 2), where=self.valid[:, None, None, None])
    config = get_config()
    config.data.regions_per_bag, config.data.batch_size, config.mesh.fsdp_min_size = 8, 8, 64
    config.model.encoder, config.model.frozen, config.model.batch_norm_momentum = "small", False, 0.3
    config.model.features, config.model.attention, config.model.encode_regions = 16, 8, 4
    config.mesh.data, config.mesh.bag, config.mesh.model = data, along_bag, model_axis
    config.train.steps, config.optimizer.warmup_steps, config.train.micro_batches = 5, 1, 1
    mesh = device_mesh(config, jax.devices()[: data * along_bag * model_axis])
    model, optimizer = build_model(config.model, 3, 0), build_optimizer(config.optimizer, config.train.steps)
    step, state = build_step(model, optimizer, config, mesh), init_state(model, optimizer, config, mesh)
    bag = jax.tree_util.tree_map_with_path(
        lambda path, part: jax.device_put(part, NamedSharding(mesh, bag_spec(path))), bags
    )
    losses = []
    for _ in range(config.train.steps):
        state, metrics = step(state, bag)
        losses.append(float(metrics["loss"]))
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    np.savez(f"{sys.argv[1]}/{layout}.npz", losses=losses, **named)
"""
ONE, LAYOUTS, ALONE = "1x1x1x0", ("8x1x1x0", "2x4x1x0"), "2x4x1x1"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A config with a ResNet's stem and momentum 1: the running statistics are those of the last step."""
    monkeypatch.setitem(encoders.PRETRAINED, "small", SMALL)
    config = get_config()
    config.model.encoder, config.model.frozen, config.model.batch_norm_momentum = "small", False, 1.0
    config.model.features, config.model.attention, config.model.dropout = 16, 8, 0.0
    config.augment.flips, config.augment.stain, config.data.batch_size, config.data.regions_per_bag = False, 0.0, 6, 4
    config.train.steps, config.optimizer.warmup_steps = 6, 2
    return config


def _bag() -> Bag:
    """Six bags of four regions of noise with several contrasts; the last regions are padding with arbitrary values."""
    rng = np.random.default_rng(0)
    pixels = (rng.integers(0, 255, (6, 4, 1, 32, 32, 3)) * rng.uniform(0.2, 1, (6, 4, 1, 1, 1, 3))).astype(np.uint8)
    mask = np.ones((6, 4, 1), bool)
    for i in range(6):
        mask[i, 4 - i % 3 :] = False
    return Bag(pixels, mask, np.zeros((6, 4, 2), np.float32), np.arange(6, dtype=np.int32) % 3, np.ones(6, np.float32))


def _built(config: Any, seed: int = 0) -> tuple[Any, Any, TrainState]:
    mesh, model = device_mesh(config), build_model(config.model, 3, seed)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    return model, build_step(model, optimizer, config, mesh), init_state(model, optimizer, config, mesh)


def _distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(np.asarray(one) - np.asarray(other)) / max(np.linalg.norm(other), 1e-9))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_any_layout_has_the_losses_parameters_and_running_statistics_of_one_device(tmp_path: Path) -> None:
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles in half the time
    settings = {"XLA_FLAGS": flags, "PJRT_NPROC": "16", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), ONE, *LAYOUTS, ALONE]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    actual = {}
    for layout in (ONE, *LAYOUTS, ALONE):
        with np.load(tmp_path / f"{layout}.npz") as file:
            actual[layout] = dict(file)
    one = actual[ONE]
    running = [name for name in one if name.endswith(("['mean']", "['var']"))]
    assert len(running) == 2
    for layout in LAYOUTS:
        far = {name: _distance(actual[layout][name], one[name]) for name in one}
        worst = max(far, key=lambda name: far[name])
        print(f"{layout}: {worst} {far[worst]:.1e}")
        assert max(far.values()) < 1e-5, (layout, far)
    assert max(_distance(actual[ALONE][name], one[name]) for name in running) > 1e-2
    assert _distance(actual[ALONE]["losses"], one["losses"]) > 1e-4


@pytest.mark.parametrize(("regions", "micro_batches"), [(4, 1), (2, 3)])
def test_running_statistics_are_those_of_the_valid_tiles_of_each_chunk_and_micro_batch(
    config: Any, regions: int, micro_batches: int
) -> None:
    config.model.encode_regions, config.train.micro_batches = regions, micro_batches
    model, step, state = _built(config)
    bag, published = _bag(), model.encoder.published
    maps = np.asarray(published.conv1(SMALL.prepare(bag.tiles.reshape(24, 32, 32, 3))), np.float64).reshape(6, 4, -1, 8)
    state, _ = step(state, bag)
    actual, chunks = state.params["encoder"]["published"]["bn1"], 4 // regions
    sums, count = np.zeros((2, 8)), 0
    for number in range(micro_batches):
        for chunk in range(chunks):
            valid = bag.mask[number::micro_batches, chunk::chunks, 0]
            values = maps[number::micro_batches, chunk::chunks][valid].reshape(-1, 8)
            sums += valid.sum() * np.stack([values.mean(axis=0), values.var(axis=0, ddof=1)])
            count += valid.sum()
    np.testing.assert_allclose(actual["mean"], sums[0] / count, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual["var"], sums[1] / count, rtol=1e-5)
    assert np.abs(maps.reshape(-1, 8).var(axis=0, ddof=1) / np.asarray(actual["var"]) - 1).max() > 1e-2

    before = jax.tree.map(np.array, actual)
    bag.mask[:] = False  # and without a valid tile they stay
    state, _ = step(state, bag)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(state.params["encoder"]["published"]["bn1"][name], before[name])


def test_statistics_of_half_precision_are_float32_and_near_those_of_float32(config: Any) -> None:
    actual = {}
    for config.model.dtype in ("float32", "bfloat16", "float16"):
        _, step, state = _built(config)
        state, metrics = step(state, _bag())
        assert np.isfinite(float(metrics["loss"]))
        actual[config.model.dtype] = state.params["encoder"]["published"]["bn1"]
    for dtype in ("bfloat16", "float16"):
        for name in ("mean", "var"):
            value = actual[dtype][name]
            assert value.dtype == np.float32
            assert 0 < _distance(value, actual["float32"][name]) < 1e-2, name


def test_a_restored_state_continues_bit_for_bit_and_evaluates_by_its_running_statistics(
    config: Any, tmp_path: Path
) -> None:
    config.model.batch_norm_momentum = 0.3
    model, step, state = _built(config)
    start = jax.tree.map(np.array, state.params["encoder"]["published"]["bn1"])
    for _ in range(2):
        state, _ = step(state, _bag())
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(state, None)
    checkpoints.close()
    saved_params = jax.tree.map(np.array, state.params)
    again = Checkpointer(tmp_path)
    restored = again.restore(_built(config, seed=1)[2])
    again.close()
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, restored.params), saved_params)
    running = saved_params["encoder"]["published"]["bn1"]
    assert _distance(running["mean"], start["mean"]) > 0.1
    (one, _), (other, _) = step(state, _bag()), step(restored, _bag())
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)

    forward, tiles = Forward(model, (8,), 4, local_mesh()), _bag().tiles[0]
    params, _ = restore_params(tmp_path, model)
    whole, alone = (np.asarray(forward.encode(params, some)) for some in (tiles, tiles[:1]))
    np.testing.assert_allclose(alone[0], whole[0], rtol=1e-5, atol=1e-6)
    params["encoder"]["published"]["bn1"] |= start
    assert _distance(forward.encode(params, tiles), whole) > 0.05


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("encoder", "compact", "must be 0 for compact, which has no BatchNorm layers, got 1.0"),
        ("frozen", True, r"must be 0 for a frozen encoder, got 1.0; .*config\.model\.frozen to False"),
        ("batch_norm_momentum", 1.5, "must be a share from 0 to 1, got 1.5"),
    ],
)
def test_batch_statistics_without_an_effect_are_refused(config: Any, field: str, value: object, reason: str) -> None:
    config.model[field] = value
    with pytest.raises(InputError, match=rf"^config\.model\.batch_norm_momentum {reason}"):
        build_model(config.model, 3, 0)


def test_chunks_that_would_differ_between_meshes_are_refused(config: Any) -> None:
    config.model.encode_regions = 2
    _, step, state = _built(config)
    bag = _bag()
    bag = replace(bag, tiles=bag.tiles[:, :3], mask=bag.mask[:, :3], position=bag.position[:, :3])
    with pytest.raises(InputError, match=r"encode_regions must divide .* got 2, .* 3 regions on 1 devices .*try 3"):
        step(state, bag)


def test_a_run_saves_its_running_statistics_predicts_by_them_and_logs_their_tiles(
    config: Any, small_config: Any, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    small_config.model.update(config.model)
    save_file(torch_tensors(SMALL.build(rngs=nnx.Rngs(3))), tmp_path / "small.safetensors")
    small_config.model.weights, small_config.model.batch_norm_momentum = str(tmp_path / "small.safetensors"), 0.1
    (tmp_path / "run").mkdir()
    record_micro_batches(tmp_path / "run", MicroBatches(2, (1, 2, 4)))  # as after a step that ran out of memory
    train(small_config, tmp_path / "run")
    output = capfd.readouterr().err
    assert "batch norms compute statistics over 2 bags x 4 regions at a time: memory does not suffice for" in output
    params, _ = restore_params(tmp_path / "run", build_model(small_config.model, 3, 0))
    running = params["encoder"]["published"]["bn1"]
    assert np.abs(running["mean"]).min() > 0
    for name, value in Predictor(tmp_path / "run").members[0].params["encoder"]["published"]["bn1"].items():
        np.testing.assert_array_equal(value, running[name])
    small_config.train.micro_batches = 2
    with pytest.raises(InputError, match=r"train\.micro_batches was 1, is 2"):
        train(small_config, tmp_path / "run")
