"""Loads one trained run or an ensemble and predicts open slides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from crcjax.data.case_bags import separate_slides
from crcjax.models.prediction import Prediction
from crcjax.predict.attribution_method import Method
from crcjax.predict.ensemble import Ensemble, SlideStains, pool_bag, split_by_slide
from crcjax.predict.onnx_ensemble import OnnxModel, load_onnx_ensemble
from crcjax.predict.provenance import PredictedBy, pipeline_id
from crcjax.predict.region_encoder import S, Shard, encode_regions
from crcjax.predict.region_selection import check_region_share, select_regions
from crcjax.slides.preprocess.tile_slides import read_shards
from crcjax.slides.tiling.plan import TilePlan, Transform, plan_tiles, slot_boxes
from crcjax.slides.tiling.qc_result import QCResult
from crcjax.slides.tiling.quality_control import slide_verdict
from crcjax.slides.tiling.read import RegionTiles
from crcjax.slides.tiling.tissue_colour import tissue_colour
from crcjax.slides.wsi.slide import Slide
from crcjax.validation.calibration import Calibration

if TYPE_CHECKING:
    from crcjax.runs.trained_model import TrainedModel


@dataclass(frozen=True)
class EncodedSlide:
    """The features of a slide's regions by each ensemble member, and the seconds of each stage."""

    # One array per ensemble member.
    features: list[Float32[np.ndarray, "region slot feature"]]
    plan: TilePlan
    mask: Bool[np.ndarray, "region slot"]
    synthetic: bool
    seconds: dict[str, float]
    qc: QCResult


class SlideEncoding:
    """A slide whose regions are being read and encoded.

    One thread may run through `shards` while another adds the features.

    Args:
      plan: its tiles.
      synthetic: whether the slide is a synthetic one.
      stains: its stain estimate for each ensemble member.
      transform: the stain normalisation of its tiles before they are encoded, if the models were trained on such tiles.
      visible_slots: the tiles of a region that the models use.
      feature_sizes: the number of features by each member.
      seconds: those of the stages so far.

    Attributes:
      waiting: regions given out by `shards` whose features were not added; exact once `shards` has ended.
    """

    def __init__(
        self,
        plan: TilePlan,
        synthetic: bool,
        stains: SlideStains,
        transform: Transform | None,
        visible_slots: Bool[np.ndarray, " slot"],
        feature_sizes: Sequence[int],
        seconds: dict[str, float],
    ):
        self.plan, self.stains, self._synthetic, self._transform = plan, stains, synthetic, transform
        self._visible_slots, self._seconds = visible_slots, seconds
        shape = len(plan.origin), plan.params.slots
        self._features = [np.zeros((*shape, size), np.float32) for size in feature_sizes]
        self._tiles: list[RegionTiles] = []
        self._given_out = self._added = 0
        self._read_at = time.monotonic()

    @property
    def waiting(self) -> int:
        return self._given_out - self._added

    def shards(
        self, slide: Slide, threads: int, key: S, submit: Callable[[Callable[[], Any]], Future] | None = None
    ) -> Iterator[Shard[S]]:
        """Yields the regions with a tile that the models use, decoded by threads as in `read_shards`. Raises SlideError.

        Args:
          slide: the open slide.
          threads: how many shards are read ahead.
          key: the shards' `slide`.
          submit: as in `read_shards`.
        """
        start = time.monotonic()
        for first, tiles in read_shards(slide, self.plan, threads, transform=self._transform, submit=submit):
            self._tiles.append(replace(tiles, pixels=tiles.pixels[:0], mask=tiles.mask & self._visible_slots))
            shown = np.flatnonzero(self._tiles[-1].mask.any(axis=1))
            self._given_out += len(shown)
            if len(shown):
                pixels = tiles.pixels if len(shown) == len(tiles.pixels) else tiles.pixels[shown]
                yield Shard(key, first + shown, pixels, self.stains)
        self._read_at = time.monotonic()
        self._seconds["read"] = self._read_at - start

    def add(
        self, regions: Int[np.ndarray, " region"], features: Sequence[Float32[np.ndarray, "region slot feature"]]
    ) -> None:
        """Adds the features of some regions by each member."""
        for whole, part in zip(self._features, features, strict=True):
            whole[regions] = part
        self._added += len(regions)

    def finished(self) -> EncodedSlide:
        """The encoded slide; regions without a tile that the models use have features of zero."""
        params = self.plan.params
        mask, quality, reason = (
            np.concatenate([getattr(tiles, name) for tiles in self._tiles]) for name in ("mask", "quality", "reason")
        )
        qc = slide_verdict(quality, reason, params.quality, params.keep_all)
        seconds = self._seconds | {"encode": time.monotonic() - self._read_at}
        return EncodedSlide(self._features, self.plan, mask, self._synthetic, seconds, QCResult.from_json(qc))


@dataclass(frozen=True)
class SlidePrediction:
    """One slide's prediction.

    Attributes:
      prediction: the prediction of the slide, or of its case, with the attention of this slide.
      origin, region_px: the corners and side of its regions in level-0 px.
      slot_boxes: the tiles of a region (`slides.tiling.plan.slot_boxes`).
      mask: the tiles that were used.
      synthetic: whether the slide is a synthetic one.
      seconds: the duration of each stage.
      attribution_maps: the contribution of each tile to every class (nats), or its attention as the only map.
      qc: the slide's QC result.
      stain: the colour of its tissue (`tissue_colour`); None if it is unknown.
    """

    prediction: Prediction
    origin: Int32[np.ndarray, "region 2"]
    region_px: float
    slot_boxes: Float32[np.ndarray, "slot 3"]
    mask: Bool[np.ndarray, "region slot"]
    synthetic: bool
    seconds: dict[str, float]
    attribution_maps: Float[np.ndarray, "region slot map"]
    qc: QCResult
    stain: tuple[float, float, float] | None

    @property
    def attribution(self) -> Float[np.ndarray, "region slot"]:
        """The contribution of each tile to the predicted class, or the attention for it."""
        has_classes = self.attribution_maps.shape[-1] == self.prediction.probs.shape[-1]
        return self.attribution_maps[..., int(np.argmax(self.prediction.probs[0])) if has_classes else 0]

    @property
    def probs(self) -> Float[np.ndarray, " class"]:
        """The class probabilities."""
        return np.asarray(self.prediction.probs[0], np.float64)


class Predictor:
    """Predicts with one trained model, or with several as a deep ensemble, by the tiling of their training.

    Args:
      models: run directories, whose best checkpoints predict, or models of a bundle; they differ only by their seed. Or one
        exported model, which ONNX Runtime runs.
      dropout_samples: predictions with dropout by each model; 0 predicts once without dropout.
      attribution: the method by which evidence is attributed to instances.
      region_share: the share of a slide's regions that is read and encoded (`select_regions`).

    Attributes:
      models: the opened models.
      target: the name of the predicted property, such as subtype; the labels are in the cohort's column of that name.
      split_of: the split, `train` or `val`, of a slide or case that a model was fitted or chosen on, by its id.

    Raises:
      InputError: a model is not usable, or differs from the first in more than its seed.
    """

    def __init__(
        self,
        *models: str | Path | TrainedModel | OnnxModel,
        dropout_samples: int = 0,
        attribution: Method = "attention",
        region_share: float = 1.0,
    ):
        check_region_share(region_share)
        ensemble = _load(models, dropout_samples, attribution)
        self.models, self.dropout_samples, self.attribution = ensemble.models, dropout_samples, attribution
        self.tiling, self.classes, self.target = ensemble.tiling, ensemble.classes, ensemble.target
        self.unit, self.split_of, self.model_id = ensemble.unit, ensemble.split_of, ensemble.model_id
        self.members = ensemble.members
        self._bundle_id, self._keys, self._settings = ensemble.bundle_id, ensemble.keys, ensemble.settings
        self.region_share = region_share
        if region_share < 1:
            self._settings = {**ensemble.settings, "region share": region_share}
        self._visible_slots = self.tiling.slots_of(ensemble.magnifications or ())

    def predicted_by(self, calibration: Calibration | None = None) -> PredictedBy:
        """The ids of what predicts."""
        pipeline = pipeline_id(self._settings, calibration)
        return PredictedBy(self.model_id, self._bundle_id, pipeline, self.split_of, self.target)

    def predict(self, slide: Slide, threads: int) -> SlidePrediction:
        """Predicts one open slide; `threads` decode its tiles. Raises SlideError."""
        return self.predict_encoded([self.encode(slide, threads)])[0]

    def encode(self, slide: Slide, threads: int) -> EncodedSlide:
        """Encodes an open slide; `threads` decode its tiles ahead of the encoder. Raises SlideError, JaxRuntimeError."""
        encoding = self.begin(slide)
        for result in encode_regions(self.members, encoding.shards(slide, threads, None)):
            if isinstance(result, tuple):
                raise result[1]
            encoding.add(result.regions, result.features)
        return encoding.finished()

    def begin(self, slide: Slide) -> SlideEncoding:
        """Plans an open slide's tiles and estimates its stain. Raises SlideError."""
        start = time.monotonic()
        plan = plan_tiles(slide, self.tiling)
        planned = time.monotonic()
        stains = [member.stain_of(slide, plan) for member in self.members]
        transform = _transform(slide, plan)
        plan = select_regions(plan, slide.info.size[0], self.region_share)
        seconds = {"plan": planned - start, "stain": time.monotonic() - planned}
        sizes = [member.feature_size for member in self.members]
        return SlideEncoding(plan, slide.info.synthetic, stains, transform, self._visible_slots, sizes, seconds)

    def compile_ahead(self, encoding: SlideEncoding, regions: int | None = None) -> None:
        """Compiles the programs that a slide needs, or one with another number of regions, unless that was done."""
        params = encoding.plan.params
        tile_shape = (params.slots, params.tile_px, params.tile_px, 3)
        for member, stain in zip(self.members, encoding.stains, strict=True):
            member.compile_ahead(regions or len(encoding.plan.origin), tile_shape, stain)

    @property
    def feature_bytes(self) -> int:
        """The bytes of one tile's features by all members."""
        return sum(member.feature_size for member in self.members) * np.dtype(np.float32).itemsize

    def predict_encoded(self, slides: Sequence[EncodedSlide]) -> list[SlidePrediction]:
        """Predicts slides as one bag: they share the prediction, and each gets the attention of its regions."""
        begun = time.monotonic()
        position = separate_slides([(slide.plan.origin / slide.plan.region_px).astype(np.float32) for slide in slides])
        mask = np.concatenate([slide.mask for slide in slides])
        features = [np.concatenate(of_slides) for of_slides in zip(*(slide.features for slide in slides), strict=True)]
        prediction, attribution = self.pool(features, mask, np.concatenate(position))
        seconds = {"pool": time.monotonic() - begun}
        predictions = []
        by_slide = split_by_slide(prediction, attribution, [len(slide.mask) for slide in slides])
        for slide, (slide_prediction, slide_attribution) in zip(slides, by_slide, strict=True):
            predictions.append(
                SlidePrediction(
                    slide_prediction,
                    slide.plan.origin,
                    slide.plan.region_px,
                    slot_boxes(slide.plan.params),
                    slide.mask,
                    slide.synthetic,
                    slide.seconds | seconds,
                    slide_attribution,
                    slide.qc,
                    tissue_colour(slide.plan.thumbnail, slide.plan.tissue_mask),
                )
            )
        return predictions

    def pool(
        self,
        features: Sequence[Float32[np.ndarray, "region slot feature"]],
        mask: Bool[np.ndarray, "region slot"],
        position: Float32[np.ndarray, "region 2"],
    ) -> tuple[Prediction, Float[np.ndarray, "region slot map"]]:
        """Predicts one bag from each member's features, and attributes the classes to its instances (`pool_bag`)."""
        bags = [(of_member, mask, position) for of_member in features]
        return pool_bag(self.members, bags, self.attribution, self._keys)


def _load(
    models: Sequence[str | Path | TrainedModel | OnnxModel], dropout_samples: int, attribution: Method
) -> Ensemble:
    trained = [model for model in models if not isinstance(model, OnnxModel)]
    exported = [model for model in models if isinstance(model, OnnxModel)]
    if exported:
        return load_onnx_ensemble(exported, dropout_samples, attribution)
    from crcjax.predict.member import load_ensemble  # loads JAX

    return load_ensemble(trained, dropout_samples, attribution)


def _transform(slide: Slide, plan: TilePlan) -> Transform | None:
    """The stain normalisation of a slide's tiles before they are encoded; None without one. Raises SlideError."""
    if plan.params.stain is None:
        return None
    from crcjax.slides.stain.normalisation import slide_stain  # loads JAX

    return slide_stain(slide, plan)
