"""Trained runs, ready to predict slides."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from crcjax.data.case_bags import separate_slides
from crcjax.errors import InputError
from crcjax.models.heads import BY_DENSITY
from crcjax.models.mil import Params, Prediction, abstract_model, combine
from crcjax.parallel.compilation_cache import use_compilation_cache
from crcjax.parallel.mesh import local_mesh, replicated
from crcjax.predict.attribution import Method, attention_for, attributor
from crcjax.predict.feature_density import load_density, summary
from crcjax.predict.forward import Forward
from crcjax.runs.checkpoint import restore_params
from crcjax.runs.run_directory import Run, open_run
from crcjax.slides.preprocess.tile_slides import read_shards
from crcjax.slides.stain.methods import StainEstimate
from crcjax.slides.stain.normalisation import slide_stain
from crcjax.slides.tiling.plan import TilePlan, TilingParams, plan_tiles
from crcjax.slides.wsi.slide import Slide

# Of one bag its features, mask and positions.
PooledBag = tuple[
    Float32[np.ndarray, "region slot feature"], Bool[np.ndarray, "region slot"], Float32[np.ndarray, "region 2"]
]


@dataclass(frozen=True)
class EncodedSlide:
    """What members' encoders say of a slide's regions (level-0 px), and the seconds of each stage."""

    features: list[Float32[np.ndarray, "region slot feature"]]
    plan: TilePlan
    mask: Bool[np.ndarray, "region slot"]
    synthetic: bool
    seconds: dict[str, float]


@dataclass(frozen=True)
class SlidePrediction:
    """One slide's prediction, where its regions lie (corner and side in level-0 px), and the seconds of each stage."""

    prediction: Prediction
    origin: Int32[np.ndarray, "region 2"]
    region_px: float
    mask: Bool[np.ndarray, "region slot"]
    synthetic: bool
    seconds: dict[str, float]
    attribution: Float[np.ndarray, "region slot"]  # what each instance did for the class that is called

    @property
    def probs(self) -> Float[np.ndarray, " class"]:
        return np.asarray(self.prediction.probs[0], np.float64)


class Predictor:
    """The best checkpoints of one run or several, a deep ensemble, with the tiling that they were trained on.

    With `dropout_samples`, each predicts as often with dropout. `attribution` says how evidence is laid on instances.
    `split_of` holds the ids of the slides and cases that a run was fitted or chosen on. Raises InputError if a run is not
    usable, or does not go with the first.
    """

    def __init__(self, *runs: str | Path, dropout_samples: int = 0, attribution: Method = "attention"):
        opened = [open_run(run) for run in runs]
        first = opened[0]
        for run in opened:
            if run.config.model.imported_features:
                raise InputError(
                    f"{run.path}: was trained on imported features, and the weights of {run.config.model.encoder} that made "
                    "them are not known: it cannot predict slides, but what was imported of them, by --store"
                )
        self.tiling: TilingParams = first.tiling
        self.classes: tuple[str, ...] = tuple(first.config.data.classes)
        self.unit: str = first.config.data.unit
        self._seen = self.tiling.slots_of(first.config.data.magnifications)
        check_go_together(opened)
        self._keys = dropout_keys(opened, dropout_samples)
        self.split_of = used_for(opened)
        self.attribution = attribution
        self.members = [Member(run, attribution) for run in opened]
        self.model_id = ensemble_id(self.members, dropout_samples)

    def predict(self, slide: Slide, threads: int) -> SlidePrediction:
        """The prediction of an open slide alone. Raises SlideError."""
        return self.predict_encoded([self.encode(slide, threads)])[0]

    def encode(self, slide: Slide, threads: int) -> EncodedSlide:
        """An open slide's features; `threads` decode ahead of the encoder. Raises SlideError."""
        start = time.monotonic()
        plan = plan_tiles(slide, self.tiling)
        seconds = {"plan": time.monotonic() - start, "wait": 0.0, "encode": 0.0}
        normalisers = [member.forward.normaliser for member in self.members]
        stains = [normaliser.of_slide(slide, plan) if normaliser else None for normaliser in normalisers]
        transform = slide_stain(slide, plan)
        seconds["stain"] = time.monotonic() - start - seconds["plan"]
        features: list[list[np.ndarray]] = [[] for _ in self.members]
        masks = []
        shards = self._timed(read_shards(slide, plan, threads, transform=transform), seconds, "wait")
        for _, tiles in shards:
            begun = time.monotonic()
            for member, stain, parts in zip(self.members, stains, features, strict=True):
                parts.extend(member.encode(tiles.pixels, stain))
            masks.append(tiles.mask & self._seen)
            seconds["encode"] += time.monotonic() - begun
        whole = [np.concatenate(parts) for parts in features]
        return EncodedSlide(whole, plan, np.concatenate(masks), slide.info.synthetic, seconds)

    def predict_encoded(self, slides: Sequence[EncodedSlide]) -> list[SlidePrediction]:
        """The prediction of slides as one bag: the same for each, but that each has its own part of the attention."""
        begun = time.monotonic()
        position = separate_slides([(slide.plan.origin / slide.plan.region_px).astype(np.float32) for slide in slides])
        mask = np.concatenate([slide.mask for slide in slides])
        features = [np.concatenate(parts) for parts in zip(*(slide.features for slide in slides), strict=True)]
        prediction, attribution = self.pool(features, mask, np.concatenate(position))
        seconds = {"pool": time.monotonic() - begun}
        predictions = []
        parts = by_slide(prediction, attribution, [len(slide.mask) for slide in slides])
        for slide, (part, own) in zip(slides, parts, strict=True):
            where = slide.plan.origin, slide.plan.region_px, slide.mask
            predictions.append(SlidePrediction(part, *where, slide.synthetic, slide.seconds | seconds, own))
        return predictions

    def pool(
        self,
        features: Sequence[Float32[np.ndarray, "region slot feature"]],
        mask: Bool[np.ndarray, "region slot"],
        position: Float32[np.ndarray, "region 2"],
    ) -> tuple[Prediction, Float[np.ndarray, "region slot"]]:
        """The prediction of one bag from each member's features, and the attribution of the class that it calls."""
        return pooled(self.members, [(part, mask, position) for part in features], self.attribution, self._keys)

    @staticmethod
    def _timed(shards: Iterator, seconds: dict[str, float], stage: str) -> Iterator:
        """Passes shards on and adds up how long each was waited for: decoding that the encoder did not hide."""
        while True:
            begun = time.monotonic()
            shard = next(shards, None)
            seconds[stage] += time.monotonic() - begun
            if shard is None:
                return
            yield shard


class Member:
    """One run's model with its parameters on the devices; with `stored`, for stored features instead of pixels."""

    def __init__(self, run: Run, attribution: Method, stored: bool = False):
        use_compilation_cache()
        config = run.config
        model = abstract_model(config.model, len(config.data.classes), run.tiling.factors)
        params, self.step = restore_params(run.path, model)
        self._density = load_density(run.path) if config.model.head == BY_DENSITY else None
        self.model_id = model_id_of(params | {"density": vars(self._density)} if self._density else params)
        mesh = local_mesh()
        self.forward = Forward(
            model, config.data.region_buckets, config.data.regions_per_bag, mesh, run.normaliser, stored
        )
        self.params = jax.device_put(params, replicated(mesh))
        self.attribute = None if attribution == "attention" else attributor(model, attribution)

    def encode(
        self, pixels: UInt8[np.ndarray, "region slot y x 3"], stain: StainEstimate | None
    ) -> Iterator[np.ndarray]:
        """The features of a shard's regions, some at a time."""
        chunk = self.forward.chunk
        for chunk_pixels in (pixels[first : first + chunk] for first in range(0, len(pixels), chunk)):
            yield np.asarray(self.forward.encode(self.params, chunk_pixels, stain))[: len(chunk_pixels)]

    def pool(self, bag: PooledBag, key: Array | None = None) -> Prediction:
        """The prediction of one bag; with a key, with dropout."""
        prediction = self.forward.pool(self.params, *bag, key)
        return self._density.tempered(prediction, summary(*bag[:2])[None]) if self._density else prediction

    def attribution(self, bag: PooledBag, target: int) -> Float32[np.ndarray, "region slot"]:
        """What each instance did for a class, by gradients or occlusion."""
        assert self.attribute is not None
        padded = (part[0] for part in self.forward.padded(*bag))
        return np.asarray(self.attribute(self.params, *padded, target))[: len(bag[0])]


def pooled(
    members: Sequence[Member], bags: Sequence[PooledBag], method: Method, keys: Sequence[Array | None] = (None,)
) -> tuple[Prediction, Float[np.ndarray, "region slot"]]:
    """The prediction of one bag from what each member has of it, and what its instances did for the class that is called.

    With `keys` each member predicts as often with dropout.
    """
    both = list(zip(members, bags, strict=True))
    combined = combine([member.pool(bag, key) for member, bag in both for key in keys])
    target = int(np.argmax(combined.probs[0]))
    if method == "attention":
        return combined, attention_for(combined, target)
    return combined, np.mean([member.attribution(bag, target) for member, bag in both], axis=0)


def by_slide(
    prediction: Prediction, attribution: Float[np.ndarray, "region slot"], regions: Sequence[int]
) -> Iterator[tuple[Prediction, Float[np.ndarray, "_ slot"]]]:
    """Splits a bag's prediction by slide; `regions` are the regions of each. Only attention and attribution differ."""
    ends = np.cumsum(regions)
    for own in (slice(end - count, end) for count, end in zip(regions, ends, strict=True)):
        part = replace(
            prediction,
            region_attention=prediction.region_attention[:, own],
            slot_attention=prediction.slot_attention[:, own],
            class_attention=prediction.class_attention[:, own],
        )
        yield part, attribution[own]


def check_go_together(runs: Sequence[Run]) -> None:
    """Raises InputError if a run cannot be of one ensemble with the first."""
    first = runs[0]
    for other in runs[1:]:
        differing = [
            name
            for name, one, two in (
                ("tiling", first.tiling, other.tiling),
                ("config.data.classes", first.config.data.classes, other.config.data.classes),
                ("config.data.unit", first.config.data.unit, other.config.data.unit),
                ("config.data.magnifications", first.config.data.magnifications, other.config.data.magnifications),
                ("config.model", first.config.model, other.config.model),
            )
            if one != two
        ]
        if differing:
            raise InputError(
                f"{other.path}: another {' and '.join(differing)} than {first.path}; give runs that differ in their seed"
            )


def dropout_keys(runs: Sequence[Run], samples: int) -> list[Array | None]:
    """Returns the keys of `samples` predictions with dropout by each run, or [None] for one without. Raises InputError."""
    if samples and not runs[0].config.model.dropout:
        raise InputError(f"{runs[0].path}: was trained without dropout; predict without --dropout-samples")
    return [jax.random.fold_in(jax.random.key(0), sample) for sample in range(samples)] or [None]


def ensemble_id(members: Sequence[Member], dropout_samples: int) -> str:
    """What predictions and calibrations call the model by."""
    return "+".join(member.model_id for member in members) + (f" dropout {dropout_samples}" if dropout_samples else "")


def used_for(runs: Sequence[Run]) -> dict[str, str]:
    """What the ensemble used slides and cases for: one that a member was fitted on is none that all can be judged on."""
    return {name: split for split in ("val", "train") for run in runs for name in run.ids(split)}


def model_id_of(params: Params) -> str:
    """The first 12 hex digits of the SHA-256 of the parameters, by name."""
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(value).tobytes())
    return digest.hexdigest()[:12]
