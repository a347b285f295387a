"""What prediction from a share of the regions costs in accuracy and saves in time, beside as many regions chosen at random.

    python tools/bench_region_share.py OUT

OUT/demo (crcjax demo) and the slides are made (in minutes) unless they exist.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import gigapixel
import numpy as np
from record import Row, record

from crcjax.data.cohort import load_cohort
from crcjax.demo import SIZE_PX, run_demo
from crcjax.predict import region_selection
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.validation.predictions_table import PredictionRow

SHARES, LARGE_PX = (1.0, 0.5, 0.25), 20_480


def main(out: Path) -> None:
    if not (out / "demo" / "metrics.json").exists():
        run_demo(out / "demo")
    slides = load_cohort(out / "demo" / "cohort.csv", None).split("test").rows
    jobs = [PredictJob(row.slide_id, row.slide_id, Path(str(row.path))) for row in slides]
    labels = [row.label for row in slides]
    large = gigapixel.painted(out / f"{LARGE_PX}.svs", LARGE_PX, 2)
    rows: list[Row] = []
    whole: list[PredictionRow] = []
    whole_s = 0.0
    for share in SHARES:
        predictor = Predictor(out / "demo" / "run", region_share=share)
        predicted = predict_slides(predictor, jobs, out / "predictions" / str(time.monotonic()))
        whole = whole or predicted
        seconds = min(_seconds(predictor, large, out) for _ in range(3))
        whole_s = whole_s or seconds
        name = "all regions" if share == 1 else f"{100 * share:g} % of the regions"
        rows += [
            *_accuracy(name, predicted, whole, labels),
            Row(f"{name}: a slide of {LARGE_PX:,} px", seconds, "s", seconds / whole_s, "all regions"),
        ]
        if share < 1:
            rng = np.random.default_rng(0)

            def at_random(appearance: np.ndarray, count: int, rng: np.random.Generator = rng) -> np.ndarray:
                return np.sort(rng.choice(len(appearance), count, replace=False))

            with patch.object(region_selection, "spread", at_random):
                predicted = predict_slides(predictor, jobs, out / "predictions" / str(time.monotonic()))
            rows += _accuracy(f"{name}, at random", predicted, whole, labels)
    about = (
        "Prediction from a share of the regions (--region-share): accuracy beside that of all regions, and time.\n\n"
        f"* The {len(jobs)} synthetic test slides of crcjax demo, {SIZE_PX[0]:,} x {SIZE_PX[1]:,} px, and its model. The time is the least of 3.\n"
        "* A class changes if it differs from that by all regions."
    )
    record("region_share", "python tools/bench_region_share.py OUT", rows, about)


def _seconds(predictor: Predictor, path: Path, out: Path) -> float:
    start = time.monotonic()
    predict_slides(predictor, [PredictJob("large", "large", path)], out / "predictions" / str(time.monotonic()))
    return time.monotonic() - start


def _accuracy(
    name: str, rows: Sequence[PredictionRow], whole: Sequence[PredictionRow], labels: Sequence[str | None]
) -> list[Row]:
    classes = sorted({label for label in labels if label})

    def balanced(of: Sequence[PredictionRow]) -> float:
        right = np.array([row.call == label for row, label in zip(of, labels, strict=True)])
        return float(np.mean([right[[label == name for label in labels]].mean() for name in classes]))

    changed = sum(row.call != other.call for row, other in zip(rows, whole, strict=True))
    differences = [np.abs(np.subtract(row.probs, other.probs)).max() for row, other in zip(rows, whole, strict=True)]
    against = (balanced(rows) / balanced(whole), "all regions") if rows is not whole else (None, "")
    return [
        Row(f"{name}: balanced accuracy", balanced(rows), "", *against),
        Row(f"{name}: classes that change", float(changed), "slides"),
        Row(f"{name}: median difference of a probability", float(np.median(differences)), ""),
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
