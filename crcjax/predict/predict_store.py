"""Predictions of slides in a store, from their tiles or their features, without the slides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Array, UInt8

from crcjax.data.bags import StoredSlides, open_features
from crcjax.data.cohort import Cohort, SlideRow
from crcjax.errors import InputError
from crcjax.predict.attribution import Method
from crcjax.predict.evidence import write_evidence
from crcjax.predict.predict_slides import predicted_row, unpredicted_row
from crcjax.predict.predictor import (
    Member,
    SlidePrediction,
    by_slide,
    check_go_together,
    dropout_keys,
    ensemble_id,
    pooled,
    used_for,
)
from crcjax.predict.results import Bag, Results, digest_of
from crcjax.predict.stored_bags import Evaluation
from crcjax.runs.run_directory import Run, open_run
from crcjax.slides.store.features import FeatureReader
from crcjax.slides.store.tile_pixels import NO_PIXELS
from crcjax.slides.store.tile_store import TileStore, open_store, tiled_slides
from crcjax.validation.calibration import load_calibration
from crcjax.validation.predictions_table import PredictionRow


def predict_stored(
    paths: Sequence[Path],
    store: Path,
    cohort: Cohort,
    calibration: Path | None = None,
    *,
    out: Path | None = None,
    dropout_samples: int = 0,
    attribution: Method = "attention",
    on_row: Callable[[PredictionRow], None] = lambda row: None,
) -> list[PredictionRow]:
    """Predicts a cohort's slides from a store, by one run or by an ensemble of runs.

    A run reads what it was trained on: imported features, features of crcjax embed in the run's own store, and otherwise
    tiles. Slides that are absent from the store, or unreadable, have rows that say so.

    Args:
      paths: the run directories.
      store: the folder of crcjax tile or crcjax import.
      cohort: the slides.
      calibration: calibration.json of the same runs.
      out: if given, OUT/predictions.csv, attention files and heatmaps are written, and rows of an earlier start are kept, as
        by `predict_slides`; slides that were imported without their files have no heatmap.
      dropout_samples: predictions with dropout by each run; 0 predicts once without.
      attribution: what the heatmaps show.
      on_row: called with each row that is written to `out`.

    Returns:
      The rows in the order of the cohort.

    Raises:
      InputError: no slide can be read; slides were tiled in another way than those of the runs; the features are not those
        of the runs; the runs do not go together, or have no dropout; the calibration is of other runs.
      OutputError: `out` cannot be written.
    """
    runs = [open_run(path) for path in paths]
    check_go_together(runs)
    keys = dropout_keys(runs, dropout_samples)
    in_store = set(tiled_slides(store)) & {row.slide_id for row in cohort.rows}
    if not in_store:
        raise InputError(f"{store}: holds none of the slides; give the folder that crcjax tile or import wrote them to")
    opened = {row.slide_id: _opened(runs, store, row.slide_id) for row in cohort.rows if row.slide_id in in_store}
    slides = {slide_id: slide for slide_id, slide in opened.items() if isinstance(slide, TileStore)}
    if not slides:
        raise InputError(f"{store}: none of the slides can be read; the first: {next(iter(opened.values()))}")
    readable = replace(cohort, rows=tuple(row for row in cohort.rows if row.slide_id in slides))
    members = [Member(run, attribution, _from_features(run, store)) for run in runs]
    evaluations = _evaluations(runs, members, store, readable, list(slides.values()))
    model, split_of = ensemble_id(members, dropout_samples), used_for(runs)
    classes = tuple(runs[0].config.data.classes)
    fitted = load_calibration(calibration, model, classes) if calibration else None
    bag_numbers = dict(zip(slides, evaluations[0].bag_of, strict=True))
    # A bag that is numbered None is a slide that cannot be read.
    bags: dict[tuple[int | None, str], list[SlideRow]] = {}
    for listed in cohort.rows:
        number = bag_numbers.get(listed.slide_id)
        bags.setdefault((number, listed.slide_id if number is None else ""), []).append(listed)

    def digest(listed: Sequence[SlideRow]) -> str:
        if any(row.slide_id not in slides for row in listed):
            return ""
        content = [(row.slide_id, row.site, _content(slides[row.slide_id], runs, store)) for row in listed]
        return digest_of(model, fitted, attribution, content)

    def predict_bag(number: int | None, bag: Bag, listed: Sequence[SlideRow]) -> list[PredictionRow]:
        if number is None:
            return [_unreadable(row, store, opened.get(row.slide_id)) for row in bag.rows]
        stores = [slides[row.slide_id] for row in bag.rows]
        try:
            pictures = [_picture(slide) if out else None for slide in stores]
            predictions = _predicted(members, evaluations, number, stores, attribution, keys)
        except InputError as error:
            return [_unreadable(row, store, error) for row in bag.rows]
        rows = []
        for row, slide, picture, prediction in zip(bag.rows, stores, pictures, predictions, strict=True):
            # A case is calibrated by its first slide.
            finished = predicted_row(row, prediction, classes, fitted, listed[0].slide_id, listed[0].site)
            finished = replace(finished, reason=slide.info.warning)
            if out:
                write_evidence(out, finished, slide.info, prediction, attribution, picture, bag.digest)
            rows.append(finished)
        return rows

    work = []
    for (number, _), rows_of_bag in bags.items():
        unpredicted = [unpredicted_row(row.slide_id, row.case_id, model, split_of) for row in rows_of_bag]
        bag = Bag(unpredicted, partial(digest, rows_of_bag))
        work.append((bag, partial(predict_bag, number, bag, rows_of_bag)))
    if out is None:
        rows = {row.slide_id: row for _, predict in work for row in predict()}
    else:
        with Results(out, classes, [bag for bag, _ in work], on_row) as results:
            for bag, predict in work:
                if not results.has(bag):
                    results.add(predict())
        rows = results.rows
    return [rows[row.slide_id] for row in cohort.rows]


def _unreadable(row: PredictionRow, store: Path, error: TileStore | InputError | None) -> PredictionRow:
    if error is None:
        return replace(row, status="not_tiled", reason=f"is not in {store}; run crcjax tile or import for it")
    return replace(row, status="failed", reason=str(error))


def _content(slide: TileStore, runs: Sequence[Run], store: Path) -> list[object]:
    """What identifies the content of a stored slide: its attributes, and those of its features with the time of writing."""
    content: list[object] = [slide.attributes]
    for run in runs:
        if _from_features(run, store):
            reader = FeatureReader(store, slide.slide_id, run.config.model.encoder)
            content += [reader.attributes, (reader.path / "zarr.json").stat().st_mtime_ns]
    return content


def _predicted(
    members: Sequence[Member],
    evaluations: Sequence[Evaluation],
    number: int,
    slides: Sequence[TileStore],
    attribution: Method,
    keys: Sequence[Array | None],
) -> list[SlidePrediction]:
    """The prediction of each slide of a bag. Raises InputError if its tiles or features cannot be read."""
    bags = [evaluation.bag(member.params, number) for evaluation, member in zip(evaluations, members, strict=True)]
    parts = by_slide(*pooled(members, bags, attribution, keys), [len(slide.mask) for slide in slides])
    return [
        SlidePrediction(
            prediction, slide.origin, slide.region_px, slide.mask, slide.info.synthetic, {}, attribution_of_slide
        )
        for slide, (prediction, attribution_of_slide) in zip(slides, parts, strict=True)
    ]


def _picture(slide: TileStore) -> UInt8[np.ndarray, "y x 3"] | None:
    """The slide, unless it was never seen. Raises InputError."""
    return None if slide.pixels == NO_PIXELS else slide.thumbnail()[0]


def _from_features(run: Run, store: Path) -> bool:
    config = run.config
    own = config.model.imported_features or Path(config.data.store).resolve() == store.resolve()
    return bool(config.data.features and own)


def _opened(runs: Sequence[Run], store: Path, slide_id: str) -> TileStore | InputError:
    """The slide, or why the runs cannot read it."""
    try:
        slide = open_store(store, slide_id)
        for run in runs:
            if _from_features(run, store):
                FeatureReader(store, slide_id, run.config.model.encoder)
            else:
                slide.check_slide()
    except InputError as error:
        return error
    return slide


def _evaluations(
    runs: Sequence[Run], members: Sequence[Member], store: Path, cohort: Cohort, slides: list[TileStore]
) -> list[Evaluation]:
    """The readable slides for each run. Raises InputError if they are not tiled, or embedded, like those of the runs."""
    # Runs of one ensemble share the tiling, the model and the magnifications.
    config = runs[0].config
    imported, encoder = config.model.imported_features, config.model.encoder
    for slide in slides:
        if slide.params != runs[0].tiling:
            raise InputError(
                f"{slide.path}: was tiled in another way than the slides of {runs[0].path}; tile it like those, or predict "
                "the slides themselves, without --store"
            )
        slide.see(config.data.magnifications)
    reads_features = any(member.forward.stored for member in members)
    features = open_features(slides, encoder, config.data.magnifications) if reads_features else []
    if imported and features[0].width != imported:
        raise InputError(
            f"{store}: its features of {encoder} have {features[0].width} numbers, those of {runs[0].path} had {imported}; "
            "import the same"
        )
    return [
        Evaluation(
            StoredSlides(cohort, slides, features if member.forward.stored else []), member.forward, config.data.unit
        )
        for member in members
    ]
