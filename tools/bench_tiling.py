"""Tiling with the store written, beside OpenSlide and bare libjpeg-turbo over the same tiles on the same cores."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import openslide
import psutil
import simplejpeg
import tifffile
from record import PeakMemory, Row, largest_worker_mib, record

from crcjax.slides.jobs.worker_pool import run_jobs
from crcjax.slides.preprocess.tile_slides import TileJob, check_slide_ids, tile_slides
from crcjax.slides.store.tile_pixels import shard_regions
from crcjax.slides.store.tile_store import StoreWriter
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide
from crcjax.slides.tiling.plan import TilingParams, plan_tiles, slot_boxes
from crcjax.slides.tiling.read import native_square, read_regions
from crcjax.slides.wsi.slide import open_slide

SIZE_PX = (16384, 12288)
SLIDES = 4  # a core
# Of two cores, from raw pixels to tiles, measured on another machine of the same size.
OTHERS = {"tiatoolbox at 0.5 mpp": 412.0, "OpenSlide read_region on 2 threads": 922.0, "STAMP at 0.5 mpp": 93.0}
CORES = sorted(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Reading:
    slide: Path
    boxes: list[tuple[int, int, int]]  # x, y and side of every tile, in level-0 px


def read_with_openslide(reading: Reading) -> int:
    """Reads the slide's tiles and drops them."""
    with openslide.OpenSlide(reading.slide) as slide:
        for x, y, side in reading.boxes:
            np.asarray(slide.read_region((x, y), 0, (side, side)))[..., :3]
    return len(reading.boxes)


def decode_with_libjpeg_turbo(reading: Reading) -> float:
    """Decodes the slide's own tiles that lie under the tiles, streams in memory, pixels dropped; returns the seconds."""
    with tifffile.TiffFile(reading.slide) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        across, side = -(-page.imagewidth // page.tilewidth), page.tilewidth
        own = {(y // side) * across + x // side for x, y, _ in reading.boxes}
        pieces = [(page.dataoffsets[index], page.databytecounts[index]) for index in sorted(own)]
        tables = page.jpegtables
    with open(reading.slide, "rb") as file:
        streams = [os.pread(file.fileno(), count, offset) for offset, count in pieces]
    if tables:
        streams = [tables[:-2] + stream[2:] for stream in streams]
    start = time.monotonic()
    for stream in streams:
        simplejpeg.decode_jpeg(stream, "RGB")
    return time.monotonic() - start


def main() -> None:
    rows = []
    # Starts the server of worker processes, as `crcjax tile` would: the painter would start it with less in it.
    list(run_jobs(check_slide_ids, [[]], 1))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        painted = paint_slide(folder / "slide0.svs", SlideSpec("immune", 0, size_px=SIZE_PX), workers=len(CORES))
        slides = [painted]
        for i in range(1, SLIDES * len(CORES)):
            slides.append(folder / f"slide{i}.svs")
            slides[-1].hardlink_to(painted)
        for cores in dict.fromkeys((1, len(CORES))):
            for magnifications in (("20x",), ("10x", "20x")):
                rows += _measure(slides[: SLIDES * cores], folder, cores, magnifications)
        rows += [Row(f"{name}, measured on another machine", speed, "tiles/s") for name, speed in OTHERS.items()]
        os.sched_setaffinity(0, CORES[:1])
        rows += _stages(painted, folder) + _decodes(painted)
    note = (
        f"Painted slides of {SIZE_PX[0]} x {SIZE_PX[1]} px, {SLIDES} a core, JPEG 4:2:0 tiles of 256 px. Ours opens, finds the"
        " tissue, decodes, scores, compresses and writes, from the call to the published stores; OpenSlide only calls"
        " read_region, tile by tile. Each worker's start and each slide's opening, tissue and publishing count in full. The"
        " last rows say where a core's time goes, at 20x, where tiles are the slide's own streams: they are judged by a"
        " decode to half the size, so `decode` is of that."
        " Below: other ways to decode, alone. The aim of 0.7 of bare libjpeg-turbo is missed: reading the bits takes half of a"
        " whole decode, whatever is computed of them, and scores and writing take as long as the decode. A quarter of the size"
        " would lose the detail of 1 µm that sharpness is judged by, grey the colours; fast cosines save less than they vary;"
        " scores in NumPy on stacks of whole tiles took longer than tile by tile. Of a 10x tile the JPEG"
        " encoder, in 4:4:4, takes another 450 µs."
    )
    record("tiling", "python tools/bench_tiling.py", rows, note)


def _measure(slides: list[Path], folder: Path, cores: int, magnifications: tuple[str, ...]) -> list[Row]:
    params = TilingParams(magnifications)
    with open_slide(slides[0]) as slide:
        plan = plan_tiles(slide, params)
    region, slot = np.nonzero(plan.mask)
    slots = slot_boxes(params)[slot] * plan.region_px
    corners = plan.origin[region] + slots[:, :2]
    boxes = [(int(x), int(y), int(side)) for (x, y), side in zip(corners, slots[:, 2], strict=True)]
    store = folder / f"store-{cores}-{len(magnifications)}"
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):  # the server of worker processes too
        process.cpu_affinity(CORES[:cores])
    readings = [Reading(path, boxes) for path in slides]
    list(run_jobs(read_with_openslide, readings[:1], 1))  # warms the page cache
    start = time.monotonic()
    list(run_jobs(read_with_openslide, readings, cores))
    rival = time.monotonic() - start
    bare = sum(done.result for done in run_jobs(decode_with_libjpeg_turbo, readings, cores)) / cores
    with PeakMemory(largest_worker_mib, 0.2) as memory:
        start = time.monotonic()
        outcomes = tile_slides([TileJob(path.stem, path) for path in slides], store, params, workers=cores)
        ours = time.monotonic() - start
    assert all(outcome.status == "tiled" for outcome in outcomes), outcomes
    stored = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    tiles = len(boxes) * len(slides)
    per_tile = stored / sum(outcome.tiles for outcome in outcomes)
    name = f"{','.join(magnifications)}, {cores} core{'s' if cores > 1 else ''}"
    return [
        Row(f"tiling {name}", tiles / ours, "tiles/s", rival / ours, "openslide read_region"),
        Row(f"tiling {name}", tiles / ours, "tiles/s", bare / ours, "bare libjpeg-turbo"),
        Row(f"openslide {name}", tiles / rival, "tiles/s"),
        Row(f"store {name}", per_tile, "bytes/tile", per_tile / (params.tile_px**2 * 3), "raw RGB"),
        Row(f"peak memory of a worker {name}", memory.mib, "MiB"),
    ]


def _stages(path: Path, folder: Path) -> list[Row]:
    """Seconds of processor time of one slide at 20x by what they go to; the best of 3."""
    cv2.setNumThreads(1)  # as in a worker
    found: dict[str, float] = {}

    def spent(name: str, began: float) -> float:
        now = time.process_time()
        found[name] = min(found.get(name, np.inf), now - began)
        return now

    for _ in range(3):
        now = time.process_time()
        with open_slide(path) as slide:
            plan = plan_tiles(slide, TilingParams(("20x",)))
            now = spent("open, thumbnail, tissue", now)
            shards = range(0, len(plan.origin), step := shard_regions(plan.params))
            for region in range(len(plan.origin)):
                if stream := slide.jpeg_stream(*(square := native_square(slide, plan, region, 0))):
                    slide.shrunk_stream(stream, *square, 2)
            now = spent("decode", now)
            with StoreWriter(folder / "stages", path.stem, slide, plan, "jpeg") as writer:
                for first in shards:
                    last = min(first + step, len(plan.origin))
                    writer.write(first, read_regions(slide, plan, first, last, writer.pack))
                now = spent("decode, score, pack, write", now)
                writer.commit()
                spent("publish", now)
    rest = found["decode, score, pack, write"] - found["decode"]
    whole = found["open, thumbnail, tissue"] + found["decode, score, pack, write"] + found["publish"]
    names = {"open, thumbnail, tissue": found["open, thumbnail, tissue"], "decode": found["decode"]}
    names |= {"score, pack, write": rest, "publish": found["publish"]}
    return [
        Row(f"1 core, {name}", 1e6 * s / len(plan.origin), "µs/tile", s / whole, "all") for name, s in names.items()
    ]


def _decodes(path: Path) -> list[Row]:
    """Processor time of ways to decode 400 of the slide's own tiles at 20x; the best of 8."""
    ways = {
        "whole": {},
        "whole, fast cosines and upsampling": {"fastdct": True, "fastupsample": True},
        "half": {"shrink": 2},
        "half, fast cosines": {"shrink": 2, "fastdct": True},
        "half, grey": {"shrink": 2, "colorspace": "GRAY"},
        "quarter": {"shrink": 4},
        "eighth, grey: little but the bits": {"shrink": 8, "colorspace": "GRAY"},
    }
    with open_slide(path) as slide:
        plan = plan_tiles(slide, TilingParams(("20x",)))
        squares = (native_square(slide, plan, i, 0) for i in range(0, len(plan.origin), len(plan.origin) // 400))
        streams = [stream for square in squares if square and (stream := slide.jpeg_stream(*square))]
    seconds = dict.fromkeys(ways, np.inf)
    for _ in range(8):
        for name, way in ways.items():
            options: dict = {"colorspace": "RGB", "strict": True} | way
            shrink = options.pop("shrink", 1)
            start = time.process_time()
            for stream in streams:
                simplejpeg.decode_jpeg(
                    stream, min_height=256 // shrink, min_width=256 // shrink, min_factor=shrink, **options
                )
            seconds[name] = min(seconds[name], time.process_time() - start)
    return [
        Row(f"decode, {name}", 1e6 * s / len(streams), "µs/tile", s / seconds["whole"], "whole")
        for name, s in seconds.items()
    ]


if __name__ == "__main__":
    main()
