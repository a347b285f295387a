"""The speed of the demo's training step with and without the loader, and the peak memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from record import Row, peak_memory_mib, record

from crcjax.data.bags import Bag
from crcjax.data.cohort import load_cohort
from crcjax.data.loader import train_batches
from crcjax.demo import SIZE_PX, demo_config
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import device_mesh
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.synthetic.painter import paint_cohort
from crcjax.slides.tiling.plan import TilingParams
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import build_step, init_state

STEPS = 12


def seconds_per_step(step, state, bags: Iterator[Bag]) -> float:
    """The mean over STEPS steps, after one that compiles."""
    state, _ = jax.block_until_ready(step(state, next(bags)))
    start = time.perf_counter()
    for _ in range(STEPS):
        state, _ = step(state, next(bags))
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / STEPS


def matrix_flops_per_s(side: int = 1024) -> float:
    """The speed of the device on a product of two square matrices."""
    product, a = jax.jit(jnp.matmul), jnp.ones((side, side))
    product(a, a).block_until_ready()
    start = time.perf_counter()
    for _ in range(20):
        product(a, a).block_until_ready()
    return 20 * 2 * side**3 / (time.perf_counter() - start)


def main() -> None:
    config = demo_config()
    with tempfile.TemporaryDirectory() as folder:
        table = paint_cohort(Path(folder), {"train": 9}, size_px=SIZE_PX)
        cohort = load_cohort(table, config.data.classes)
        tile_slides(
            [TileJob(row.slide_id, row.path) for row in cohort.rows if row.path],
            Path(folder) / "store",
            TilingParams(("10x",)),
        )
        config.data.store, config.data.cohort = f"{folder}/store", str(table)
        mesh = device_mesh()
        model = build_model(config.model, len(cohort.classes), 0)
        optimizer = build_optimizer(config.optimizer, config.train.steps)
        step = build_step(model, optimizer, config, mesh)
        bags = train_batches(cohort, config, mesh, 0)
        bag = next(bags)
        step_s = seconds_per_step(step, init_state(model, optimizer, config, mesh), iter([bag] * (STEPS + 1)))
        with_loader_s = seconds_per_step(step, init_state(model, optimizer, config, mesh), bags)
        # XLA counts the compiled step's own operations.
        cost = step.lower(init_state(model, optimizer, config, mesh), bag).compile().cost_analysis()
    tiles = config.data.batch_size * config.data.regions_per_bag
    flops = cost["flops"] / step_s
    rows = [
        Row("the step alone", 1 / step_s, "steps/s"),
        Row("with the loader", 1 / with_loader_s, "steps/s", step_s / with_loader_s, "the step alone"),
        Row("with the loader", tiles / with_loader_s, "tiles/s"),
        Row("with the loader", 3600 * config.data.batch_size / with_loader_s, "slides/hour"),
        Row("the step's operations", flops / 1e9, "GFLOP/s", flops / matrix_flops_per_s(), "a 1024 x 1024 product"),
        Row("peak memory", peak_memory_mib(), "MiB"),
    ]
    about = (
        "The demo's training step with and without the loader.\n\n"
        f"{config.data.batch_size} bags of {config.data.regions_per_bag} tiles of 256 px on {jax.devices()[0].platform}."
    )
    record("train", "python tools/bench_train.py", rows, about)


if __name__ == "__main__":
    main()
