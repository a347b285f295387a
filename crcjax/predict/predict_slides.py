"""Many slides to predictions.csv, heatmaps and attention files."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8

from crcjax.errors import SlideError, writing
from crcjax.models.mil import Prediction
from crcjax.predict.attribution import Method
from crcjax.predict.heatmap import LONGEST_PX, overlay, write_heatmap
from crcjax.predict.predictor import Predictor, SlidePrediction
from crcjax.slides.jobs.usable_cores import usable_cores
from crcjax.slides.preprocess.tile_slides import check_slide_ids
from crcjax.slides.wsi.discovery import without_names
from crcjax.slides.wsi.slide import SlideInfo, check_mpp, open_slide
from crcjax.validation.calibration import Calibration
from crcjax.validation.statistics import entropy

DISCLAIMER = "research use only"
MEANING: dict[Method, str] = {
    "attention": "attention (attention, not evidence)",
    "gradient": "evidence for the call, by integrated gradients,",
    "occlusion": "evidence for the call, by occlusion,",
    "region_occlusion": "evidence for the call, by its occlusion,",
}


@dataclass(frozen=True)
class PredictJob:
    """One slide to predict; `site` chooses the set's threshold.

    `mpp` (µm per level-0 px) overrides what the file says, `fallback_mpp` is for one that states none. Its
    row names its path, or files, only if `names_path`.
    """

    slide_id: str
    case_id: str
    path: Path
    mpp: float | None = None
    site: str | None = None
    fallback_mpp: float | None = None
    names_path: bool = True


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

    A run whose unit is the case sees those slides of a case that can be read as one bag, and their rows say the same of it.
    Rows are written as slides, or cases, are finished, so that a run which is stopped keeps them; `split` is what the run used the
    slide's case for, if it did. Probabilities and `entropy` are at the temperature of the `calibration`, if one is given,
    and `set` is its conformal set; `expected_entropy` and `mutual_information` are as the model says. Entropies are in
    nats. Beside the table lie heatmaps/SLIDE_ID.png and
    attention/SLIDE_ID.npz. Raises InputError before anything is written for slide ids that are doubled or cannot name a
    file and for an impossible mpp, OutputError if the folder cannot be written.
    """
    check_slide_ids([(job.slide_id, job.path) for job in jobs])
    for mpp in {given for job in jobs for given in (job.mpp, job.fallback_mpp)}:
        check_mpp(mpp)
    threads = threads or usable_cores()
    columns = [
        *("slide_id", "case_id", "subtype", *(f"p_{name}" for name in predictor.classes)),
        *("entropy", "expected_entropy", "mutual_information", "vacuity", "set", "calibration"),
        *("regions", "status", "reason", "seconds", "model", "split", "synthetic"),
    ]
    rows: dict[str, Row] = {}
    with writing(out):
        for folder in (out / "heatmaps", out / "attention"):
            folder.mkdir(parents=True, exist_ok=True)
        with open(out / "predictions.csv", "w", newline="", buffering=1) as file:
            table = csv.DictWriter(file, columns, restval="")
            table.writeheader()
            for together in _bags(jobs, predictor.unit):
                for row in _predict_bag(predictor, together, out, threads, calibration):
                    table.writerow(row)
                    rows[row["slide_id"]] = row
                    on_row(row)
    return [rows[job.slide_id] for job in jobs]


def _bags(jobs: Sequence[PredictJob], unit: str) -> list[list[PredictJob]]:
    """The jobs that share a bag, cases in the order of their first slides."""
    if unit == "slide":
        return [[job] for job in jobs]
    slides_of: dict[str, list[PredictJob]] = {}
    for job in jobs:
        slides_of.setdefault(job.case_id, []).append(job)
    return list(slides_of.values())


def _predict_bag(
    predictor: Predictor, jobs: Sequence[PredictJob], out: Path, threads: int, calibration: Calibration | None
) -> list[Row]:
    """The rows of slides that are one bag; those that fail do not keep the others from it."""
    rows, read = [], []
    with ExitStack() as files:
        for job in jobs:
            start = time.monotonic()
            row = {"slide_id": job.slide_id, "case_id": job.case_id, "model": predictor.model_id}
            row["split"] = predictor.split_of.get(job.slide_id) or predictor.split_of.get(job.case_id, "")
            rows.append(row)
            with _failing_into((row, job)):
                slide = files.enter_context(open_slide(job.path, job.mpp, job.fallback_mpp))
                read.append((row, job, slide, predictor.encode(slide, threads), start))
        found: list[SlidePrediction] = []
        with _failing_into(*((row, job) for row, job, *_ in read)):
            found = predictor.predict_encoded([encoded for *_, encoded, _ in read]) if read else []
        for (row, job, slide, _, start), prediction in zip(read, found, strict=False):
            with _failing_into((row, job)):
                call = called(prediction.prediction, predictor.classes, calibration, read[0][1].slide_id, job.site)
                begun, thumbnail = time.monotonic(), slide.thumbnail(LONGEST_PX)
                write_evidence(out, job.slide_id, slide.info, prediction, call, predictor.attribution, thumbnail)
                prediction.seconds["pictures"] = time.monotonic() - begun
                row |= call | {
                    "regions": str(int(prediction.mask.any(axis=1).sum())),
                    "status": "ok",
                    "reason": slide.info.warning,
                    "seconds": f"{time.monotonic() - start:.2f}",
                    "synthetic": "yes" if prediction.synthetic else "no",
                }
    return rows


def called(
    found: Prediction,
    classes: Sequence[str],
    calibration: Calibration | None = None,
    draw: str = "",
    site: str | None = None,
) -> Row:
    """What predictions.csv says of one bag's prediction: its subtype, probabilities, doubt and set.

    Probabilities stand there to the last bit, so that a threshold that `crcjax calibrate` reads from them is met by its like.
    A set may be drawn by chance: `draw` is the id of the slide by which the bag is calibrated, a case's first.
    """
    told = np.asarray(found.probs[0], np.float64)
    probs = told if calibration is None else calibration.probs(told[None])[0]
    held = None if calibration is None else calibration.set_of(told, draw, site)
    expected = float(found.expected_entropy[0])
    return {
        "subtype": classes[int(probs.argmax())],
        **{f"p_{name}": str(value) for name, value in zip(classes, probs, strict=True)},
        "entropy": f"{entropy(probs):.4f}",
        "expected_entropy": f"{expected:.4f}",
        "mutual_information": f"{max(0.0, entropy(told) - expected):.4f}",
        "vacuity": "" if found.vacuity is None else f"{float(found.vacuity[0]):.4f}",
        "set": "" if held is None else "|".join(held) or "none",
        "calibration": "" if calibration is None else calibration.id,
    }


@contextmanager
def _failing_into(*slides: tuple[Row, PredictJob]) -> Iterator[None]:
    """Writes into the slides' rows why they failed."""
    try:
        yield
    except SlideError as error:
        status, parts = error.status, [error.reason, error.remedy]
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).splitlines() or ["out of memory"])[0]
        status, parts = "failed", [reason, "free memory, or predict it on a larger machine"]
    else:
        return
    for row, job in slides:
        told = parts if job.names_path else [without_names(part, job.path) for part in parts]
        row |= {"status": status, "reason": "; ".join(told)}


def write_evidence(
    out: Path,
    slide_id: str,
    info: SlideInfo,
    found: SlidePrediction,
    call: Row,
    method: Method,
    thumbnail: UInt8[np.ndarray, "y x 3"] | None,
) -> None:
    """OUT/attention/SLIDE_ID.npz, and over the slide's thumbnail, where there is one, OUT/heatmaps/SLIDE_ID.png. Raises OutputError."""
    arrays, picture = out / "attention" / f"{slide_id}.npz", out / "heatmaps" / f"{slide_id}.png"
    by_region, used = found.attribution.sum(axis=1), found.mask.any(axis=1)
    with writing(out):
        arrays.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            arrays,
            origin=found.origin,
            region_px=found.region_px,
            mpp=info.mpp[0],
            attention=np.asarray(found.prediction.region_attention[0]),
            slot_attention=np.asarray(found.prediction.slot_attention[0]),
            class_attention=np.asarray(found.prediction.class_attention[0]),
            attribution=found.attribution,
        )
        if thumbnail is None:
            return
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_heatmap(
            picture,
            thumbnail,
            overlay(thumbnail, found.origin[used], found.region_px, by_region[used], info.size),
            meaning=MEANING[method],
            title=f"{slide_id}: {call['subtype']} {float(call['p_' + call['subtype']]):.2f} · {DISCLAIMER}",
            um_per_px=info.mpp[0] * info.size[0] / thumbnail.shape[1],
            synthetic=info.synthetic,
        )


def write_table(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """A CSV whose columns are those of its rows, replaced at once. Raises OutputError."""
    partial = path.with_name(f".{path.name}")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", newline="") as file:
            table = csv.DictWriter(file, columns, restval="")
            table.writeheader()
            table.writerows(rows)
        partial.replace(path)
