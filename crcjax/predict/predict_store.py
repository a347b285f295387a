"""Predictions of slides in a store, from their tiles or their features, without the slides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Array, UInt8

from crcjax.data.bags import open_slides
from crcjax.data.cohort import Cohort
from crcjax.errors import InputError
from crcjax.predict.attribution import Method
from crcjax.predict.predict_slides import Row, called, write_evidence
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
from crcjax.predict.stored_bags import Evaluation
from crcjax.runs.run_directory import Run, open_run
from crcjax.slides.store.features import FeatureReader
from crcjax.slides.store.tile_pixels import NO_PIXELS
from crcjax.slides.store.tile_store import TileStore, open_store, tiled_slides
from crcjax.validation.calibration import load_calibration


def predict_stored(
    paths: Sequence[Path],
    store: Path,
    cohort: Cohort,
    calibration: Path | None = None,
    *,
    out: Path | None = None,
    dropout_samples: int = 0,
    attribution: Method = "attention",
) -> list[Row]:
    """The rows of predictions.csv of a cohort's slides in a store, by a run or by an ensemble of runs.

    What runs were trained on is read: imported features, those of crcjax embed in the runs' own store, and tiles
    otherwise. Slides that are not in the store, or cannot be read, have rows that say so. With `out` each slide's attention
    and `attribution` are written there as `predict_slides` does, and its heatmap unless it was imported without its slide.
    Raises InputError: none of them can; slides that were tiled in another way than the runs'; features that are not those of
    the runs; runs that do not go together, or know no dropout; a calibration of other runs. Raises OutputError.
    """
    tiled = set(tiled_slides(store))
    runs = [open_run(path) for path in paths]
    check_go_together(runs)
    keys = dropout_keys(runs, dropout_samples)
    held_back = {row.slide_id: _fault(runs, store, row.slide_id) for row in cohort.rows if row.slide_id in tiled}
    there = replace(cohort, rows=tuple(row for row in cohort.rows if held_back.get(row.slide_id) == ""))
    if not held_back:
        raise InputError(f"{store}: holds none of the slides; give the folder that crcjax tile or import wrote them to")
    if not there.rows:
        raise InputError(f"{store}: none of the slides can be read; the first: {next(iter(held_back.values()))}")
    used = used_for(runs)
    classes = tuple(runs[0].config.data.classes)
    members = [Member(run, attribution, _from_features(run, store)) for run in runs]
    evaluations = [_evaluation(run, member, store, there) for run, member in zip(runs, members, strict=True)]
    name = ensemble_id(members, dropout_samples)
    fitted = load_calibration(calibration, name, classes) if calibration else None
    rows: dict[str, Row] = {}
    for listed in cohort.rows:
        row = {"slide_id": listed.slide_id, "case_id": listed.case_id, "model": name}
        row |= {"split": used.get(listed.slide_id) or used.get(listed.case_id, ""), "status": "not_tiled"}
        row["reason"] = f"is not in {store}; run crcjax tile or import for it"
        if reason := held_back.get(listed.slide_id):
            row |= {"status": "failed", "reason": reason}
        rows[listed.slide_id] = row
    slides_of: dict[int, list[int]] = {}
    for i, number in enumerate(evaluations[0].bag_of):
        slides_of.setdefault(number, []).append(i)
    for number, indices in slides_of.items():
        slides = [evaluations[0].slides[i] for i in indices]
        first = there.rows[indices[0]]  # which a case is calibrated by
        try:
            pictures = [_picture(slide) if out else None for slide in slides]
            predictions = _predicted(members, evaluations, number, slides, attribution, keys)
        except InputError as error:
            for slide in slides:
                rows[slide.slide_id] |= {"status": "failed", "reason": str(error)}
            continue
        call = called(predictions[0].prediction, classes, fitted, first.slide_id, first.site)
        for slide, picture, found in zip(slides, pictures, predictions, strict=True):
            rows[slide.slide_id] |= call | {
                "regions": str(int(found.mask.any(axis=1).sum())),
                "status": "ok",
                "reason": slide.info.warning,
                "synthetic": "yes" if found.synthetic else "no",
            }
            if out:
                write_evidence(out, slide.slide_id, slide.info, found, call, attribution, picture)
    return list(rows.values())


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
        SlidePrediction(found, slide.origin, slide.region_px, slide.mask, slide.info.synthetic, {}, own)
        for slide, (found, own) in zip(slides, parts, strict=True)
    ]


def _picture(slide: TileStore) -> UInt8[np.ndarray, "y x 3"] | None:
    """The slide, unless it was never seen. Raises InputError."""
    return None if slide.pixels == NO_PIXELS else slide.thumbnail()[0]


def _from_features(run: Run, store: Path) -> bool:
    config = run.config
    own = config.model.imported_features or Path(config.data.store).resolve() == store.resolve()
    return bool(config.data.features and own)


def _fault(runs: Sequence[Run], store: Path, slide_id: str) -> str:
    """Why a slide of the store cannot be read, or nothing."""
    try:
        opened = open_store(store, slide_id)
        for run in runs:
            if _from_features(run, store):
                FeatureReader(store, slide_id, run.config.model.encoder)
            else:
                opened.check_slide()
    except InputError as error:
        return str(error)
    return ""


def _evaluation(run: Run, member: Member, store: Path, cohort: Cohort) -> Evaluation:
    config = run.config
    imported, encoder = config.model.imported_features, config.model.encoder
    read_features = encoder if member.forward.stored else None
    slides = open_slides(str(store), cohort, config.data.magnifications, read_features)
    found = Evaluation(slides, member.forward, config.data.unit)
    if found.slides[0].params != run.tiling:
        raise InputError(
            f"{store}: its slides were tiled in another way than those of {run.path}; tile them so, or predict the slides "
            "themselves, without --store"
        )
    if imported and (width := FeatureReader(store, cohort.rows[0].slide_id, encoder).width) != imported:
        raise InputError(
            f"{store}: its features of {encoder} have {width} numbers, those of {run.path} had {imported}; import the same"
        )
    return found
