"""Predicts slides of a store from their tiles or their features, without the slide files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Array, UInt8

from crcjax.data.bags import StoredSlides, check_features
from crcjax.data.cohort import Cohort, SlideRow
from crcjax.errors import InputError
from crcjax.predict.attribution_method import Method
from crcjax.predict.ensemble import pool_bag, split_by_slide
from crcjax.predict.evidence import write_evidence
from crcjax.predict.member import Member, dropout_keys, opened_models, settings_of
from crcjax.predict.predict_slides import predicted_row
from crcjax.predict.predictor import SlidePrediction
from crcjax.predict.provenance import PredictedBy, pipeline_id, result_key, row_without_prediction
from crcjax.predict.results import PendingBag, Results
from crcjax.predict.stored_bags import Evaluation
from crcjax.runs.ensemble_id import ensemble_id
from crcjax.runs.trained_model import TrainedModel, check_ensemble, split_by
from crcjax.slides.preprocess.manifest import refused_slides
from crcjax.slides.store.features import FeatureReader, feature_attributes
from crcjax.slides.store.tile_pixels import NO_PIXELS
from crcjax.slides.store.tile_store import TileStore, open_store, tiled_slides
from crcjax.slides.tiling.plan import slot_boxes
from crcjax.slides.tiling.tissue_colour import tissue_colour
from crcjax.validation.calibration import Calibration, load_calibration
from crcjax.validation.predictions_table import PredictionRow


def predict_stored(
    models: Sequence[str | Path | TrainedModel],
    store: Path,
    cohort: Cohort,
    calibration: Path | Calibration | None = None,
    *,
    out: Path | None = None,
    dropout_samples: int = 0,
    attribution: Method = "attention",
    on_row: Callable[[PredictionRow], None] = lambda row: None,
) -> list[PredictionRow]:
    """Predicts the slides of a cohort from a store, with one model or an ensemble of models.

    A model reads the data that it was trained on: imported features, features that crcjax embed computed with the weights of
    its encoder, and otherwise tiles. A slide that tiling refused, that is missing from the store or unreadable has a row with
    the status and the reason.

    Args:
      models: run directories or models of a bundle, as for `Predictor`.
      store: the folder of crcjax tile or crcjax import.
      cohort: the slides.
      calibration: the calibration of the same models, or its calibration.json.
      out: if given, the function writes OUT/predictions.csv, attention files and heatmaps, and resumes as `predict_slides`
        does. Slides that were imported without their files have no heatmap.
      dropout_samples: predictions with dropout by each model; 0 predicts once without.
      attribution: the method of the heatmaps.
      on_row: called with each row once it is written to `out`.

    Returns:
      The rows in the order of the cohort.

    Raises:
      InputError: no slide can be read; the tiling or the features of the slides differ from those of the models; the models
        form no ensemble or were trained without dropout; the calibration is of other models.
      OutputError: `out` cannot be written.
    """
    trained = opened_models(models)
    check_ensemble(trained)
    keys = dropout_keys(trained, dropout_samples)
    in_store = set(tiled_slides(store)) & {row.slide_id for row in cohort.rows}
    refused = refused_slides(store)
    if not in_store:
        raise InputError(f"{store}: holds none of the slides; give the folder that crcjax tile or import wrote them to")
    ids = [row.slide_id for row in cohort.rows if row.slide_id in in_store]
    from_features = [_reads_features(model, store, ids) for model in trained]
    opened = {slide_id: _open_slide(trained, store, slide_id, from_features) for slide_id in ids}
    slides = {slide_id: slide for slide_id, slide in opened.items() if isinstance(slide, _StoredSlide)}
    errors = {slide_id: error for slide_id, error in opened.items() if isinstance(error, InputError)}
    if not slides:
        raise InputError(f"{store}: none of the slides can be read; the first: {next(iter(errors.values()))}")
    readable = replace(cohort, rows=tuple(row for row in cohort.rows if row.slide_id in slides))
    members = [Member(model, attribution, stored) for model, stored in zip(trained, from_features, strict=True)]
    evaluations = _evaluations(trained, members, store, readable, list(slides.values()))
    model = ensemble_id((member.model_id for member in members), dropout_samples)
    classes = tuple(trained[0].config.data.classes)
    fitted = None if calibration is None else load_calibration(calibration, model, classes)

    def compute_digest(cohort_rows: Sequence[SlideRow]) -> str:
        if any(row.slide_id not in slides for row in cohort_rows):
            return ""
        try:
            content = [(row.slide_id, row.site, _content(slides[row.slide_id])) for row in cohort_rows]
        except OSError:
            return ""
        return result_key(by, attribution, content)

    def predict_bag(index: int | None, bag: PendingBag, cohort_rows: Sequence[SlideRow]) -> list[PredictionRow]:
        if index is None:
            return [_unreadable(row, store, errors.get(row.slide_id), refused.get(row.slide_id)) for row in bag.rows]
        stores = [slides[row.slide_id].tiles for row in bag.rows]
        try:
            thumbnails = [_thumbnail(slide) if out else None for slide in stores]
            predictions = _predict_stored_bag(members, evaluations, index, stores, attribution, keys)
        except InputError as error:
            return [_unreadable(row, store, error) for row in bag.rows]
        rows = []
        for row, slide, thumbnail, prediction in zip(bag.rows, stores, thumbnails, predictions, strict=True):
            # The first slide of a case decides the random part and the threshold of the case's conformal set.
            first = cohort_rows[0]
            finished = predicted_row(row, prediction, classes, fitted, first.slide_id, first.site)
            finished = replace(
                finished, reason=finished.reason or slide.info.warning, slide_sha256=slide.info.content_hash
            )
            if out:
                write_evidence(out, finished, slide.info, prediction, classes, attribution, thumbnail, bag.digest)
            rows.append(finished)
        return rows

    pipeline, target = pipeline_id(settings_of(trained, dropout_samples), fitted), trained[0].config.data.label
    by = PredictedBy(model, trained[0].bundle_id, pipeline, split_by(trained), target)
    work = []
    for index, cohort_rows in _rows_by_bag(cohort, dict(zip(slides, evaluations[0].bag_of, strict=True))):
        unpredicted = [by.row(row.slide_id, row.case_id, row.site, row.scanner, row.label) for row in cohort_rows]
        bag = PendingBag(unpredicted, partial(compute_digest, cohort_rows))
        work.append((bag, partial(predict_bag, index, bag, cohort_rows)))
    if out is None:
        rows = {row.slide_id: row for _, predict in work for row in predict()}
    else:
        with Results(out, classes, [bag for bag, _ in work], on_row) as results:
            for bag, predict in work:
                if not results.has(bag):
                    results.add(predict())
        rows = results.rows
    return [rows[row.slide_id] for row in cohort.rows]


@dataclass(frozen=True)
class _StoredSlide:
    """An open slide of a store; `features` is None if all runs read tiles."""

    tiles: TileStore
    features: FeatureReader | None


def _open_slide(
    models: Sequence[TrainedModel], store: Path, slide_id: str, from_features: Sequence[bool]
) -> _StoredSlide | InputError:
    """Opens a slide, or returns the error if the models cannot read it."""
    try:
        tiles = open_store(store, slide_id)
        # Models of one ensemble have the same encoder.
        features = FeatureReader(store, slide_id, models[0].config.model.encoder) if any(from_features) else None
        if features:
            _check_encoder(features, models[0].encoder_sha256)
        if not all(from_features):
            tiles.check_slide()
    except InputError as error:
        return error
    return _StoredSlide(tiles, features)


def _check_encoder(features: FeatureReader, expected: str | None) -> None:
    """Raises InputError for features by other weights than the model's, where both are known."""
    actual = features.attributes.get("weights_sha256")
    if expected and actual and actual != expected:
        raise InputError(
            f"{features.path}: must be made with the weights {expected}, got {actual}; embed the slide with these"
        )


def _reads_features(model: TrainedModel, store: Path, slide_ids: Sequence[str]) -> bool:
    """Whether a model reads the features of a store in place of tiles.

    It does so if it was trained on features, and the features are imported ones, or the store is that of the training, or the
    first slide that has features of the encoder has them by the model's weights.
    """
    config = model.config
    if not config.data.features:
        return False
    if config.model.imported_features:
        return True
    if config.data.store and Path(config.data.store).resolve() == store.resolve():
        return True
    attributes = (feature_attributes(store, slide_id, config.model.encoder) for slide_id in slide_ids)
    sha256 = next((values.get("weights_sha256") for values in attributes if values), None)
    return sha256 is not None and sha256 == model.encoder_sha256


def _evaluations(
    models: Sequence[TrainedModel],
    members: Sequence[Member],
    store: Path,
    cohort: Cohort,
    slides: Sequence[_StoredSlide],
) -> list[Evaluation]:
    """One evaluation of the readable slides for each model.

    Raises InputError if the tiling or the features of the slides differ from those of the models.
    """
    # Models of one ensemble have the same tiling, model and magnifications.
    config = models[0].config
    imported_width, encoder = config.model.imported_features, config.model.encoder
    stores = [slide.tiles for slide in slides]
    for tiles in stores:
        if tiles.params != models[0].tiling:
            raise InputError(
                f"{tiles.path}: was tiled in another way than the slides of {models[0].path}; tile it like those, or predict "
                "the slides themselves, without --store"
            )
        tiles.see(config.data.magnifications)
    features = [slide.features for slide in slides if slide.features]
    if features:
        check_features(features, stores, config.data.magnifications)
    if imported_width and features[0].width != imported_width:
        raise InputError(
            f"{store}: its features of {encoder} have {features[0].width} numbers, those of {models[0].path} had "
            f"{imported_width}; import the same"
        )
    return [
        Evaluation(
            StoredSlides(cohort, stores, features if member.forward.stored else []), member.forward, config.data.unit
        )
        for member in members
    ]


def _rows_by_bag(cohort: Cohort, bag_of: dict[str, int]) -> list[tuple[int | None, list[SlideRow]]]:
    """Groups the rows of a cohort by bag; a slide that cannot be read, and so has no bag, forms a group with None."""
    groups: dict[tuple[int | None, str], list[SlideRow]] = {}
    for row in cohort.rows:
        index = bag_of.get(row.slide_id)
        groups.setdefault((index, row.slide_id if index is None else ""), []).append(row)
    return [(index, rows) for (index, _), rows in groups.items()]


def _content(slide: _StoredSlide) -> list[object]:
    """Identifies the content of a stored slide: its attributes, and where features are read, theirs and their age.

    Raises OSError if the features have vanished.
    """
    content: list[object] = [slide.tiles.attributes]
    if slide.features:
        content += [slide.features.attributes, (slide.features.path / "zarr.json").stat().st_mtime_ns]
    return content


def _predict_stored_bag(
    members: Sequence[Member],
    evaluations: Sequence[Evaluation],
    index: int,
    slides: Sequence[TileStore],
    attribution: Method,
    keys: Sequence[Array | None],
) -> list[SlidePrediction]:
    """Predicts one bag and returns the prediction of each of its slides.

    Raises InputError if the tiles or features cannot be read.
    """
    bags = [evaluation.bag(member.params, index) for evaluation, member in zip(evaluations, members, strict=True)]
    prediction, bag_attribution = pool_bag(members, bags, attribution, keys)
    by_slide = split_by_slide(prediction, bag_attribution, [len(slide.mask) for slide in slides])
    return [
        SlidePrediction(
            slide_prediction,
            slide.origin,
            slide.region_px,
            slot_boxes(slide.params),
            slide.mask,
            slide.info.synthetic,
            {},
            slide_attribution,
            slide.qc,
            None if slide.pixels == NO_PIXELS else tissue_colour(*slide.thumbnail()),
        )
        for slide, (slide_prediction, slide_attribution) in zip(slides, by_slide, strict=True)
    ]


def _thumbnail(slide: TileStore) -> UInt8[np.ndarray, "y x 3"] | None:
    """The slide's thumbnail; None if the slide was imported without its file. Raises InputError if it cannot be read."""
    return None if slide.pixels == NO_PIXELS else slide.thumbnail()[0]


def _unreadable(
    row: PredictionRow, store: Path, error: InputError | None, refusal: Mapping[str, str] | None = None
) -> PredictionRow:
    """The row of a slide that cannot be predicted; without an error, the slide is not in the store.

    `refusal` is the outcome of its tiling, if tiling refused it.
    """
    if refusal:
        return row_without_prediction(row, refusal["status"], refusal["reason"])
    if error is None:
        return row_without_prediction(row, "not_tiled", f"is not in {store}; run crcjax tile or import for it")
    return row_without_prediction(row, "unreadable", str(error))
