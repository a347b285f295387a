"""What a compiled step says it takes, beside what it takes: activations and gradients against the peak of memory.

Each size is a process of its own, since memory that was used before would hide what a step adds to it.
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
# What is freed is returned at once, so that the memory held is the memory used.
PROMPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PROMPT |= {"MALLOC_MMAP_MAX_": "1000000", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
BAGS = 8
SIZES = (  # regions, px of a tile's side, config.model.remat, parts
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
TIMES = 1 if ON_CPU else 8  # as many regions


def measure(regions: int, side: int, remat: str, parts: int) -> tuple[int, int]:
    """Bytes that the step's activations and gradients are said to take, and bytes that the peak rises by as it runs."""
    config = get_config()
    config.data.batch_size, config.data.regions_per_bag = BAGS, regions
    config.model.remat, config.train.micro_batches = remat, parts
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
    before = held()
    jax.block_until_ready(compiled(state, bag))
    return budget.temporary, peak() - before


def held() -> int:
    """Bytes that are in use: of the device, on a CPU of this process."""
    return resident("VmRSS") if ON_CPU else jax.devices()[0].memory_stats()["bytes_in_use"]


def peak() -> int:
    """The most bytes that were in use so far."""
    return resident("VmHWM") if ON_CPU else jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def resident(field: str) -> int:
    """Bytes of memory that this process holds (VmRSS) or has held at most (VmHWM; getrusage's peak begins with the parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def apart(size: tuple) -> str:
    """What a process of its own prints of a size."""
    command = [sys.executable, __file__, *map(str, size)]
    return subprocess.run(command, env=os.environ | PROMPT, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    rows = []
    with ThreadPoolExecutor(1 if ON_CPU else 5) as pool:
        sizes = [(TIMES * regions, *others) for regions, *others in SIZES]
        outputs = list(pool.map(apart, sizes))
    for (regions, side, remat, parts), output in zip(sizes, outputs, strict=True):
        said, taken = (int(value) / 2**20 for value in output.split())
        name = f"{BAGS} bags of {regions} tiles of {side} px in {parts} part{'s' if parts > 1 else ''}, remat {remat}"
        rows += [
            Row(f"{name}: said", said, "MiB"),
            Row(f"{name}: measured", taken, "MiB", taken / said, "what the step says"),
        ]
    note = (
        "The default model on random tiles. Said: the compiled program's own account, with nothing allocated."
        " Measured: by how much the step raises the memory of a fresh process over what it holds already, its parameters,"
        " optimiser and bags."
    )
    record("memory", "python tools/bench_memory.py", rows, note + (CPU_NOTE if ON_CPU else GPU_NOTE))


CPU_NOTE = (
    " On the CPU this is the resident memory, with the C library set to return at once what is freed: by default it keeps some"
    " for later, and the smallest steps rise by up to 1.4 of what is said. What lies above is the runtime's own, about 10 MiB as a"
    " process runs its first step, so that the smallest step misses the 10 % that were aimed at."
)
GPU_NOTE = (
    " On the GPU this is what JAX's allocator has handed out, in blocks that may be larger than what is asked for, and the peak"
    " counts what compiling tried too, 430 MiB or less: steps of an eighth of these sizes rose to that, where they say less."
)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(*measure(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
    else:
        main()
