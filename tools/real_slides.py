"""Every real slide through tiling and prediction, as one table.

    CRCJAX_REAL_DATA=FOLDER python tools/real_slides.py RUN OUT

RUN is a trained run (the demo's will do: it shows that the files go through, not what they are). Slides that do not
state their mpp are given 0.5, which is an assumption.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import tifffile
from bench_tiling import Reading, decode_with_libjpeg_turbo
from record import record

from crcjax.errors import SlideError
from crcjax.infer.pipeline import PredictJob, predict_slides
from crcjax.infer.predictor import Predictor
from crcjax.slides.executor import Outcome, TileJob, tile_slides
from crcjax.slides.reader import find_slides, open_slide, slide_id_of
from crcjax.slides.store import TileStore, open_store
from crcjax.slides.tiling import TilingParams

ASSUMED_MPP = 0.5
MAGNIFICATIONS = TilingParams(("10x", "20x", "40x"))


def main(run: Path, out: Path, data: Path) -> None:
    rows = []
    for folder in ("slides", "slides_refused"):
        paths = find_slides([data / folder])
        given = {path: _missing_mpp(path) for path in paths}
        jobs = [TileJob(slide_id_of(path), path, given[path]) for path in paths]
        tiled = tile_slides(jobs, out / "store", MAGNIFICATIONS, workers=1)
        predictor = Predictor(run)
        predict = [PredictJob(job.slide_id, job.slide_id, job.path, job.mpp) for job in jobs]
        predicted = predict_slides(predictor, predict, out / folder)
        rows += [
            _row(folder, job, out / "store", outcome, row)
            for job, outcome, row in zip(jobs, tiled, predicted, strict=True)
        ]
    command = "CRCJAX_REAL_DATA=… python tools/real_slides.py runs/demo/run runs/real"
    note = f"mpp marked * was not in the file and assumed to be {ASSUMED_MPP}. Seconds on one worker."
    record("real_slides", command, rows, note)


def _missing_mpp(path: Path) -> float | None:
    try:
        open_slide(path).close()
    except SlideError as error:
        return ASSUMED_MPP if error.status == "mpp_missing" else None
    return None


def _row(folder: str, job: TileJob, store: Path, outcome: Outcome, predicted: dict) -> dict:
    row: dict = {"folder": folder, "slide": job.path.name}
    shown = ("format", "size", "mpp", "mpp from", *MAGNIFICATIONS.magnifications, "verdict", "libjpeg-turbo s", "ratio")
    row |= dict.fromkeys(shown, "")
    if outcome.succeeded:
        found = open_store(store, job.slide_id)
        info, slots = found.info, np.repeat(MAGNIFICATIONS.magnifications, np.square(MAGNIFICATIONS.factors))
        limit = _bare_seconds(found, job.path)
        row |= {
            "format": info.vendor,
            "size": "{}x{}".format(*info.size),
            "mpp": f"{info.mpp[0]:.3g}{'*' if job.mpp else ''}",
            "mpp from": info.mpp_source,
            **{name: int(found.mask[:, slots == name].sum()) for name in MAGNIFICATIONS.magnifications},
            "verdict": found.attributes["verdict"]["verdict"],
            "libjpeg-turbo s": "" if limit is None else f"{limit:.2f}",
            "ratio": "" if limit is None else f"{limit / outcome.seconds:.2f}",
        }
    return row | {
        "tiling s": f"{outcome.seconds:.2f}" if outcome.succeeded else "",
        "regions predicted": predicted.get("regions", ""),
        "prediction s": predicted.get("seconds", ""),
        "refused because": "" if outcome.succeeded else outcome.reason.split(";")[0].replace(f"{job.path.parent}/", ""),
    }


def _bare_seconds(found: TileStore, path: Path) -> float | None:
    """Seconds that libjpeg-turbo alone takes for the slide's own tiles under the regions; None where they are no JPEG's."""
    if found.info.vendor != "aperio":
        return None
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        if page.compression != tifffile.COMPRESSION.JPEG:
            return None
    side = round(found.region_px)
    boxes = []
    for x, y in found.origin.tolist():
        right, below = min(x + side, page.imagewidth), min(y + side, page.imagelength)
        across, down = range(x, right, page.tilewidth), range(y, below, page.tilelength)
        boxes += [(column, row, side) for row in (*down, below - 1) for column in (*across, right - 1)]
    return decode_with_libjpeg_turbo(Reading(path, boxes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(os.environ["CRCJAX_REAL_DATA"]))
