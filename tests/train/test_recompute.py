import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crcjax.train.recompute import differing_device, differing_shards

ROOT = Path(__file__).parents[2]


def _flipped(leaf: jax.Array, bit: int = 0) -> jax.Array:
    """The array with one bit of its first number flipped, on the same devices."""

    def flip(values: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(values.reshape(-1), jnp.uint32)
        return jax.lax.bitcast_convert_type(bits.at[0].set(bits[0] ^ np.uint32(1 << bit)), values.dtype).reshape(
            values.shape
        )

    return jax.jit(flip, out_shardings=leaf.sharding)(leaf)


@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 4), st.data())
def test_a_device_that_differs_from_the_majority_is_named(processes: int, devices: int, leaves: int, data) -> None:
    checksums = np.tile(np.arange(leaves, dtype=np.uint32), (processes, devices, 1))
    assert differing_device(checksums) is None
    process = data.draw(st.integers(0, processes - 1))
    device, leaf = data.draw(st.integers(0, devices - 1)), data.draw(st.integers(0, leaves - 1))
    checksums[process, device, leaf] += 7
    expected = (process, device, leaf)
    # Of two copies there is no majority: the second one is named.
    assert differing_device(checksums) == ((1, 0, leaf) if processes * devices == 2 else expected)


def test_one_flipped_bit_of_one_leaf_is_found_by_the_leaf() -> None:
    tree = {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(5)}
    assert differing_shards(tree, tree) == []
    for bit in (0, 22, 31):
        assert differing_shards(tree, tree | {"bias": _flipped(tree["bias"], bit)}) == ["bias"]


PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from dataclasses import replace
sys.path.insert(0, sys.argv[1])
from test_recompute import _flipped
from crcjax.config import get_config
from crcjax.data.bags import Bag, bag_spec
from crcjax.errors import CorruptionError
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import device_mesh
from crcjax.train.optimizer import build_optimizer
from crcjax.train.recompute import Recomputation
from crcjax.train.step import build_step, init_state
from jax.sharding import NamedSharding

config = get_config()
config.model.width, config.model.features, config.model.attention = 8, 16, 8
config.mesh.fsdp_min_size = 64
mesh, model = device_mesh(), build_model(config.model, 3, 0)
optimizer = build_optimizer(config.optimizer, 100)
build = lambda mesh: build_step(model, optimizer, config, mesh)
step = build(mesh)
devices = mesh.size
rng = np.random.default_rng(0)
bag = Bag(
    rng.integers(0, 255, (devices, 2, 1, 32, 32, 3)).astype(np.uint8), np.ones((devices, 2, 1), bool),
    np.zeros((devices, 2, 2), np.float32), np.arange(devices, dtype=np.int32) % 3, np.ones(devices, np.float32),
)
bag = jax.tree_util.tree_map_with_path(lambda path, leaf: jax.device_put(leaf, NamedSharding(mesh, bag_spec(path))), bag)
events = []
take_step = Recomputation(step, build, mesh, 2, lambda kind, **facts: events.append((kind, facts)))


def spoiled(step):
    def wrong(state, bags):
        state, metrics = step(state, bags)
        return replace(state, params=state.params | {"norm": state.params["norm"] | {"bias": _flipped(state.params["norm"]["bias"])}}), metrics
    return wrong


def trained(take, count=4):
    state = init_state(model, optimizer, config, mesh)
    for number in range(1, count + 1):
        state, metrics = take(number, state, bag)
        metrics["loss"].block_until_ready()
    return jax.tree.leaves(jax.device_get(state.params))


plain, checked = trained(lambda number, state, bag: step(state, bag)), trained(take_step)
assert all((a == b).all() for a, b in zip(plain, checked)) and not events
healthy = list(take_step._steps_alone)


def message():
    try:
        trained(take_step, 2)
    except CorruptionError as error:
        return str(error)


for device, (one, alone) in enumerate(healthy):
    take_step._steps_alone[device] = (one, spoiled(alone))
    print(message(), events.pop()[1].get("device"))
    take_step._steps_alone[device] = (one, alone)
take_step._step_of_neighbours = spoiled(take_step._step_of_neighbours)
print(message(), events.pop()[1])
"""


def _output(devices: int) -> list[str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)]
    settings = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PJRT_NPROC": "16"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_bit_flipped_on_one_of_three_devices_is_found_and_the_device_is_named() -> None:
    *by_device, transient = _output(3)
    assert len(by_device) == 3
    for device, line in enumerate(by_device):
        assert (
            f"step 2 was computed again: device {device} of process 0 computes another state.params.norm.bias" in line
        )
        assert line.endswith(f" {device}")
    assert "step 2 was computed again: the params.norm.bias of process 0 had another value" in transient


@pytest.mark.multiprocess
def test_with_one_device_the_step_is_computed_again_on_it() -> None:
    (transient,) = _output(1)
    assert "step 2 was computed again: the params.norm.bias of process 0 had another value" in transient
