"""A painted slide of 60,000 x 60,000 px through tiling at three magnifications: time and peak memory.

    python tools/gigapixel.py OUT

OUT/giga.svs is painted (synthetic, minutes) unless it is there.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from record import PeakMemory, Row, record

from crcjax.slides.executor import TileJob, tile_slides
from crcjax.slides.painter import SlideSpec, paint_slide
from crcjax.slides.store import open_store
from crcjax.slides.tiling import TilingParams

SIDE_PX, MPP = 60_000, 0.25
MAGNIFICATIONS = ("10x", "20x", "40x")


def main(out: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    slide = out / "giga.svs"
    if not slide.exists():
        out.mkdir(parents=True, exist_ok=True)
        paint_slide(slide, SlideSpec("stromal", 0, size_px=(SIDE_PX, SIDE_PX), mpp=MPP), workers=cores)
    rows = []
    for workers in dict.fromkeys((1, cores)):
        store = out / f"store{workers}"
        shutil.rmtree(store, ignore_errors=True)
        with PeakMemory() as memory:
            start = time.monotonic()
            (outcome,) = tile_slides([TileJob("giga", slide)], store, TilingParams(MAGNIFICATIONS), workers=workers)
            seconds = time.monotonic() - start
        assert outcome.status == "tiled", outcome
        found = open_store(store, "giga")
        stored = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        name = f"{workers} core{'s' if workers > 1 else ''}"
        rows += [
            Row(f"tiling, {name}", seconds, "s"),
            Row(f"tiling, {name}", int(found.mask.sum()) / seconds, "tiles/s"),
            Row(f"peak memory of the worker, {name}", memory.worker_mib, "MiB", memory.worker_mib / 2048, "2 GiB"),
        ]
    rows += [
        Row("tiles kept", float(found.mask.sum()), ""),
        Row("store", stored / 2**20, "MiB", stored / slide.stat().st_size, "the slide file"),
    ]
    note = f"A synthetic slide of {SIDE_PX:,} x {SIDE_PX:,} px at {MPP} µm per pixel, {', '.join(MAGNIFICATIONS)}, tiles of 256 px."
    record("gigapixel", "python tools/gigapixel.py runs/gigapixel", rows, note)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
