"""The speed and memory of painting synthetic slides. `--side 100000` paints one slide of ten gigapixels."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from record import PeakMemory, Row, record, shared_memory_mib

from crcjax.slides.synthetic.painter import SITES, SUBTYPES, SlideSpec, paint_cohort, paint_slide


def demo_rows(folder: Path, cores: int) -> list[Row]:
    """Slides of 3072 x 2560 px, one after the other and as a cohort."""
    size = (3072, 2560)
    # Each process computes the textures once.
    paint_slide(folder / "warm.svs", SlideSpec("immune", seed=0))
    start = time.perf_counter()
    for seed, subtype in enumerate(SUBTYPES):
        paint_slide(folder / "one.svs", SlideSpec(subtype, seed=seed, site=SITES[seed], size_px=size))
    one = len(SUBTYPES) * size[0] * size[1] / (time.perf_counter() - start) / 1e6
    with PeakMemory(shared_memory_mib, 0.02) as memory:
        start = time.perf_counter()
        paint_cohort(folder / "cohort", {"train": 24}, size_px=size)
        cohort = 24 * size[0] * size[1] / (time.perf_counter() - start) / 1e6
    return [
        Row(f"{size[0]} x {size[1]} px, one process", one, "MP/s"),
        Row(f"cohort of 24 such slides, {cores} processes", cohort, "MP/s", cohort / one, "one process"),
        Row("cohort, peak memory of all processes", memory.mib, "MiB"),
    ]


def large_rows(folder: Path, cores: int, side: int) -> list[Row]:
    """One large slide, its blocks painted by all cores."""
    with PeakMemory(shared_memory_mib, 0.02) as memory:
        start = time.perf_counter()
        path = paint_slide(folder / "large.svs", SlideSpec("stromal", 1, size_px=(side, side)), workers=cores)
        speed = side * side / (time.perf_counter() - start) / 1e6
    wide = f"{side} x {side} px"
    return [
        Row(f"{wide}, {cores} workers", speed, "MP/s"),
        Row(f"{wide}, peak memory of all processes", memory.mib, "MiB"),
        Row(f"{wide}, file", path.stat().st_size / 2**20, "MiB"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, help="side in px of one large slide, which is painted alone")
    side = parser.parse_args().side
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        rows = large_rows(Path(folder), cores, side or 12_000)
        rows += [] if side else demo_rows(Path(folder), cores)
    name = f"painter_{side}" if side else "painter"
    about = "Speed and memory of painting synthetic slides" + (f", one of {side:,} px a side." if side else ".")
    record(name, " ".join(["python", "tools/bench_painter.py", *sys.argv[1:]]), rows, about)


if __name__ == "__main__":
    main()
