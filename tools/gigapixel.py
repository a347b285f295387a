"""Painted slides of 60,000 x 60,000 px, and of 102,400 x 102,400, through tiling at three magnifications: time and memory.

    python tools/gigapixel.py OUT

OUT/giga.svs is painted (synthetic, minutes) unless it is there; the larger one is OUT/part.svs laid 5 x 5 times.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tifffile
from record import PeakMemory, Row, largest_worker_mib, record

from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.tile_store import open_store
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide
from crcjax.slides.tiling.plan import TilingParams

SIDE_PX, PART_PX, TIMES, MPP = 60_000, 20_480, 5, 0.25
MAGNIFICATIONS = ("10x", "20x", "40x")


def painted(path: Path, side: int, cores: int) -> Path:
    """The slide, painted unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        paint_slide(path, SlideSpec("stromal", 0, size_px=(side, side), mpp=MPP), workers=cores)
    return path


def laid_out(part: Path, path: Path) -> Path:
    """A slide of TIMES x TIMES copies of a painted one, tile by tile without decoding; its sides are whole tiles."""
    with tifffile.TiffFile(part) as small, tifffile.TiffWriter(path, bigtiff=True) as large:
        handle = small.filehandle
        for page in small.pages:
            columns = page.imagewidth // page.tilewidth
            if page.imagewidth % page.tilewidth:
                break  # the levels that are left are small; a slide may do without
            places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
            rows = [places[i : i + columns] * TIMES for i in range(0, len(places), columns)] * TIMES

            def tiles(rows: list[list[tuple[int, int]]] = rows) -> Iterator[bytes]:
                for offset, size in (place for row in rows for place in row):
                    handle.seek(offset)
                    yield handle.read(size)

            large.write(
                tiles(),
                shape=(page.imagelength * TIMES, page.imagewidth * TIMES, 3),
                dtype="uint8",
                tile=(page.tilelength, page.tilewidth),
                photometric=page.photometric,
                compression=page.compression,
                subsampling=page.subsampling,
                description=page.description,
                metadata=None,
                software=False,
            )
    return path


def rows_of(slide: Path, side: int, out: Path, workers: int) -> list[Row]:
    """Tiling's time and memory."""
    store = out / f"store-{slide.stem}-{workers}"
    shutil.rmtree(store, ignore_errors=True)
    with PeakMemory(largest_worker_mib, 0.2) as memory:
        start = time.monotonic()
        (outcome,) = tile_slides([TileJob("giga", slide)], store, TilingParams(MAGNIFICATIONS), workers=workers)
        seconds = time.monotonic() - start
    assert outcome.status == "tiled", outcome
    kept = int(open_store(store, "giga").mask.sum())
    stored = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    name = f"{side:,} px a side, {workers} core{'s' if workers > 1 else ''}"
    return [
        Row(f"{name}: tiling", seconds, "s"),
        Row(f"{name}: tiling", kept / seconds, "tiles/s"),
        Row(f"{name}: peak memory of the worker", memory.mib, "MiB", memory.mib / 2048, "2 GiB"),
        Row(f"{name}: store", stored / 2**20, "MiB", stored / slide.stat().st_size, "the slide file"),
        Row(f"{name}: tiles kept", float(kept), ""),
    ]


def main(out: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    large = laid_out(painted(out / "part.svs", PART_PX, cores), out / "large.svs")
    giga = painted(out / "giga.svs", SIDE_PX, cores)
    rows = [
        row
        for slide, side in ((giga, SIDE_PX), (large, PART_PX * TIMES))
        for workers in dict.fromkeys((1, cores))
        for row in rows_of(slide, side, out, workers)
    ]
    note = (
        f"Synthetic slides at {MPP} µm per pixel, {', '.join(MAGNIFICATIONS)}, tiles of 256 px; the larger one is a painted"
        f" one of {PART_PX:,} px laid {TIMES} x {TIMES} times. A slide is one worker's: with 2 cores it decodes in 2 threads."
    )
    record("gigapixel", "python tools/gigapixel.py runs/gigapixel", rows, note)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
