"""The memory that a compiled training step predicts, compared with the measured peak of activations and gradients.

Each size runs in a process of its own, since memory used before would hide the memory that a step adds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from record import Row, record

from crcjax.config import get_config
from crcjax.data.bags import Bag
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import device_mesh
from crcjax.train.memory_budget import step_budget
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import abstract_state, build_step, init_state

ON_CPU = jax.default_backend() == "cpu"
# The C library returns freed memory at once, so that the resident memory is the memory in use.
PROMPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PROMPT |= {"MALLOC_MMAP_MAX_": "1000000", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
BAGS = 8
# Regions per bag, side of a tile in px, config.model.remat and micro-batches.
SIZES = (
    (64, 64, "none", 1),
    (128, 64, "none", 1),
    (128, 64, "none", 2),
    (128, 64, "none", 4),
    (256, 64, "full", 1),
    (256, 64, "full", 2),
    (32, 256, "none", 1),
    (32, 256, "none", 2),
    (128, 256, "full", 1),
    (128, 256, "full", 2),
)
# A GPU has this many times the regions of SIZES.
REGION_FACTOR = 1 if ON_CPU else 8


def measure(regions: int, side: int, remat: str, micro_batches: int) -> tuple[int, int]:
    """The bytes that the compiled step predicts for activations and gradients, and the measured rise of the peak."""
    config = get_config()
    config.data.batch_size, config.data.regions_per_bag = BAGS, regions
    config.model.remat, config.train.micro_batches = remat, micro_batches
    mesh, model = device_mesh(config), build_model(config.model, 3, 0)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    pixels = np.random.default_rng(0).integers(0, 255, (BAGS, regions, 1, side, side, 3), np.uint8)
    position = np.zeros((BAGS, regions, 2), np.float32)
    label = np.arange(BAGS, dtype=np.int32) % 3
    bag = jax.device_put(Bag(pixels, np.ones((BAGS, regions, 1), bool), position, label, np.ones(BAGS, np.float32)))
    state = init_state(model, optimizer, config, mesh)
    step = build_step(model, optimizer, config, mesh)
    compiled, budget = step_budget(step, abstract_state(model, optimizer, config, mesh), bag)
    jax.block_until_ready(state)
    before = bytes_in_use()
    jax.block_until_ready(compiled(state, bag))
    return budget.temporary, peak_bytes() - before


def bytes_in_use() -> int:
    """The memory in use on the device; on a CPU, by this process."""
    return resident("VmRSS") if ON_CPU else jax.devices()[0].memory_stats()["bytes_in_use"]


def peak_bytes() -> int:
    """The largest memory in use so far."""
    return resident("VmHWM") if ON_CPU else jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def resident(field: str) -> int:
    """The resident memory (VmRSS) of this process or its peak (VmHWM), in bytes. The peak of getrusage includes the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured_apart(size: tuple) -> str:
    """The output of a process of its own that measures one size."""
    command = [sys.executable, __file__, *map(str, size)]
    return subprocess.run(command, env=os.environ | PROMPT, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    rows = []
    with ThreadPoolExecutor(1 if ON_CPU else 5) as pool:
        sizes = [(REGION_FACTOR * regions, *others) for regions, *others in SIZES]
        outputs = list(pool.map(measured_apart, sizes))
    for (regions, side, remat, micro_batches), output in zip(sizes, outputs, strict=True):
        predicted, measured = (int(value) / 2**20 for value in output.split())
        batches = f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''}"
        name = f"{BAGS} bags of {regions} tiles of {side} px in {batches}, remat {remat}"
        rows += [
            Row(f"{name}: predicted", predicted, "MiB"),
            Row(f"{name}: measured", measured, "MiB", measured / predicted, "predicted"),
        ]
    about = (
        "Memory of a training step: predicted by the compiled program, compared with the measured peak.\n\n"
        "* The default model on random tiles.\n"
        "* Predicted: the memory analysis of the compiled program; nothing is allocated for it.\n"
        "* Measured: the memory that a step adds in a fresh process to parameters, optimiser state and bags.\n"
    )
    record("memory", "python tools/bench_memory.py", rows, about + (ABOUT_CPU if ON_CPU else ABOUT_GPU))


ABOUT_CPU = (
    "* On the CPU this is resident memory. The C library is set to return freed memory at once: by default it keeps some for"
    " later, and the smallest steps then take up to 1.4 times the prediction.\n"
    "* The difference is the runtime's own memory, about 10 MiB in the first step of a process. The smallest step therefore misses the"
    " target of 10 %."
)
ABOUT_GPU = (
    "* On the GPU this is the memory that JAX's allocator has handed out. Its blocks may be larger than requested.\n"
    "* The peak includes trials of the compiler, up to 430 MiB. Steps of an eighth of these sizes rose to that peak, although"
    " their prediction was smaller."
)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(*measure(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
    else:
        main()
