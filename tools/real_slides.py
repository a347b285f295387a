"""Every real slide through tiling and prediction, as one table.

    CRCJAX_REAL_DATA=FOLDER python tools/real_slides.py RUN OUT

RUN is a trained run (the demo's will do: it shows that the files go through, not what they are). Slides that do not
state their mpp are given 0.5, which is an assumption.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from record import record

from crcjax.errors import SlideError
from crcjax.infer.pipeline import PredictJob, predict_slides
from crcjax.infer.predictor import Predictor
from crcjax.slides.executor import Outcome, TileJob, tile_slides
from crcjax.slides.reader import find_slides, open_slide, slide_id_of
from crcjax.slides.tiling import TilingParams

ASSUMED_MPP = 0.5


def main(run: Path, out: Path, data: Path) -> None:
    rows = []
    for folder in ("slides", "slides_refused"):
        paths = find_slides([data / folder])
        given = {path: _missing_mpp(path) for path in paths}
        jobs = [TileJob(slide_id_of(path), path, given[path]) for path in paths]
        tiled = tile_slides(jobs, out / "store", TilingParams(("20x",)), workers=1)
        predictor = Predictor(run)
        predict = [PredictJob(job.slide_id, job.slide_id, job.path, job.mpp) for job in jobs]
        predicted = predict_slides(predictor, predict, out / folder)
        rows += [_row(folder, outcome, row, given) for outcome, row in zip(tiled, predicted, strict=True)]
    command = "CRCJAX_REAL_DATA=… python tools/real_slides.py runs/demo/run runs/real"
    note = f"mpp marked * was not in the file and assumed to be {ASSUMED_MPP}. Seconds on one worker."
    record("real_slides", command, rows, note)


def _missing_mpp(path: Path) -> float | None:
    try:
        open_slide(path).close()
    except SlideError as error:
        return ASSUMED_MPP if error.status == "mpp_missing" else None
    return None


def _row(folder: str, outcome: Outcome, row: dict, given: dict[Path, float | None]) -> dict:
    path = Path(outcome.path)
    shown = {"size": "", "mpp": "", "vendor": ""}
    try:
        with open_slide(path, given[path]) as slide:
            mark = "*" if given[path] else ""
            shown = {
                "size": "{}x{}".format(*slide.info.size),
                "mpp": f"{slide.info.mpp[0]:.3g}{mark}",
                "vendor": slide.info.vendor,
            }
    except SlideError:
        pass
    return {
        "folder": folder,
        "slide": path.name,
        **shown,
        "tiles at 20x": outcome.tiles or "",
        "tiling s": f"{outcome.seconds:.2f}" if outcome.succeeded else "",
        "regions at 10x": row.get("regions", ""),
        "prediction s": row.get("seconds", ""),
        "refused because": "" if outcome.succeeded else outcome.reason.split(";")[0].replace(f"{path.parent}/", ""),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(os.environ["CRCJAX_REAL_DATA"]))
