"""Predicts slide files and writes predictions.csv, heatmaps and attention files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crcjax.errors import InputError, SlideError
from crcjax.models.prediction import Prediction
from crcjax.predict.engine import Engine, EngineWork, SlideInWork, SlideSource
from crcjax.predict.ensemble import memory_errors
from crcjax.predict.evidence import write_evidence
from crcjax.predict.predictor import Predictor, SlidePrediction
from crcjax.predict.provenance import PredictedBy, result_key, row_without_prediction
from crcjax.predict.results import PendingBag, Results, join_shards
from crcjax.predict.slide_cost import NOTHING, CostHistory, CostModel, MeasuredSlide, SlideSize, sizes_of_bags
from crcjax.runs.code_id import code_id
from crcjax.slides.jobs.shards import largest_first, names_of_shard, shard_numbers
from crcjax.slides.jobs.urgent_work import urgent_work
from crcjax.slides.jobs.worker_pool import JobFailed
from crcjax.slides.preprocess.tile_slides import check_slide_ids
from crcjax.slides.wsi.discovery import bytes_of, content_hash, without_names
from crcjax.slides.wsi.slide import check_mpp
from crcjax.validation.calibration import Calibration
from crcjax.validation.predictions_table import PredictionRow
from crcjax.validation.statistics import entropy

EXECUTORS = ("threads", "ray")


@dataclass(frozen=True)
class PredictJob:
    """One slide to predict.

    Attributes:
      slide_id: names the row and the files.
      case_id: slides of one case are predicted together if the run's unit is `case`.
      path: the slide file or DICOM folder.
      mpp: µm per level-0 px, in place of the value in the file.
      site: decides the threshold of the conformal set.
      fallback_mpp: µm per level-0 px for a file that states none.
      names_path: whether the row's reason may name the path; False where a pseudonym replaces the name.
      scanner: what digitised the slide.
      target: its reference class, which the row repeats.
    """

    slide_id: str
    case_id: str
    path: Path
    mpp: float | None = None
    site: str | None = None
    fallback_mpp: float | None = None
    names_path: bool = True
    scanner: str | None = None
    target: str | None = None


# The slides of a bag that is not finished, and its rows.
_Pending = tuple[Sequence[PredictJob], PendingBag]


def predict_slides(
    predictor: Predictor,
    jobs: Sequence[PredictJob],
    out: Path,
    *,
    threads: int | None = None,
    memory_bytes: int | None = None,
    shard: str | None = None,
    executor: str = "threads",
    is_urgent: bool = False,
    work: EngineWork | None = None,
    calibration: Calibration | None = None,
    on_start: Callable[[int], None] = lambda slides: None,
    on_plan: Callable[[SlideSize, float | None], None] | None = None,
    on_row: Callable[[PredictionRow], None] = lambda row: None,
) -> list[PredictionRow]:
    """Predicts slides and writes OUT/predictions.csv, OUT/heatmaps/SLIDE_ID.png and OUT/attention/SLIDE_ID.npz.

    Every slide has one row, also if it cannot be predicted. With the unit `case`, the readable slides of a case form one bag,
    and their rows share its prediction. Each row is written when its slide or case is finished. A later start keeps the rows
    of the same model, calibration, attribution and slide content, and predicts only the others (see `Results`).

    Args:
      predictor: the trained runs.
      jobs: the slides.
      out: the folder.
      threads: threads that decode tiles; by default, one per usable core. With the executor `ray`, those of each worker.
      memory_bytes: the limit for the slides in work (see `Engine`).
      shard: I/N, to predict only part I of the slides, or of the cases, by size: N processes with the same jobs and `out` predict
        all of them. Each writes a table of its own, OUT/predictions-I-of-N.csv, and the last one OUT/predictions.csv.
      executor: `threads` of this process, or `ray`: the workers of a running Ray cluster (see `predict_on_ray`), which need the
        slides, the models and `out` under the same paths.
      is_urgent: other predictions of the same user on this machine begin no slide until this one ends; not with `ray`.
      work: a running engine of the predictor that this call is to use, with the threads and the memory limit of that engine, in
        place of one of its own. After an error of this call, stop it: it may still have slides in work.
      calibration: its temperature changes the probabilities and `entropy`, and its thresholds give `conformal_set`;
        `expected_entropy` and `mutual_information` remain those of the model.
      on_start: called with the number of slides that are to have a row.
      on_plan: called before the first slide is read with the estimated size of all slides that are to be predicted, and the
        estimated seconds; None if this model has not predicted several slides on this machine with these threads, or with `ray`.
      on_row: called with each row once it is written, and at the start with the rows of an earlier run.

    Returns:
      The rows in the order of the jobs; with a shard, its own.

    Raises:
      InputError: a slide id occurs twice or cannot name a file, an mpp is impossible, or there is no such executor; nothing is written in these cases.
      OutputError: the folder cannot be written.
    """
    check_slide_ids([(job.slide_id, job.path) for job in jobs])
    for mpp in {mpp for job in jobs for mpp in (job.mpp, job.fallback_mpp)}:
        check_mpp(mpp)
    if executor not in EXECUTORS:
        raise InputError(f"executor {executor!r}: choose {' or '.join(EXECUTORS)}")
    if calibration and predictor.region_share < 1:
        raise InputError(
            "the calibration is that of whole slides; predict all regions, or with runs and no calibration"
        )
    if is_urgent and executor == "ray":
        raise InputError("priority urgent is that of a machine; leave it out with the executor ray, or predict here")
    jobs_by_bag = _bags(jobs, predictor.unit)
    by = predictor.predicted_by(calibration)
    bags = [_bag(predictor, slides, calibration, by) for slides in jobs_by_bag]
    sizes = {slides[0].slide_id: sum(bytes_of(job.path) for job in slides) for slides in jobs_by_bag}
    mine = set(names_of_shard(sizes, shard)) if shard else set(sizes)
    mine_bags = [bag for bag in bags if bag.rows[0].slide_id in mine]
    on_start(sum(len(bag.rows) for bag in mine_bags))
    with Results(out, predictor.classes, mine_bags, on_row, shard) as results:
        bag_of = {slides[0].slide_id: (slides, bag) for slides, bag in zip(jobs_by_bag, bags, strict=True)}
        pending: Sequence[_Pending] = [
            bag_of[name] for name in largest_first(sizes) if name in mine and not results.has(bag_of[name][1])
        ]
        decoders = threads or len(os.sched_getaffinity(0))
        history = CostHistory(by.model, predictor.attribution, executor, decoders)
        bag_sizes: list[SlideSize] = []
        if len(pending) > 1 or on_plan:
            pending, bag_sizes = _longest_first(predictor, pending, CostModel(history.measured()), decoders, on_plan)
        run = _predict_on_ray
        if executor == "threads":
            run = partial(_predict_here, is_urgent=is_urgent, work=work, bag_sizes=bag_sizes, history=history)
        with closing(run(predictor, pending, out, threads, memory_bytes, calibration)) as finished:
            for rows in finished:
                results.add(rows)
    if shard:
        join_shards(out, predictor.classes, bags, shard_numbers(shard)[1])
    return [results.rows[job.slide_id] for job in jobs if job.slide_id in results.rows]


def _longest_first(
    predictor: Predictor,
    pending: Sequence[_Pending],
    costs: CostModel,
    threads: int,
    on_plan: Callable[[SlideSize, float | None], None] | None,
) -> tuple[list[_Pending], list[SlideSize]]:
    """Orders bags by the estimated seconds, and returns their sizes too; bags of equal seconds stay in their order."""
    bag_sizes = sizes_of_bags([_sources(jobs) for jobs, _ in pending], predictor.tiling, threads)
    sizes = [size.share(predictor.region_share) for size in bag_sizes]
    if on_plan:
        size = sum(sizes, start=NOTHING)
        on_plan(size, costs.seconds_of_command(size) if costs.has_seconds else None)
    order = sorted(range(len(pending)), key=lambda number: -costs.seconds(sizes[number]))
    return [pending[number] for number in order], [sizes[number] for number in order]


def _predict_here(
    predictor: Predictor,
    pending: Sequence[_Pending],
    out: Path,
    threads: int | None,
    memory_bytes: int | None,
    calibration: Calibration | None,
    *,
    is_urgent: bool,
    work: EngineWork | None,
    bag_sizes: Sequence[SlideSize],
    history: CostHistory,
) -> Generator[list[PredictionRow]]:
    """Yields the rows of each bag, predicted by this process, and remembers their seconds if their sizes are given."""
    sources = [_sources(jobs) for jobs, _ in pending]
    if work is None:
        engine = Engine(predictor, threads or len(os.sched_getaffinity(0)), memory_bytes, is_urgent=is_urgent)
        bags = engine.bags(sources)
    else:
        bags = work.bags(sources)
    measured: list[MeasuredSlide] = []
    with urgent_work() if is_urgent else nullcontext(), closing(bags) as encoded:
        for number, slides in encoded:
            begun = time.monotonic()
            rows = _predict_bag(predictor, *pending[number], slides, out, calibration)
            if bag_sizes and all(row.has_prediction for row in rows):
                seconds = sum(slide.read_s for slide in slides), sum(slide.encode_s for slide in slides)
                measured.append(MeasuredSlide(bag_sizes[number], (*seconds, time.monotonic() - begun)))
            yield rows
    # The first bag has waited for programs to be compiled.
    history.add(measured[1:])


def _predict_on_ray(
    predictor: Predictor,
    pending: Sequence[_Pending],
    out: Path,
    threads: int | None,
    memory_bytes: int | None,
    calibration: Calibration | None,
) -> Generator[list[PredictionRow]]:
    """Yields the rows of each bag, predicted by the workers of a Ray cluster."""
    from crcjax.predict.inference_worker import WorkerSetup, predict_on_ray

    setup = WorkerSetup(
        *(predictor.models, predictor.dropout_samples, predictor.attribution, predictor.model_id, code_id()),
        *(_sources, partial(_finish_on_ray, out.absolute(), calibration), memory_bytes, predictor.region_share),
    )
    absolute = [[replace(job, path=job.path.absolute()) for job in jobs] for jobs, _ in pending]
    bag_of = {jobs[0].slide_id: bag for jobs, bag in pending}
    for done in predict_on_ray(setup, absolute, threads):
        failed, bag = done.result, bag_of[done.job[0].slide_id]
        if isinstance(failed, JobFailed):
            yield [row_without_prediction(row, failed.status, str(failed)) for row in bag.rows]
        else:
            yield done.result


def _finish_on_ray(
    out: Path,
    calibration: Calibration | None,
    predictor: Predictor,
    jobs: Sequence[PredictJob],
    works: Sequence[SlideInWork],
) -> list[PredictionRow]:
    """The rows of a bag; runs in a worker, which identifies the inputs by itself."""
    bag = _bag(predictor, jobs, calibration, predictor.predicted_by(calibration))
    return _predict_bag(predictor, jobs, bag, works, out, calibration)


def _sources(jobs: Sequence[PredictJob]) -> list[SlideSource]:
    return [SlideSource(job.path, job.mpp, job.fallback_mpp) for job in jobs]


def _bag(
    predictor: Predictor, jobs: Sequence[PredictJob], calibration: Calibration | None, by: PredictedBy
) -> PendingBag:
    def compute_digest() -> str:
        content = [(job.slide_id, _content(job.path), job.mpp, job.fallback_mpp, job.site) for job in jobs]
        # A slide that cannot be read is never recognised as finished.
        if not all(content_digest for _, content_digest, *_ in content):
            return ""
        return result_key(by, predictor.attribution, content)

    rows = [by.row(job.slide_id, job.case_id, job.site, job.scanner, job.target) for job in jobs]
    return PendingBag(rows, compute_digest)


def _content(path: Path) -> str:
    """The hash of a slide's content; empty if it cannot be read."""
    try:
        return content_hash(path) if path.exists() else ""
    except OSError:
        return ""


def _bags(jobs: Sequence[PredictJob], unit: str) -> list[list[PredictJob]]:
    """Groups jobs by bag; cases are in the order of their first slides."""
    if unit == "slide":
        return [[job] for job in jobs]
    slides_of: dict[str, list[PredictJob]] = {}
    for job in jobs:
        slides_of.setdefault(job.case_id, []).append(job)
    return list(slides_of.values())


@dataclass
class _Slide:
    """A slide of a bag that is being predicted; `failure` is the cause and the reason if it cannot be predicted."""

    job: PredictJob
    unpredicted: PredictionRow
    row: PredictionRow
    work: SlideInWork
    failure: tuple[str, str] | None = None

    def finished(self) -> PredictionRow:
        """The finished row; of a failed slide, the row with the status and the reason."""
        return self.row if self.failure is None else row_without_prediction(self.unpredicted, *self.failure)


def _predict_bag(
    predictor: Predictor,
    jobs: Sequence[PredictJob],
    bag: PendingBag,
    works: Sequence[SlideInWork],
    out: Path,
    calibration: Calibration | None,
) -> list[PredictionRow]:
    """Predicts one bag from those of its slides that could be read, and returns the rows of all of them."""
    slides = [_Slide(job, row, row, work) for job, row, work in zip(jobs, bag.rows, works, strict=True)]
    for slide in slides:
        with _recording_failure(slide):
            if slide.work.error is not None:
                raise slide.work.error
    encoded = [(slide, slide.work.encoded) for slide in slides if slide.work.encoded is not None]
    predictions: list[SlidePrediction] = []
    with _recording_failure(*(slide for slide, _ in encoded)):
        predictions = predictor.predict_encoded([features for _, features in encoded]) if encoded else []
    for (slide, _), prediction in zip(encoded, predictions, strict=False):
        calibrated_by = encoded[0][0].job.slide_id
        row = predicted_row(slide.row, prediction, predictor.classes, calibration, calibrated_by, slide.job.site)
        info, begun = slide.work.info, time.monotonic()
        assert info is not None
        with _recording_failure(slide):
            write_evidence(
                *(out, row, info, prediction, predictor.classes, predictor.attribution),
                *(slide.work.thumbnail, bag.digest),
            )
            prediction.seconds["pictures"] = time.monotonic() - begun
            slide.row = replace(
                row,
                reason=row.reason or info.warning,
                seconds={"total": time.monotonic() - slide.work.begun} | prediction.seconds,
                slide_sha256=info.content_hash,
            )
    return [slide.finished() for slide in slides]


def predicted_row(
    row: PredictionRow,
    prediction: SlidePrediction,
    classes: Sequence[str],
    calibration: Calibration | None = None,
    calibrated_by: str = "",
    site: str | None = None,
) -> PredictionRow:
    """The row of a slide with its prediction.

    Args:
      row: the slide's row before prediction (`PredictedBy.row`).
      prediction: the prediction of the slide, or of its case.
      classes: the classes in the order of the probabilities.
      calibration: the temperature, the thresholds of conformal sets, and the limits beyond which the slide is not evaluable.
      calibrated_by: the slide whose id seeds the random part of an APS set; for a case, its first slide.
      site: decides the threshold of the conformal set.
    """
    fields = prediction_fields(prediction.prediction, classes, calibration, calibrated_by, site)
    predicted = replace(
        row,
        status="ok",
        **fields,
        regions=int(prediction.mask.any(axis=1).sum()),
        synthetic=prediction.synthetic,
        stain=prediction.stain or (),
    ).with_qc(prediction.qc)
    return calibration.limits.apply(predicted) if calibration and calibration.limits else predicted


def prediction_fields(
    prediction: Prediction,
    classes: Sequence[str],
    calibration: Calibration | None = None,
    calibrated_by: str = "",
    site: str | None = None,
) -> dict[str, Any]:
    """The predicted class, probabilities, uncertainties and conformal set of one bag's prediction; arguments as for `predicted_row`."""
    model_probs = np.asarray(prediction.probs[0], np.float64)
    probs = model_probs if calibration is None else calibration.probs(model_probs[None])[0]
    expected = float(prediction.expected_entropy[0])
    return {
        "call": classes[int(probs.argmax())],
        "probs": tuple(map(float, probs)),
        "alpha": () if prediction.alpha is None else tuple(map(float, prediction.alpha[0])),
        "entropy": entropy(probs),
        "expected_entropy": expected,
        "mutual_information": max(0.0, entropy(model_probs) - expected),
        "vacuity": None if prediction.vacuity is None else float(prediction.vacuity[0]),
        "ood": None if prediction.density_excess is None else float(prediction.density_excess[0]),
        "conformal_set": calibration and calibration.set_of(model_probs, calibrated_by, site),
        "calibration": calibration.id if calibration else "",
    }


@contextmanager
def _recording_failure(*slides: _Slide) -> Iterator[None]:
    """Records an error of the slides, or of the device's memory, as the failure of these slides."""
    try:
        yield
    except SlideError as error:
        cause, sentences = error.status, [error.reason, error.remedy]
    except memory_errors() as error:
        reason = (str(error).splitlines() or ["out of memory"])[0]
        cause, sentences = "memory", [reason, "free memory, or predict it on a larger machine"]
    else:
        return
    for slide in slides:
        path, names_path = slide.job.path, slide.job.names_path
        slide.failure = cause, "; ".join(text if names_path else without_names(text, path) for text in sentences)
