"""Tiles every real slide, predicts it, and reports both in one table.

    CRCJAX_REAL_DATA=FOLDER python tools/real_slides.py RUN OUT

RUN is a trained run. The demo's run suffices, because the table shows that the files are processed and not that predictions are
right. Slides that do not state their mpp get 0.5, which is an assumption.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import simplejpeg
import tifffile
from pydicom.encaps import generate_frames
from record import record

from crcjax.errors import SlideError
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.slides.preprocess.manifest import Outcome
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.tile_store import TileStore, open_store
from crcjax.slides.tiling.plan import TilingParams
from crcjax.slides.wsi.discovery import find_slides, slide_id_of
from crcjax.slides.wsi.slide import open_slide
from crcjax.validation.predictions_table import PredictionRow

ASSUMED_MPP = 0.5
MAGNIFICATIONS = TilingParams(("10x", "20x", "40x"))


def main(run: Path, out: Path, data: Path) -> None:
    rows = []
    for folder in ("slides", "slides_refused"):
        paths = find_slides([data / folder])
        given = {path: _missing_mpp(path) for path in paths}
        jobs = [TileJob(slide_id_of(path), path, given[path]) for path in paths]
        store = out / "store" / folder
        tiled = tile_anew(jobs, store)
        predictor = Predictor(run)
        predict = [PredictJob(job.slide_id, job.slide_id, job.path, job.mpp) for job in jobs]
        predicted = predict_slides(predictor, predict, out / folder)
        rows += [
            _row(folder, job, store, outcome, row) for job, outcome, row in zip(jobs, tiled, predicted, strict=True)
        ]
    command = "CRCJAX_REAL_DATA=… python tools/real_slides.py runs/demo/run runs/real"
    about = (
        "Real slides through tiling and prediction: format, tiles, QC result, time, and the reason for a refusal.\n\n"
        f"* mpp marked * is missing from the file; {ASSUMED_MPP} was assumed. No slide has 40x, and crcjax does not upsample.\n"
        "* Seconds of one worker, from opening the file to the published store.\n"
        "* `ratio`: the time in which libjpeg-turbo alone decodes the slide's native JPEG tiles, divided by the time of tiling; blank"
        " for JPEG 2000.\n"
        "* On such small slides, opening, the thumbnail and publishing take longer than the few tiles. The table `tiling` measures"
        " large slides."
    )
    record("real_slides", command, rows, about)


def tile_anew(jobs: Sequence[TileJob], store: Path) -> list[Outcome]:
    """Tiles into an empty store, because slides that are tiled already would be skipped."""
    shutil.rmtree(store, ignore_errors=True)
    outcomes = tile_slides(jobs, store, MAGNIFICATIONS, workers=1)
    assert all(outcome.status == "tiled" for outcome in outcomes if outcome.succeeded), outcomes
    return outcomes


def _missing_mpp(path: Path) -> float | None:
    try:
        open_slide(path).close()
    except SlideError as error:
        return ASSUMED_MPP if error.status == "mpp_missing" else None
    return None


def _row(folder: str, job: TileJob, store: Path, outcome: Outcome, predicted: PredictionRow) -> dict:
    row: dict = {"folder": folder, "slide": job.path.name}
    shown = (
        "format",
        "size",
        "mpp",
        "mpp from",
        *MAGNIFICATIONS.magnifications,
        "QC result",
        "libjpeg-turbo s",
        "ratio",
    )
    row |= dict.fromkeys(shown, "")
    if outcome.succeeded:
        tiled = open_store(store, job.slide_id)
        info, slots = tiled.info, np.repeat(MAGNIFICATIONS.magnifications, np.square(MAGNIFICATIONS.factors))
        limit = _bare_seconds(tiled, job.path)
        row |= {
            "format": info.vendor,
            "size": "{}x{}".format(*info.size),
            "mpp": f"{info.mpp[0]:.3g}{'*' if job.mpp else ''}",
            "mpp from": info.mpp_source,
            **{name: int(tiled.mask[:, slots == name].sum()) for name in MAGNIFICATIONS.magnifications},
            "QC result": tiled.attributes["verdict"]["verdict"],
            "libjpeg-turbo s": "" if limit is None else f"{limit:.2f}",
            "ratio": "" if limit is None else f"{limit / outcome.seconds:.2f}",
        }
    return row | {
        "tiling s": f"{outcome.seconds:.2f}" if outcome.succeeded else "",
        "regions predicted": predicted.to_csv(())["regions"],
        "prediction s": predicted.to_csv(())["seconds_total"],
        "reason for refusal": ""
        if outcome.succeeded
        else outcome.reason.split(";")[0].replace(f"{job.path.parent}/", ""),
    }


def _bare_seconds(tiled: TileStore, path: Path) -> float | None:
    """Seconds in which libjpeg-turbo alone decodes the native tiles under the regions; None if these are not JPEG."""
    native = _native_tiles(path)
    if native is None:
        return None
    streams, (width, height), (across_px, down_px) = native
    side, columns, places = round(tiled.region_px), -(-width // across_px), set()
    for x, y in tiled.origin.tolist():
        right, below = min(x + side, width) - 1, min(y + side, height) - 1
        for row in range(y // down_px, below // down_px + 1):
            places |= {row * columns + column for column in range(x // across_px, right // across_px + 1)}
    start = time.monotonic()
    for place in sorted(places):
        simplejpeg.decode_jpeg(streams[place], "RGB")
    return time.monotonic() - start


def _native_tiles(path: Path) -> tuple[list[bytes], tuple[int, int], tuple[int, int]] | None:
    """The JPEG streams of the finest level, row by row, its size and that of a tile; None if they are not JPEG."""
    if path.is_dir():
        headers = {file: pydicom.dcmread(file, stop_before_pixels=True) for file in path.iterdir()}
        file = max(headers, key=lambda file: headers[file].TotalPixelMatrixColumns)
        if headers[file].file_meta.TransferSyntaxUID != pydicom.uid.JPEGBaseline8Bit:
            return None
        level = pydicom.dcmread(file)
        frames = generate_frames(level.PixelData, number_of_frames=int(level.NumberOfFrames))
        size = level.TotalPixelMatrixColumns, level.TotalPixelMatrixRows
        return list(frames), size, (level.Columns, level.Rows)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        if page.compression != tifffile.COMPRESSION.JPEG:
            return None
        tables, streams = page.jpegtables, []
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            tiff.filehandle.seek(offset)
            stream = tiff.filehandle.read(count)
            streams.append(tables[:-2] + stream[2:] if tables else stream)
        return streams, (page.imagewidth, page.imagelength), (page.tilewidth, page.tilelength)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(os.environ["CRCJAX_REAL_DATA"]))
