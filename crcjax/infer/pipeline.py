"""Many slides to predictions.csv, heatmaps and attention files."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from crcjax.errors import OutputError, SlideError
from crcjax.infer.attribution import Method
from crcjax.infer.heatmap import LONGEST_PX, overlay, write_heatmap
from crcjax.infer.predictor import Predictor, SlidePrediction
from crcjax.models.mil import Prediction
from crcjax.slides.executor import check_slide_ids
from crcjax.slides.reader import Slide, check_mpp, open_slide
from crcjax.validation.calibration import Calibration
from crcjax.validation.metrics import entropy

DISCLAIMER = "research use only"
MEANING: dict[Method, str] = {
    "attention": "attention (attention, not evidence)",
    "gradient": "evidence for the call, by integrated gradients,",
    "occlusion": "evidence for the call, by occlusion,",
}


@dataclass(frozen=True)
class PredictJob:
    """One slide to predict; `mpp` (µm per level-0 px) overrides what the file says; `site` chooses the set's threshold."""

    slide_id: str
    case_id: str
    path: Path
    mpp: float | None = None
    site: str | None = None


Row = dict[str, str]


def predict_slides(
    predictor: Predictor,
    jobs: Sequence[PredictJob],
    out: Path,
    *,
    threads: int | None = None,
    calibration: Calibration | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Predicts slides; returns the rows of OUT/predictions.csv, one a slide, whatever became of it.

    Rows are written as slides are finished, so that a run which is stopped keeps them; `split` is what the run used the
    slide's case for, if it did. Probabilities and `entropy` are at the temperature of the `calibration`, if one is given,
    and `set` is its conformal set; `expected_entropy` and `mutual_information` are as the model says. Entropies are in
    nats. Beside the table lie heatmaps/SLIDE_ID.png and
    attention/SLIDE_ID.npz. Raises InputError before anything is written for slide ids that are doubled or cannot name a
    file and for an impossible mpp, OutputError if the folder cannot be written.
    """
    check_slide_ids([(job.slide_id, job.path) for job in jobs])
    for mpp in {job.mpp for job in jobs}:
        check_mpp(mpp)
    threads = threads or len(os.sched_getaffinity(0))
    columns = [
        *("slide_id", "case_id", "subtype", *(f"p_{name}" for name in predictor.classes)),
        *("entropy", "expected_entropy", "mutual_information", "vacuity", "set", "calibration"),
        *("regions", "status", "reason", "seconds", "model", "split", "synthetic"),
    ]
    rows = []
    try:
        for folder in (out / "heatmaps", out / "attention"):
            folder.mkdir(parents=True, exist_ok=True)
        with open(out / "predictions.csv", "w", newline="", buffering=1) as file:
            table = csv.DictWriter(file, columns, restval="")
            table.writeheader()
            for job in jobs:
                row = _predict_one(predictor, job, out, threads, calibration)
                table.writerow(row)
                rows.append(row)
                on_row(row)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); free space or choose another --out") from error
    return rows


def called(
    found: Prediction,
    classes: Sequence[str],
    calibration: Calibration | None = None,
    slide_id: str = "",
    site: str | None = None,
) -> Row:
    """What predictions.csv says of one slide's prediction: its subtype, probabilities, doubt and set."""
    told = np.asarray(found.probs[0], np.float64)
    probs = told if calibration is None else calibration.probs(told[None])[0]
    held = None if calibration is None else calibration.set_of(told, slide_id, site)
    expected = float(found.expected_entropy[0])
    return {
        "subtype": classes[int(probs.argmax())],
        **{f"p_{name}": f"{value:.6f}" for name, value in zip(classes, probs, strict=True)},
        "entropy": f"{entropy(probs):.4f}",
        "expected_entropy": f"{expected:.4f}",
        "mutual_information": f"{max(0.0, entropy(told) - expected):.4f}",
        "vacuity": "" if found.vacuity is None else f"{float(found.vacuity[0]):.4f}",
        "set": "" if held is None else "|".join(held) or "none",
        "calibration": "" if calibration is None else calibration.id,
    }


def _predict_one(
    predictor: Predictor, job: PredictJob, out: Path, threads: int, calibration: Calibration | None
) -> Row:
    start = time.monotonic()
    row = {"slide_id": job.slide_id, "case_id": job.case_id, "model": predictor.model_id}
    row["split"] = predictor.split_of.get(job.slide_id) or predictor.split_of.get(job.case_id, "")
    try:
        with open_slide(job.path, job.mpp) as slide:
            found = predictor.predict(slide, threads)
            call = called(found.prediction, predictor.classes, calibration, job.slide_id, job.site)
            highest = float(call[f"p_{call['subtype']}"])
            _write_pictures(job, slide, found, predictor.attribution, f"{call['subtype']} {highest:.2f}", out)
    except SlideError as error:
        return row | {"status": error.status, "reason": f"{error.reason}; {error.remedy}"}
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).splitlines() or ["out of memory"])[0]
        return row | {"status": "failed", "reason": f"{reason}; free memory, or predict it on a larger machine"}
    return row | {
        **call,
        "regions": str(int(found.mask.any(axis=1).sum())),
        "status": "ok",
        "reason": slide.info.warning,
        "seconds": f"{time.monotonic() - start:.2f}",
        "synthetic": "yes" if found.synthetic else "no",
    }


def _write_pictures(
    job: PredictJob, slide: Slide, found: SlidePrediction, attribution: Method, call: str, out: Path
) -> None:
    begun = time.monotonic()
    attention = np.asarray(found.prediction.region_attention[0])
    by_region, used = found.attribution.sum(axis=1), found.mask.any(axis=1)
    np.savez_compressed(
        out / "attention" / f"{job.slide_id}.npz",
        origin=found.origin,
        region_px=found.plan.region_px,
        mpp=slide.info.mpp[0],
        attention=attention,
        slot_attention=np.asarray(found.prediction.slot_attention[0]),
        class_attention=np.asarray(found.prediction.class_attention[0]),
        attribution=found.attribution,
    )
    thumbnail = slide.thumbnail(LONGEST_PX)
    write_heatmap(
        out / "heatmaps" / f"{job.slide_id}.png",
        thumbnail,
        overlay(thumbnail, found.origin[used], found.plan.region_px, by_region[used], slide.info.size),
        meaning=MEANING[attribution],
        title=f"{job.slide_id}: {call} · {DISCLAIMER}",
        um_per_px=slide.info.mpp[0] * slide.info.size[0] / thumbnail.shape[1],
        synthetic=slide.info.synthetic,
    )
    found.seconds["pictures"] = time.monotonic() - begun
