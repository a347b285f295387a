"""Seconds per slide and stage for synthetic slides of 10,240 to 102,400 px a side, beside the limits of decoding and encoding.

    python tools/bench_slide_sizes.py OUT

OUT/10240.svs and OUT/20480.svs are painted (in minutes) unless they exist; the larger slides repeat the latter.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import gigapixel
import numpy as np
import simplejpeg
import tifffile
from campaign_predict import trained_run
from record import Row, peak_memory_mib, record

from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.slides.tiling.plan import plan_tiles
from crcjax.slides.wsi.slide import open_slide
from crcjax.validation.predictions_table import STAGES

# The side of each slide in parts of PART_PX; the first is painted in its own size.
SIDES_PX, PART_PX = (10_240, 40_960, 102_400), 20_480
ENCODED_CHUNKS = 4


def main(out: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(out / "cache")
    cores = len(os.sched_getaffinity(0))
    slides = [gigapixel.painted(out / f"{SIDES_PX[0]}.svs", SIDES_PX[0], cores)]
    part = gigapixel.painted(out / f"{PART_PX}.svs", PART_PX, cores)
    for side in SIDES_PX[1:]:
        gigapixel.TIMES = side // PART_PX
        path = out / f"{side}.svs"
        slides.append(path if path.exists() else gigapixel.laid_out(part, path))
    trained = out / "training" / "run"
    predictor = Predictor(trained if trained.exists() else trained_run(out / "training"))
    encode_s = encoder_core_seconds(predictor)
    rows = []
    for side, path in zip(SIDES_PX, slides, strict=True):
        job = [PredictJob(path.stem, path.stem, path)]
        predict_slides(predictor, job, out / "compiled" / str(time.monotonic()))
        start, cores_start = time.monotonic(), time.process_time()
        (row,) = predict_slides(predictor, job, out / "predictions" / str(time.monotonic()))
        seconds, core_seconds = time.monotonic() - start, time.process_time() - cores_start
        regions, decode_s = decoding_core_seconds(predictor, path)
        limit = decode_s + regions * encode_s
        name = f"{side:,} px a side"
        rows += [
            Row(f"{name}: tiles", float(regions), ""),
            Row(f"{name}: in all", seconds, "s"),
            *(Row(f"{name}: {stage}", row.seconds[stage], "s") for stage in STAGES[1:] if stage in row.seconds),
            Row(f"{name}: core-seconds", core_seconds, "core-s"),
            Row(f"{name}: decoding and encoding alone", limit, "core-s", limit / core_seconds, "core-seconds"),
        ]
    rows.append(Row("peak memory", peak_memory_mib(), "MiB"))
    about = (
        "Seconds of synthetic slides of 10,240 to 102,400 px a side, beside the core-seconds of decoding and encoding.\n\n"
        "* 0.25 µm per pixel; the demo's model at 10x, compiled before; every slide alone, read from the page cache.\n"
        "* The limit is the core-seconds in which libjpeg-turbo decodes the JPEG tiles under the regions, and the encoder alone encodes"
        " them. The plan, quality control, pooling and pictures are not part of it.\n"
        "* The machine had other work, which lengthens the seconds several times and hardly changes the core-seconds.\n"
        "* `read` is the time from the first to the last decoded tile, with encoding beside it; `encode` what encoding takes after it."
    )
    record("slide_sizes", "python tools/bench_slide_sizes.py OUT", rows, about)


def encoder_core_seconds(predictor: Predictor) -> float:
    """Core-seconds of the encoder for one region."""
    member, params = predictor.members[0], predictor.tiling
    pixels = np.random.default_rng(0).integers(
        0, 255, (member.chunk, params.slots, params.tile_px, params.tile_px, 3), np.uint8
    )
    np.asarray(member.encode(pixels, [None], [len(pixels)]))
    start = time.process_time()
    for _ in range(ENCODED_CHUNKS):
        np.asarray(member.encode(pixels, [None], [len(pixels)]))
    return (time.process_time() - start) / (ENCODED_CHUNKS * member.chunk)


def decoding_core_seconds(predictor: Predictor, path: Path) -> tuple[int, float]:
    """The regions of a slide, and the core-seconds in which libjpeg-turbo decodes the JPEG tiles under them."""
    with open_slide(path) as slide:
        plan = plan_tiles(slide, predictor.tiling)
        downsample = slide.info.level_downsamples[plan.scale.level]
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[plan.scale.level]
        assert isinstance(page, tifffile.TiffPage)
        columns, tables = -(-page.imagewidth // page.tilewidth), page.jpegtables
        side, places = round(plan.region_px / downsample), set()
        for x, y in np.rint(plan.origin / downsample).astype(int).tolist():
            right, below = min(x + side, page.imagewidth) - 1, min(y + side, page.imagelength) - 1
            for row in range(y // page.tilelength, below // page.tilelength + 1):
                places |= {row * columns + column for column in range(x // page.tilewidth, right // page.tilewidth + 1)}
        streams = []
        for place in sorted(places):
            tiff.filehandle.seek(page.dataoffsets[place])
            stream = tiff.filehandle.read(page.databytecounts[place])
            streams.append(tables[:-2] + stream[2:] if tables else stream)
    start = time.process_time()
    for stream in streams:
        simplejpeg.decode_jpeg(stream, "RGB")
    return len(plan.origin), time.process_time() - start


if __name__ == "__main__":
    main(Path(sys.argv[1]))
