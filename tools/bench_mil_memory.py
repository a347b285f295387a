"""The memory of the training step through the encoder by the size of the bag, and one step on a slide of 10,000 tiles."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from record import Row, peak_memory_mib, record

from crcjax.config import get_config
from crcjax.data.bags import Bag
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import device_mesh
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import abstract_state, build_step, init_state

TILE_PX, COUNTS = 256, (1_000, 4_000, 10_000)


def main() -> None:
    rows = [row for mil in ("gated_abmil", "hierarchical") for row in _rows(mil)]
    rows.append(Row("largest memory of the process, pixels included", peak_memory_mib(), "MiB"))
    about = (
        "Memory of the training step through the compact encoder, by the number of tiles in the bag.\n\n"
        f"* The step of `crcjax.train.step` on one bag of {TILE_PX} px tiles, encoded"
        f" {get_config().model.encode_regions} at a time (`config.model.encode_regions`).\n"
        "* Temporary memory: the compiler's count for the program, without pixels, parameters and optimiser state."
    )
    record("mil_memory", "python tools/bench_mil_memory.py", rows, about)


def _rows(mil: str) -> list[Row]:
    config = get_config()
    config.data.batch_size, config.model.mil = 1, mil
    mesh, model = device_mesh(config), build_model(config.model, 3, 0)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    step, state = build_step(model, optimizer, config, mesh), abstract_state(model, optimizer, config, mesh)
    programs, temporary, rows = {}, {}, []
    for count in COUNTS:
        programs[count] = step.lower(state, jax.eval_shape(lambda count=count: _bag(count))).compile()
        temporary[count] = programs[count].memory_analysis().temp_size_in_bytes
        rows.append(Row(f"{mil}: temporary memory of a step, {count:,} tiles", temporary[count] / 2**20, "MiB"))
    fewest, most = COUNTS[-2:]
    slope = (temporary[most] - temporary[fewest]) / (most - fewest)
    against = "a tile's features"
    rows.append(
        Row(f"{mil}: slope from {fewest:,} tiles", slope, "bytes/tile", slope / (4 * config.model.features), against)
    )
    given = init_state(model, optimizer, config, mesh), jax.block_until_ready(jax.jit(lambda: _bag(most))())
    begun = time.perf_counter()
    _, metrics = jax.block_until_ready(programs[most](*given))
    assert np.isfinite(metrics["loss"])
    return [*rows, Row(f"{mil}: a step on {most:,} tiles", time.perf_counter() - begun, "s")]


def _bag(count: int) -> Bag:
    shape = (1, count, 1, TILE_PX, TILE_PX, 3)
    pixels = jax.lax.broadcasted_iota(jnp.uint8, shape, 1) + jax.lax.broadcasted_iota(jnp.uint8, shape, 4)
    position = jnp.stack([jnp.arange(count) % 100, jnp.arange(count) // 100], axis=-1)[None].astype(jnp.float32)
    return Bag(pixels, jnp.ones((1, count, 1), bool), position, jnp.ones(1, jnp.int32), jnp.ones(1))


if __name__ == "__main__":
    main()
