import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Several CPU devices are had by a fresh process alone.
PROGRAM = """
import sys, jax
from crcjax.config import get_config
from crcjax.data.cohort import load_cohort
from crcjax.data.loader import train_batches
from crcjax.models.mil import build_model
from crcjax.train.mesh import AXES, device_mesh
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import build_step, init_state

config = get_config()
config.data.store, config.data.cohort = sys.argv[1] + "/store", sys.argv[1] + "/cohort.csv"
config.data.regions, config.data.bags = 4, 8
config.model.width, config.model.features, config.model.attention = 8, 16, 8
config.train.steps, config.optimizer.warmup_steps = 12, 2
cohort = load_cohort(config.data.cohort, config.data.classes).split("train")
model = build_model(config.model, 3, 0)
optimizer = build_optimizer(config.optimizer, config.train.steps)
one = jax.make_mesh((1, 1, 1), AXES, axis_types=device_mesh().axis_types, devices=jax.devices()[:1])
for mesh in (one, device_mesh()):
    step, state = build_step(model, optimizer, config, mesh), init_state(model, optimizer, mesh)
    losses = []
    for bags in train_batches(cohort, config, mesh, 0):
        assert len(bags.tiles.sharding.device_set) == mesh.size
        state, metrics = step(state, bags)
        losses.append(float(metrics["loss"]))
    print(mesh.size, *losses)
"""


@pytest.mark.multiprocess
def test_four_devices_have_the_losses_of_one_to_rounding(painted: Path) -> None:
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PJRT_NPROC": "16", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(painted)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, four = ([float(value) for value in line.split()] for line in done.stdout.splitlines())
    assert (one[0], four[0], len(four)) == (1, 4, 13)
    np.testing.assert_allclose(one[1:], four[1:], rtol=1e-5)
