"""How well the seconds of slides are estimated, and the time of a command that predicts them.

    python tools/bench_slide_cost.py OUT

OUT/slides are painted (in minutes) unless they exist.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
from campaign_predict import trained_run
from record import Row, record
from scipy.stats import spearmanr

from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.predict.slide_cost import CostModel, MeasuredSlide, SlideSize, slide_size
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide

# The longer side in px and the µm per pixel: the same magnification is read from levels of different size.
SIDES_PX = (1500, 2200, 3000, 4000, 5200, 6600, 8200, 10000)
MPPS = (0.25, 0.5, 1.0)
TIMES = 2


def main(out: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(out / "cache")
    paths = []
    for number, (side, mpp) in enumerate((side, mpp) for side in SIDES_PX for mpp in MPPS):
        path = out / "slides" / f"{side}-{mpp}.svs"
        if not path.exists():
            size_px = side, side * (3 + number % 3) // 5
            paint_slide(path, SlideSpec("stromal", number, size_px=size_px, mpp=mpp), workers=2)
        paths.append(path)
    trained = out / "training" / "run"
    predictor = Predictor(trained if trained.exists() else trained_run(out / "training"))
    sizes = [slide_size(path, None, None, predictor.tiling) for path in paths]

    def predict(of: list[Path]) -> tuple[float, float, float | None]:
        """The seconds and core-seconds of a command, and the seconds that it expected."""
        expected: list[float | None] = []
        folder = out / "predictions" / str(time.monotonic())
        start, cores = time.monotonic(), time.process_time()
        jobs = [PredictJob(path.stem, path.stem, path) for path in of]
        predict_slides(predictor, jobs, folder, on_plan=lambda _, seconds: expected.append(seconds))
        return time.monotonic() - start, time.process_time() - cores, expected[0]

    predict(paths)  # compiles
    alone = np.array([min(predict([path])[1] for _ in range(TIMES)) for path in paths])
    estimated = _leave_one_out(sizes, alone)
    of_bytes = _leave_one_out([SlideSize(1, 0, 0.0, path.stat().st_size * 1e-6) for path in paths], alone)
    for _ in range(2):
        predict(paths[::2])
    commands = [predict(paths[1::2]) for _ in range(TIMES)]
    errors = [abs(expected / seconds - 1) for seconds, _, expected in commands if expected]
    starts = time.process_time()
    for path in paths:
        slide_size(path, None, None, predictor.tiling)
    estimation = (time.process_time() - starts) / len(paths)
    rows = [
        Row("slides", len(paths), ""),
        Row("shortest slide alone", float(alone.min()), "core-s"),
        Row("longest slide alone", float(alone.max()), "core-s"),
        Row("estimate by tiles, pixels and bytes: median error", float(np.median(estimated)), ""),
        Row("estimate by tiles, pixels and bytes: largest error", float(estimated.max()), ""),
        Row("estimate by bytes of the file: median error", float(np.median(of_bytes)), ""),
        Row("estimate by bytes of the file: largest error", float(of_bytes.max()), ""),
        Row("rank correlation with the seconds, before any slide was measured", _rank(sizes, alone), ""),
        Row(
            "rank correlation of the bytes of the file",
            float(spearmanr([path.stat().st_size for path in paths], alone)[0]),
            "",
        ),
        Row("expected time of a command: median error", float(np.median(errors)), ""),
        Row("estimation, by slide", estimation, "core-s", estimation / float(np.mean(alone)), "a slide alone"),
    ]
    about = (
        "How well the seconds of slides are estimated before they are read.\n\n"
        f"* {len(paths)} synthetic slides of {SIDES_PX[0]:,} to {SIDES_PX[-1]:,} px at {', '.join(map(str, MPPS))} µm per pixel; the demo's"
        f" model at 10x. Core-seconds of a command with one slide, the least of {TIMES}, which other work on the machine hardly changes.\n"
        "* Errors are relative, of each slide by rates that were fitted on all others.\n"
        "* The command's wall time is expected from the stages of other slides: every second one was predicted before. Other work on the"
        " machine changes it."
    )
    record("slide_cost", "python tools/bench_slide_cost.py OUT", rows, about)


def _leave_one_out(sizes: list[SlideSize], seconds: np.ndarray) -> np.ndarray:
    """The relative error of every slide's estimate by the rates of all others."""
    errors = []
    for left_out, size in enumerate(sizes):
        others = [
            MeasuredSlide(other, (float(of_slide),))
            for number, (other, of_slide) in enumerate(zip(sizes, seconds, strict=True))
            if number != left_out
        ]
        errors.append(abs(CostModel(others).seconds(size) / seconds[left_out] - 1))
    return np.array(errors)


def _rank(sizes: list[SlideSize], seconds: np.ndarray) -> float:
    return float(spearmanr([CostModel().seconds(size) for size in sizes], seconds)[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
