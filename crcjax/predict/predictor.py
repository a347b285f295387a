"""Loads one trained run or an ensemble and predicts open slides."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from crcjax.data.case_bags import separate_slides
from crcjax.errors import InputError
from crcjax.models.encoders.registry import has_published_encoder
from crcjax.models.mil import Prediction, abstract_model, combine
from crcjax.parallel.compilation_cache import use_compilation_cache
from crcjax.parallel.mesh import local_mesh, replicated
from crcjax.predict.attribution import Method, attention_for, attributor
from crcjax.predict.feature_density import density_of, summary
from crcjax.predict.forward import EncodedBag, Forward
from crcjax.predict.provenance import PredictedBy, pipeline_id
from crcjax.runs.trained_model import (
    TrainedModel,
    check_ensemble,
    ensemble_id,
    model_id_of,
    model_of_run,
    split_by,
)
from crcjax.slides.preprocess.tile_slides import read_shards
from crcjax.slides.stain.methods import StainEstimate
from crcjax.slides.stain.normalisation import slide_stain
from crcjax.slides.tiling.plan import TilePlan, TilingParams, plan_tiles
from crcjax.slides.tiling.qc_result import QCResult
from crcjax.slides.tiling.quality_control import slide_verdict
from crcjax.slides.wsi.slide import Slide
from crcjax.validation.calibration import Calibration


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


@dataclass(frozen=True)
class SlidePrediction:
    """One slide's prediction, the corners and side of its regions in level-0 px, and the seconds of each stage."""

    prediction: Prediction
    origin: Int32[np.ndarray, "region 2"]
    region_px: float
    mask: Bool[np.ndarray, "region slot"]
    synthetic: bool
    seconds: dict[str, float]
    # The contribution of each instance to the predicted class.
    attribution: Float[np.ndarray, "region slot"]
    qc: QCResult

    @property
    def probs(self) -> Float[np.ndarray, " class"]:
        """The class probabilities."""
        return np.asarray(self.prediction.probs[0], np.float64)


class Predictor:
    """Predicts with one trained model, or with several as a deep ensemble, by the tiling of their training.

    Args:
      models: run directories, whose best checkpoints predict, or models of a bundle; they differ only by their seed.
      dropout_samples: predictions with dropout by each model; 0 predicts once without dropout.
      attribution: the method by which evidence is attributed to instances.

    Attributes:
      split_of: the split, `train` or `val`, of a slide or case that a model was fitted or chosen on, by its id.

    Raises:
      InputError: a model is not usable, or differs from the first in more than its seed.
    """

    def __init__(self, *models: str | Path | TrainedModel, dropout_samples: int = 0, attribution: Method = "attention"):
        opened = opened_models(models)
        first = opened[0]
        for model in opened:
            if model.config.model.imported_features:
                raise InputError(
                    f"{model.path}: was trained on imported features, and the weights of {model.config.model.encoder} are unknown; "
                    "import the features of the slides into a store, and predict that with --store"
                )
        self.tiling: TilingParams = first.tiling
        self.classes: tuple[str, ...] = tuple(first.config.data.classes)
        self.unit: str = first.config.data.unit
        self._visible_slots = self.tiling.slots_of(first.config.data.magnifications)
        check_ensemble(opened)
        self._keys = dropout_keys(opened, dropout_samples)
        self.split_of = split_by(opened)
        self.attribution = attribution
        self.members = [Member(model, attribution) for model in opened]
        self.model_id = ensemble_id((member.model_id for member in self.members), dropout_samples)
        self._opened, self._dropout_samples = opened, dropout_samples

    def predicted_by(self, calibration: Calibration | None = None) -> PredictedBy:
        """The ids of what predicts."""
        pipeline = pipeline_id(self._opened, self._dropout_samples, calibration)
        return PredictedBy(self.model_id, self._opened[0].bundle_id, pipeline, self.split_of)

    def predict(self, slide: Slide, threads: int) -> SlidePrediction:
        """Predicts one open slide; `threads` decode its tiles. Raises SlideError."""
        return self.predict_encoded([self.encode(slide, threads)])[0]

    def encode(self, slide: Slide, threads: int) -> EncodedSlide:
        """Encodes an open slide; `threads` decode its tiles ahead of the encoder. Raises SlideError."""
        start = time.monotonic()
        plan = plan_tiles(slide, self.tiling)
        seconds = {"plan": time.monotonic() - start, "wait": 0.0, "encode": 0.0}
        normalisers = [member.forward.normaliser for member in self.members]
        stains = [normaliser.of_slide(slide, plan) if normaliser else None for normaliser in normalisers]
        transform = slide_stain(slide, plan)
        seconds["stain"] = time.monotonic() - start - seconds["plan"]
        features: list[list[np.ndarray]] = [[] for _ in self.members]
        masks, quality, reason = [], [], []
        shards = self._timed(read_shards(slide, plan, threads, transform=transform), seconds, "wait")
        for _, tiles in shards:
            begun = time.monotonic()
            for member, stain, chunks in zip(self.members, stains, features, strict=True):
                chunks.extend(member.encode(tiles.pixels, stain))
            masks.append(tiles.mask & self._visible_slots)
            quality.append(tiles.quality)
            reason.append(tiles.reason)
            seconds["encode"] += time.monotonic() - begun
        by_member = [np.concatenate(chunks) for chunks in features]
        qc = slide_verdict(np.concatenate(quality), np.concatenate(reason), plan.params.quality, plan.params.keep_all)
        mask = np.concatenate(masks)
        return EncodedSlide(by_member, plan, mask, slide.info.synthetic, seconds, QCResult.from_json(qc))

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
                    slide.mask,
                    slide.synthetic,
                    slide.seconds | seconds,
                    slide_attribution,
                    slide.qc,
                )
            )
        return predictions

    def pool(
        self,
        features: Sequence[Float32[np.ndarray, "region slot feature"]],
        mask: Bool[np.ndarray, "region slot"],
        position: Float32[np.ndarray, "region 2"],
    ) -> tuple[Prediction, Float[np.ndarray, "region slot"]]:
        """Predicts one bag from each member's features, and attributes the predicted class to its instances."""
        bags = [(of_member, mask, position) for of_member in features]
        return pool_bag(self.members, bags, self.attribution, self._keys)

    @staticmethod
    def _timed(shards: Iterator, seconds: dict[str, float], stage: str) -> Iterator:
        """Passes shards on and adds the time of waiting for them to `seconds`: decoding that encoding did not hide."""
        while True:
            begun = time.monotonic()
            shard = next(shards, None)
            seconds[stage] += time.monotonic() - begun
            if shard is None:
                return
            yield shard


def opened_models(models: Sequence[str | Path | TrainedModel]) -> list[TrainedModel]:
    """Opens run directories; models that are open already stay as they are. Raises InputError."""
    return [model if isinstance(model, TrainedModel) else model_of_run(model) for model in models]


class Member:
    """One trained model, an ensemble member, with its parameters on the devices.

    Args:
      trained: the model.
      attribution: the method of `attribution`.
      stored: whether the bags hold stored features of a published encoder in place of pixels.

    Raises:
      InputError: the model cannot be read, or its published encoder's weights are needed and not known.
    """

    def __init__(self, trained: TrainedModel, attribution: Method, stored: bool = False):
        use_compilation_cache()
        config = trained.config
        model = abstract_model(config.model, len(config.data.classes), trained.tiling.factors)
        # Stored features need no encoder, and a bundle, which records the id, may be opened without its weights.
        without_encoder = stored and bool(trained.model_id) and has_published_encoder(config.model)
        if without_encoder:
            del model.encoder.published  # type: ignore[attr-defined]
        params, arrays = trained.restore(model), trained.density() if trained.density else None
        self._density = density_of(arrays, trained.path) if arrays else None
        self.model_id = trained.model_id if without_encoder else model_id_of(params, arrays)
        if trained.model_id and self.model_id != trained.model_id:
            raise InputError(
                f"{trained.path}: its parameters are of model {self.model_id}, and it states {trained.model_id}; export it again"
            )
        mesh = local_mesh()
        self.forward = Forward(
            model, config.data.region_buckets, config.data.regions_per_bag, mesh, trained.normaliser, stored
        )
        self.params = jax.device_put(params, replicated(mesh))
        self.attribute = None if attribution == "attention" else attributor(model, attribution)

    def encode(
        self, pixels: UInt8[np.ndarray, "region slot y x 3"], stain: StainEstimate | None
    ) -> Iterator[np.ndarray]:
        """Yields the features of a shard's regions, one chunk after the other."""
        chunk = self.forward.chunk
        for chunk_pixels in (pixels[first : first + chunk] for first in range(0, len(pixels), chunk)):
            yield np.asarray(self.forward.encode(self.params, chunk_pixels, stain))[: len(chunk_pixels)]

    def pool(self, bag: EncodedBag, key: Array | None = None) -> Prediction:
        """Predicts one bag, its evidence scaled if the run has a feature density. With a key, dropout is active."""
        prediction = self.forward.pool(self.params, *bag, key)
        return self._density.scale_evidence(prediction, summary(*bag[:2])[None]) if self._density else prediction

    def attribution(self, bag: EncodedBag, target: int) -> Float32[np.ndarray, "region slot"]:
        """The contribution of each instance to a class (nats), by gradients or occlusion."""
        assert self.attribute is not None
        padded = (array[0] for array in self.forward.padded(*bag))
        return np.asarray(self.attribute(self.params, *padded, target))[: len(bag[0])]


def pool_bag(
    members: Sequence[Member], bags: Sequence[EncodedBag], method: Method, keys: Sequence[Array | None] = (None,)
) -> tuple[Prediction, Float[np.ndarray, "region slot"]]:
    """Predicts one bag with an ensemble, and attributes the predicted class to its instances.

    Args:
      members: the ensemble members.
      bags: the bag as encoded by each member.
      method: the method of the attribution.
      keys: every member predicts once per key with dropout; the key None predicts without.

    Returns:
      The combined prediction, and the attribution averaged over the members.
    """
    member_bags = list(zip(members, bags, strict=True))
    combined = combine([member.pool(bag, key) for member, bag in member_bags for key in keys])
    target = int(np.argmax(combined.probs[0]))
    if method == "attention":
        return combined, attention_for(combined, target)
    return combined, np.mean([member.attribution(bag, target) for member, bag in member_bags], axis=0)


def split_by_slide(
    prediction: Prediction, attribution: Float[np.ndarray, "region slot"], regions: Sequence[int]
) -> Iterator[tuple[Prediction, Float[np.ndarray, "_ slot"]]]:
    """Splits the attention and attribution of a bag by slide; everything else of the prediction is shared.

    Args:
      prediction: the prediction of one bag.
      attribution: the attribution of the bag.
      regions: the number of regions of each slide.
    """
    ends = np.cumsum(regions)
    for count, end in zip(regions, ends, strict=True):
        rows = slice(end - count, end)
        slide_prediction = replace(
            prediction,
            region_attention=prediction.region_attention[:, rows],
            slot_attention=prediction.slot_attention[:, rows],
            class_attention=prediction.class_attention[:, rows],
        )
        yield slide_prediction, attribution[rows]


def dropout_keys(models: Sequence[TrainedModel], samples: int) -> list[Array | None]:
    """The keys of `samples` predictions with dropout by each model, or [None] for one prediction without.

    Raises InputError if the models were trained without dropout.
    """
    if samples and not models[0].config.model.dropout:
        raise InputError(f"{models[0].path}: was trained without dropout; predict without --dropout-samples")
    return [jax.random.fold_in(jax.random.key(0), sample) for sample in range(samples)] or [None]
