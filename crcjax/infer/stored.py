"""Predictions of slides in a store, from their tiles or their features, without the slides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crcjax.data.cohort import Cohort, SlideRow
from crcjax.errors import InputError
from crcjax.infer.pipeline import Row, called
from crcjax.infer.predictor import check_go_together, model_id_of, used_for
from crcjax.models.mil import MILModel, Prediction, build_model, combine
from crcjax.slides.features import FeatureReader
from crcjax.slides.store import tiled_slides
from crcjax.train.checkpoint import restore_params
from crcjax.train.evaluate import Evaluation
from crcjax.train.mesh import local_mesh
from crcjax.train.run_directory import Run, open_run
from crcjax.train.step import Forward
from crcjax.validation.calibration import load_calibration


def predict_stored(paths: Sequence[Path], store: Path, cohort: Cohort, calibration: Path | None = None) -> list[Row]:
    """The rows of predictions.csv of a cohort's slides in a store, by a run or by an ensemble of runs.

    What runs were trained on is read: imported features, those of crcjax embed in the runs' own store, and tiles
    otherwise. Slides that are not in the store have rows that say so. Raises InputError: none of them is; slides that
    were tiled in another way than the runs'; features that are not those of the runs; runs that do not go together; a
    calibration of other runs.
    """
    tiled = set(tiled_slides(store))
    there = replace(cohort, rows=tuple(row for row in cohort.rows if row.slide_id in tiled))
    if not there.rows:
        raise InputError(f"{store}: holds none of the slides; give the folder that crcjax tile or import wrote them to")
    runs = [open_run(path) for path in paths]
    check_go_together(runs)
    used = used_for(runs)
    classes = tuple(runs[0].config.data.classes)
    members: list[tuple[str, list[Prediction]]] = []
    for run in runs:
        model = build_model(run.config.model, len(classes), run.config.seed, run.tiling.factors)
        params, _ = restore_params(run.path, model)
        evaluation = _evaluation(run, model, store, there)
        members.append((model_id_of(params), list(evaluation.predictions(params))))
    name = "+".join(model_id for model_id, _ in members)
    fitted = load_calibration(calibration, name, classes) if calibration else None
    rows: dict[str, Row] = {}
    for slide in cohort.rows:
        row = {"slide_id": slide.slide_id, "case_id": slide.case_id, "model": name}
        row |= {"split": used.get(slide.slide_id) or used.get(slide.case_id, ""), "status": "not_tiled"}
        rows[slide.slide_id] = row | {"reason": f"is not in {store}; run crcjax tile or import for it"}
    first: dict[int, SlideRow] = {}  # of each bag: what it is calibrated by
    for number, slide, held in zip(evaluation.bag_of, there.rows, evaluation.slides, strict=True):
        found, by = combine([predictions[number] for _, predictions in members]), first.setdefault(number, slide)
        rows[slide.slide_id] |= called(found, classes, fitted, by.slide_id, by.site) | {
            "regions": str(int(held.mask.any(axis=1).sum())),
            "status": "ok",
            "reason": held.info.warning,
            "synthetic": "yes" if held.info.synthetic else "no",
        }
    return list(rows.values())


def _evaluation(run: Run, model: MILModel, store: Path, cohort: Cohort) -> Evaluation:
    config = run.config
    imported, encoder = config.model.imported_features, config.model.encoder
    stored = config.data.features and (imported or Path(config.data.store).resolve() == store.resolve())
    sizes = config.data.region_buckets, config.data.regions
    forward = Forward(model, *sizes, local_mesh(), run.normaliser, bool(stored))
    found = Evaluation(str(store), cohort, forward, encoder, config.data.unit)
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
