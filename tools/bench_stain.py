"""Stain normalisation compared with torchstain on the same tiles and cores, in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import torchstain
from record import Row, record

from crcjax.slides.stain.methods import METHODS, normalise
from crcjax.slides.synthetic.painter import SITES, SlideSpec, paint_block

TILES, SIDE, REPEATS = 256, 256, 5


def _seconds(work: Callable[[], object]) -> float:
    """The best of several runs, after one that compiles."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Measures tiles per second on a batch of synthetic tiles, by both."""
    block = paint_block(SlideSpec("stromal", 3, SITES[1]), 500, 500, 16 * SIDE, 16 * SIDE)
    tiles = block.reshape(16, SIDE, 16, SIDE, 3).swapaxes(1, 2).reshape(TILES, SIDE, SIDE, 3)
    # torchstain fails on a tile of background.
    stained = tiles[(tiles.mean(axis=3) < 200).mean(axis=(1, 2)) > 0.2]
    tiles = np.ascontiguousarray(np.resize(stained, tiles.shape))
    sample = tiles.reshape(-1, 3)[:: TILES * 3]
    white = np.full(3, 240.0, np.float32)
    rows = []
    of_torch = [torch.from_numpy(tile).permute(2, 0, 1).contiguous() for tile in tiles]

    def theirs(normaliser: object) -> None:
        for tile in of_torch:
            normaliser.normalize(tile)  # type: ignore[attr-defined]

    def theirs_macenko(normaliser: object) -> None:
        for tile in of_torch:
            normaliser.normalize(tile, stains=False)  # type: ignore[attr-defined]

    macenko = torchstain.normalizers.MacenkoNormalizer(backend="torch")
    reinhard = torchstain.normalizers.ReinhardNormalizer(backend="torch", method=None)
    reinhard.fit(of_torch[0])
    speeds = {
        "macenko": TILES / _seconds(lambda: theirs_macenko(macenko)),
        "reinhard": TILES / _seconds(lambda: theirs(reinhard)),
    }
    for method, speed in speeds.items():
        rows.append(Row(f"torchstain {method}, which fits every tile", speed, "tiles/s"))
    for method, (fit, reference) in METHODS.items():
        source = fit(sample, np.ones(len(sample), bool), white)
        device = jax.device_put(tiles)

        def ours(method=method, source=source, reference=reference, device=device) -> None:
            jax.block_until_ready(normalise(method, device, source, reference))

        speed = TILES / _seconds(ours)
        compared = "reinhard" if method == "reinhard" else "macenko"
        rows.append(Row(f"crcjax, {method}", speed, "tiles/s", speed / speeds[compared], f"torchstain {compared}"))
        fitting = _seconds(lambda fit=fit: jax.block_until_ready(fit(sample, np.ones(len(sample), bool), white)))
        rows.append(Row(f"crcjax, the fit of {method}, once per slide", fitting * 1e3, "ms"))
    about = (
        "Stain normalisation, compared with torchstain.\n\n"
        f"Batches of {TILES} tiles of {SIDE} px on {torch.get_num_threads()} threads. crcjax fits once per slide; torchstain fits"
        " every tile, as its interface requires."
    )
    record("stain", "python tools/bench_stain.py", rows, about)


if __name__ == "__main__":
    main()
