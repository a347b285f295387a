"""The time and memory of tiling synthetic slides of 60,000 and 102,400 px a side at three magnifications.

    python tools/gigapixel.py OUT

OUT/giga.svs and OUT/part.svs are painted (in minutes) unless they exist. The larger slide repeats OUT/part.svs 5 x 5 times.
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
    """Paints a slide unless it exists."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        paint_slide(path, SlideSpec("stromal", 0, size_px=(side, side), mpp=MPP), workers=cores)
    return path


def laid_out(part: Path, path: Path) -> Path:
    """Repeats a painted slide TIMES x TIMES times, tile by tile without decoding. Its sides must be whole tiles."""
    with tifffile.TiffFile(part) as small, tifffile.TiffWriter(path, bigtiff=True) as large:
        handle = small.filehandle
        for page in small.pages:
            columns = page.imagewidth // page.tilewidth
            # The remaining levels are small, and a slide does not need them.
            if page.imagewidth % page.tilewidth:
                break
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
    """The time and memory of tiling a slide."""
    store = out / f"store-{slide.stem}-{workers}"
    shutil.rmtree(store, ignore_errors=True)
    with PeakMemory(largest_worker_mib, 0.2) as memory:
        start = time.monotonic()
        (outcome,) = tile_slides([TileJob("giga", slide)], store, TilingParams(MAGNIFICATIONS), workers=workers)
        seconds = time.monotonic() - start
    assert outcome.status == "tiled", outcome
    tiles = int(open_store(store, "giga").mask.sum())
    stored = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    name = f"{side:,} px a side, {workers} core{'s' if workers > 1 else ''}"
    return [
        Row(f"{name}: tiling", seconds, "s"),
        Row(f"{name}: tiling", tiles / seconds, "tiles/s"),
        Row(f"{name}: peak memory of the worker", memory.mib, "MiB", memory.mib / 2048, "2 GiB"),
        Row(f"{name}: store", stored / 2**20, "MiB", stored / slide.stat().st_size, "the slide file"),
        Row(f"{name}: tiles stored", float(tiles), ""),
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
    about = (
        f"Tiling synthetic slides of {SIDE_PX:,} and {PART_PX * TIMES:,} px a side: time, memory and size of the store.\n\n"
        f"* {MPP} µm per pixel; {', '.join(MAGNIFICATIONS)}; tiles of 256 px.\n"
        f"* The larger slide repeats a painted slide of {PART_PX:,} px {TIMES} x {TIMES} times.\n"
        "* One worker tiles a slide. With 2 cores it decodes in 2 threads."
    )
    record("gigapixel", "python tools/gigapixel.py runs/gigapixel", rows, about)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
