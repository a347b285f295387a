"""The first step's gradients of every model are equal for all meshes of four devices in one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crcjax.models.aggregators.registry import AGGREGATORS

# python -c PROGRAM MODEL LAYOUTS: the largest relative differences of loss and gradients from one device's, as JSON.
PROGRAM = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding
from crcjax.config import get_config
from crcjax.data.bags import Bag
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import device_mesh
from crcjax.train.optimizer import build_optimizer
from crcjax.data.bags import bag_spec
from crcjax.train.step import build_step, init_state
from crcjax.train.auxiliary_tasks import add_heads, open_tasks

kind, layouts = sys.argv[1], json.loads(sys.argv[2])
rng = np.random.default_rng(0)
label, weight = np.array([0, 1, 2, 0], np.int32), rng.uniform(0.5, 1.5, 4).astype(np.float32)
mask, position = rng.random((4, 8, 1)) < 0.9, (20 * rng.random((4, 8, 2))).astype(np.float32)
known = rng.integers(0, 2, (4, 8, 1, 2)).astype(np.int8)
pixels = rng.integers(50, 255, (4, 8, 1, 32, 32, 3)).astype(np.uint8)
features = rng.normal(size=(4, 8, 1, 16)).astype(np.float32)


def first_step(layout):
    config = get_config()
    config.data.batch_size, config.data.regions_per_bag = 4, 8
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    config.model.heads, config.model.clam_instances = 2, 2
    config.mesh.data, config.mesh.bag, config.mesh.model, config.mesh.fsdp_min_size = *layout, 64
    tiles, labels, tasks = pixels, None, None
    if kind == "pixels with tasks":
        config.tasks.tissue, config.tasks.weighting, config.tasks.tissue_classes = 0.5, "learned", ("one", "other")
        labels = known
        tasks = open_tasks(config, [known[0]], [])
    elif kind != "pixels":
        config.model.mil, tiles = kind, features
        config.data.features, config.model.encoder, config.model.imported_features = True, "theirs", 16
    mesh = device_mesh(config, jax.devices()[: int(np.prod(layout))])
    model, optimizer = build_model(config.model, 3, 0), build_optimizer(config.optimizer, 50)
    if tasks:
        add_heads(model, tasks, 0)
    bag = jax.tree_util.tree_map_with_path(
        lambda path, part: jax.device_put(part, NamedSharding(mesh, bag_spec(path))),
        Bag(tiles, mask, position, label, weight, tile_labels=labels),
    )
    step = build_step(model, optimizer, config, mesh, tasks=tasks)
    state, metrics = step(init_state(model, optimizer, config, mesh), bag)
    norm = float(metrics["gradient_norm"])
    # Adam's first moments are the clipped gradients, but for a factor.
    moments = {
        jax.tree_util.keystr(path): np.asarray(leaf) * max(1.0, norm)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.moments)
        if ".mu" in jax.tree_util.keystr(path)
    }
    assert moments
    return float(metrics["loss"]), moments


loss, alone = first_step((1, 1, 1))
largest = max(np.abs(value).max() for value in alone.values())
found = []
for layout in layouts:
    other, many = first_step(layout)
    apart = {name: float(np.abs(many[name] - value).max() / largest) for name, value in alone.items()}
    worst = max(apart, key=apart.get)
    found.append([abs(other / loss - 1), apart[worst], worst])
print("found", json.dumps(found))
"""
LAYOUTS = {"pixels": [(1, 1, 2)], "pixels with tasks": [(2, 2, 1)]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*AGGREGATORS, *LAYOUTS}))
def test_any_layout_gives_the_gradients_of_one_device(kind: str) -> None:
    layouts = LAYOUTS.get(kind, [(2, 2, 1)])
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PJRT_NPROC": "16", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, kind, json.dumps(layouts)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for loss, gradient, name in json.loads(done.stdout.rpartition("found")[2]):
        assert loss < 1e-5
        assert gradient < 1e-5, name


# python -c COMPILED MODEL ...: compiles their steps in bfloat16 for bags divided among four devices.
COMPILED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding
from crcjax.config import get_config
from crcjax.data.bags import Bag
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import device_mesh
from crcjax.train.optimizer import build_optimizer
from crcjax.data.bags import bag_spec
from crcjax.train.step import abstract_state, build_step

for kind in sys.argv[1:]:
    config = get_config()
    config.data.batch_size, config.data.regions_per_bag, config.data.features = 4, 4, True
    config.model.mil, config.model.encoder, config.model.imported_features = kind, "theirs", 16
    config.model.features, config.model.attention, config.model.heads, config.model.clam_instances = 16, 8, 2, 2
    config.model.dtype = "bfloat16"
    mesh, model = device_mesh(config), build_model(config.model, 3, 0)
    optimizer = build_optimizer(config.optimizer, 50)
    shapes = ((4, 4, 1, 16), np.float32), ((4, 4, 1), bool), ((4, 4, 2), np.float32), ((4,), np.int32), ((4,), np.float32)
    bag = jax.tree_util.tree_map_with_path(
        lambda path, part: part.update(sharding=NamedSharding(mesh, bag_spec(path))),
        Bag(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)),
    )
    build_step(model, optimizer, config, mesh).lower(abstract_state(model, optimizer, config, mesh), bag).compile()
"""


@pytest.mark.slow
def test_gradients_of_a_bfloat16_computation_are_added_up_over_devices_in_float32(tmp_path: Path) -> None:
    kinds = ("clam_mb", "hierarchical", "transmil")
    # As the partitioner leaves it: CPUs have no sums in bfloat16, and convert what was asked for.
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_pass_re=spmd.* --xla_dump_hlo_as_text"
    flags += " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    settings = {"XLA_FLAGS": flags, "PJRT_NPROC": "16", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", COMPILED, *kinds]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    programs = [path.read_text() for path in tmp_path.glob("*jit_step*after_spmd-partitioning*")]
    assert len(programs) == len(kinds), sorted(path.name for path in tmp_path.iterdir())
    for program in programs:
        sums = re.findall(r"= (.+?) all-reduce\(", program)
        assert any("f32" in kind for kind in sums)
        assert not [kind for kind in sums if "bf16" in kind]
