"""Predictions of slides in a store, from their tiles or their features, without the slides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crcjax.data.cohort import Cohort, SlideRow
from crcjax.errors import InputError
from crcjax.infer.pipeline import Row, called
from crcjax.infer.predictor import check_go_together, model_id_of, used_for
from crcjax.models.mil import MILModel, Params, Prediction, build_model, combine
from crcjax.slides.features import FeatureReader
from crcjax.slides.store import open_store, tiled_slides
from crcjax.train.checkpoint import restore_params
from crcjax.train.evaluate import Evaluation
from crcjax.train.mesh import local_mesh
from crcjax.train.run_directory import Run, open_run
from crcjax.train.step import Forward
from crcjax.validation.calibration import load_calibration


def predict_stored(paths: Sequence[Path], store: Path, cohort: Cohort, calibration: Path | None = None) -> list[Row]:
    """The rows of predictions.csv of a cohort's slides in a store, by a run or by an ensemble of runs.

    What runs were trained on is read: imported features, those of crcjax embed in the runs' own store, and tiles
    otherwise. Slides that are not in the store, or cannot be read, have rows that say so. Raises InputError: none of them can;
    slides that were tiled in another way than the runs'; features that are not those of the runs; runs that do not go
    together; a calibration of other runs.
    """
    tiled = set(tiled_slides(store))
    runs = [open_run(path) for path in paths]
    check_go_together(runs)
    held_back = {row.slide_id: _fault(runs, store, row.slide_id) for row in cohort.rows if row.slide_id in tiled}
    there = replace(cohort, rows=tuple(row for row in cohort.rows if held_back.get(row.slide_id) == ""))
    if not held_back:
        raise InputError(f"{store}: holds none of the slides; give the folder that crcjax tile or import wrote them to")
    if not there.rows:
        raise InputError(f"{store}: none of the slides can be read; the first: {next(iter(held_back.values()))}")
    used = used_for(runs)
    classes = tuple(runs[0].config.data.classes)
    members: list[tuple[str, list[Prediction | InputError]]] = []
    for run in runs:
        model = build_model(run.config.model, len(classes), run.config.seed, run.tiling.factors)
        params, _ = restore_params(run.path, model)
        evaluation = _evaluation(run, model, store, there)
        members.append(
            (model_id_of(params), [_predicted(evaluation, params, i) for i in range(len(evaluation.stores))])
        )
    name = "+".join(model_id for model_id, _ in members)
    fitted = load_calibration(calibration, name, classes) if calibration else None
    rows: dict[str, Row] = {}
    for slide in cohort.rows:
        row = {"slide_id": slide.slide_id, "case_id": slide.case_id, "model": name}
        row |= {"split": used.get(slide.slide_id) or used.get(slide.case_id, ""), "status": "not_tiled"}
        row["reason"] = f"is not in {store}; run crcjax tile or import for it"
        if reason := held_back.get(slide.slide_id):
            row |= {"status": "failed", "reason": reason}
        rows[slide.slide_id] = row
    first: dict[int, SlideRow] = {}  # of each bag: what it is calibrated by
    for number, slide, held in zip(evaluation.bag_of, there.rows, evaluation.slides, strict=True):
        told, by = [predictions[number] for _, predictions in members], first.setdefault(number, slide)
        if faults := [one for one in told if isinstance(one, InputError)]:
            rows[slide.slide_id] |= {"status": "failed", "reason": str(faults[0])}
            continue
        found = combine([one for one in told if isinstance(one, Prediction)])
        rows[slide.slide_id] |= called(found, classes, fitted, by.slide_id, by.site) | {
            "regions": str(int(held.mask.any(axis=1).sum())),
            "status": "ok",
            "reason": held.info.warning,
            "synthetic": "yes" if held.info.synthetic else "no",
        }
    return list(rows.values())


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


def _predicted(evaluation: Evaluation, params: Params, index: int) -> Prediction | InputError:
    """A bag's prediction, or what of its tiles or features cannot be read."""
    try:
        return evaluation.prediction(params, index)
    except InputError as error:
        return error


def _evaluation(run: Run, model: MILModel, store: Path, cohort: Cohort) -> Evaluation:
    config = run.config
    imported, encoder = config.model.imported_features, config.model.encoder
    sizes = config.data.region_buckets, config.data.regions
    forward = Forward(model, *sizes, local_mesh(), run.normaliser, _from_features(run, store))
    found = Evaluation(str(store), cohort, forward, encoder, config.data.unit, config.data.magnifications)
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
