"""The same run on one and on many devices, in one and in several real processes connected by gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

# python -c PROGRAM FOLDER NAME PROCESSES PROCESS ADDRESS CHANGES: 50 steps, then parameters and losses to FOLDER/NAME.npz.
PROGRAM = """
import json, sys
import jax, numpy as np
folder, name, processes, process, address, changes = sys.argv[1:]
if int(processes) > 1:
    jax.distributed.initialize(address, int(processes), int(process))

from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding
from crcjax.config import get_config
from crcjax.data.bags import Bag
from crcjax.models.aggregators import hierarchical
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import described, device_mesh
from crcjax.train.optimizer import build_optimizer
from crcjax.data.bags import bag_spec
from crcjax.train.step import build_step, init_state

config = get_config()
config.data.regions_per_bag, config.data.batch_size = 8, 8
config.model.width, config.model.features, config.model.attention, config.model.encode_regions = 8, 16, 16, 3
config.model.mil, config.model.heads, config.mesh.fsdp_min_size = "hierarchical", 2, 64
config.train.steps, config.optimizer.warmup_steps = 50, 5
config.update_from_flattened_dict(json.loads(changes))
hierarchical._PAIRS, hierarchical._TILE = 32, (4, 4)  # attention over eight regions comes in tiles
mesh = device_mesh(config)
print(described(mesh))
if mesh.size > 1:
    hierarchical.kernel = None  # not to be asked for where devices share a bag: it cannot be divided so
model = build_model(config.model, 3, 0, (1, 2))
optimizer = build_optimizer(config.optimizer, config.train.steps)
step, state = build_step(model, optimizer, config, mesh), init_state(model, optimizer, config, mesh)


def bag_of(number):
    rng = np.random.default_rng(number)
    label = rng.integers(0, 3, 8).astype(np.int32)
    tiles = rng.integers(80, 255, (8, 8, 5, 32, 32, 3)).astype(np.uint8)
    for i in range(8):
        tiles[i, ..., :: 1 + label[i], :, :] //= 2
    mask = rng.random((8, 8, 5)) < 0.8
    position = rng.integers(0, 40, (8, 8, 2)).astype(np.float32)
    bag = Bag(tiles, mask, position, label, rng.uniform(0.5, 1.5, 8).astype(np.float32))

    def place(path, part):
        return jax.make_array_from_callback(part.shape, NamedSharding(mesh, bag_spec(path)), lambda at: part[at])

    return jax.tree_util.tree_map_with_path(place, bag)


losses = []
for number in range(config.train.steps):
    state, metrics = step(state, bag_of(number))
    losses.append(float(metrics["loss"]))  # waits for the step, without which jax 0.10 may hang
held = [shard.data.size for leaf in jax.tree.leaves(state.params) for shard in leaf.addressable_shards[:1]]
params = process_allgather(state.params, tiled=True)
if int(process) == 0:
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    np.savez(f"{folder}/{name}.npz", losses=losses, held=sum(held), **named)
"""
ONE = {"mesh.data": 1, "mesh.bag": 1}
LAYOUTS = {
    "1 x 8": (1, 8, {"mesh.data": 2, "mesh.bag": 2, "mesh.model": 2}),
    "2 x 4": (2, 4, {"mesh.data": 4, "mesh.bag": 2, "train.micro_batches": 2}),
    "4 x 2": (4, 2, {"mesh.data": 4, "mesh.model": 2}),
}


# Two processes save a divided state and evaluate it, each its share of the slides.
SHARED = """
import json, sys
import jax
folder, painted, process, address = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
from pathlib import Path
from crcjax.config import get_config
from crcjax.data.cohort import load_cohort
from crcjax.models.mil import build_model
from crcjax.runs.checkpoint import Checkpointer
from crcjax.predict.stored_bags import Evaluation
from crcjax.data.bags import open_slides
from crcjax.parallel.mesh import device_mesh, local_mesh, on_local_mesh
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import init_state
from crcjax.predict.forward import Forward

config = get_config()
config.model.width, config.model.features, config.model.attention, config.mesh.fsdp_min_size = 8, 16, 8, 64
mesh, model = device_mesh(config), build_model(config.model, 3, 0)
state = init_state(model, build_optimizer(config.optimizer, 50), config, mesh)
assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.moments))
checkpoints = Checkpointer(Path(folder))
checkpoints.save(state, None)
checkpoints.close()
cohort = load_cohort(painted + "/cohort.csv", config.data.classes).split("train")
evaluation = Evaluation(open_slides(painted + "/store", cohort), Forward(model, (64, 128), 8, local_mesh()), "slide")
Path(folder, process + ".json").write_text(json.dumps(evaluation.metrics(on_local_mesh(state.params, mesh, local_mesh()))))
"""


def _start(programs: list[list[str]], devices: int) -> None:
    """Runs python -c with each list of arguments, all at once and connected; fails if one does."""
    # With the flags of this process, so that all processes sample the same bits.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    settings = {"XLA_FLAGS": flags, "PJRT_NPROC": "16"}
    if len(programs) > 1:
        settings["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # for the reason in crcjax.parallel.process_group
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", *(argument.replace("ADDRESS", address) for argument in program)],
            env=os.environ | settings | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for program in programs
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), outputs[0][1][-3000:]


def _run(folder: Path, name: str, processes: int, devices: int, changes: dict) -> dict[str, np.ndarray]:
    arguments = [PROGRAM, str(folder), name, str(processes)]
    _start([[*arguments, str(i), "ADDRESS", json.dumps(changes)] for i in range(processes)], devices)
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return _run(tmp_path_factory.mktemp("alone"), "one", 1, 1, ONE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_losses_and_parameters_of_one_device(
    layout: str, alone: dict[str, np.ndarray], tmp_path: Path
) -> None:
    actual = _run(tmp_path, "many", *LAYOUTS[layout])
    assert actual["held"] < 0.6 * alone["held"]
    np.testing.assert_allclose(actual["losses"], alone["losses"], rtol=1e-5)
    far = {}
    for name, value in alone.items():
        if name.startswith("["):
            expected = _without_key_bias(name, value)
            far[name] = np.linalg.norm(_without_key_bias(name, actual[name]) - expected) / max(
                np.linalg.norm(expected), 1e-9
            )
    worst = max(far, key=lambda name: far[name])
    print(f"{layout}: losses {np.max(np.abs(actual['losses'] / alone['losses'] - 1)):.1e}, {worst} {far[worst]:.1e}")
    assert far[worst] < 1e-5, {name: value for name, value in far.items() if value > 1e-6}


def test_a_state_saved_by_two_processes_is_restored_by_one_and_both_evaluate_as_one_does(
    painted: Path, tmp_path: Path
) -> None:
    import jax

    from crcjax.config import get_config
    from crcjax.data.bags import open_slides
    from crcjax.data.cohort import load_cohort
    from crcjax.models.mil import build_model, params_of
    from crcjax.parallel.mesh import device_mesh, local_mesh
    from crcjax.predict.forward import Forward
    from crcjax.predict.stored_bags import Evaluation
    from crcjax.runs.checkpoint import Checkpointer
    from crcjax.train.optimizer import build_optimizer
    from crcjax.train.step import init_state

    _start([[SHARED, str(tmp_path), str(painted), str(i), "ADDRESS"] for i in range(2)], 2)
    config = get_config()
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    saved_model, other = (build_model(config.model, 3, seed) for seed in (0, 1))
    checkpoints = Checkpointer(tmp_path)
    state = checkpoints.restore(init_state(other, build_optimizer(config.optimizer, 50), config, device_mesh(config)))
    checkpoints.close()
    for one, two in zip(jax.tree.leaves(state.params), jax.tree.leaves(params_of(saved_model)), strict=True):
        np.testing.assert_array_equal(one, two)
    cohort = load_cohort(painted / "cohort.csv", config.data.classes).split("train")
    forward = Forward(saved_model, (64, 128), 8, local_mesh())
    expected = Evaluation(open_slides(str(painted / "store"), cohort), forward, "slide").metrics(state.params)
    actual = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert actual[0] == actual[1]
    assert actual[0] == pytest.approx(expected, rel=1e-5)


def _without_key_bias(name: str, value: np.ndarray) -> np.ndarray:
    """A parameter without the bias of the keys that have no positions.

    It adds the same to a query's every score, which the softmax takes away: its gradient is rounding alone, and Adam,
    which divides by the gradient's own size, makes steps of it in any direction, on any device, without any effect.
    """
    return np.delete(value.reshape(3, -1), 1, axis=0) if name.endswith("['within']['project']['bias']") else value
