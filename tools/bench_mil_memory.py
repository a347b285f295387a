"""Memory of a training step through the encoder against the size of the bag, and one whole slide of 10,000 tiles."""

from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from record import Row, peak_memory_mib, record

from crcjax.config import get_config
from crcjax.models.mil import build_model

TILE_PX, COUNTS = 256, (1_000, 4_000, 10_000)


def main() -> None:
    config = get_config().model
    graph, params = nnx.split(build_model(config, 3, 0))
    optimizer = optax.adamw(1e-3)

    @partial(jax.jit, donate_argnums=0)
    def step(state: tuple, pixels: jax.Array, mask: jax.Array) -> tuple:
        params, moments = state

        def loss(params: nnx.State) -> jax.Array:
            logits = nnx.merge(graph, params)(pixels, mask).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([1])).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    state = (params, optimizer.init(params))
    programs, temporary, rows = {}, {}, []
    for count in COUNTS:
        pixels = jax.ShapeDtypeStruct((1, count, 1, TILE_PX, TILE_PX, 3), jnp.uint8)
        programs[count] = step.lower(state, pixels, jax.ShapeDtypeStruct((1, count, 1), bool)).compile()
        temporary[count] = programs[count].memory_analysis().temp_size_in_bytes
        rows.append(Row(f"temporary memory of a step, {count:,} tiles", temporary[count] / 2**20, "MiB"))
    fewest, most = COUNTS[0], COUNTS[-1]
    slope = (temporary[most] - temporary[fewest]) / (most - fewest)
    rows.append(Row("slope", slope, "bytes a tile", slope / (4 * config.features), "a tile's features"))
    some = np.random.default_rng(0).integers(0, 256, (100, 1, TILE_PX, TILE_PX, 3), np.uint8)
    pixels = jnp.asarray(np.tile(some, (most // 100, 1, 1, 1, 1))[None])
    begun = time.perf_counter()
    _, loss = jax.block_until_ready(programs[most](state, pixels, jnp.ones((1, most, 1), bool)))
    assert np.isfinite(loss)
    rows.append(Row(f"a step on {most:,} tiles", time.perf_counter() - begun, "s"))
    rows.append(Row("largest memory of the process, pixels included", peak_memory_mib(), "MiB"))
    note = (
        f"The compact encoder and gated attention, one bag of tiles of {TILE_PX} px, {config.encode_regions} encoded at a time"
        " (config.model.encode_regions). Temporary memory is what the compiler counts of the program beside pixels and parameters."
    )
    record("mil_memory", "python tools/bench_mil_memory.py", rows, note)


if __name__ == "__main__":
    main()
