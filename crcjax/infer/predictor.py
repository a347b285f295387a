"""A trained run, ready to predict slides."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32

from crcjax.models.mil import Params, Prediction, build_model
from crcjax.slides.executor import read_ahead
from crcjax.slides.reader import Slide
from crcjax.slides.tiling import TilePlan, TilingParams, plan_tiles
from crcjax.train.checkpoint import restore_params
from crcjax.train.mesh import device_mesh, replicated
from crcjax.train.run_directory import open_run
from crcjax.train.step import Forward


@dataclass(frozen=True)
class SlidePrediction:
    """One slide's prediction, where its regions lie (level-0 px), and the seconds of each stage."""

    prediction: Prediction
    plan: TilePlan
    mask: Bool[np.ndarray, "region slot"]
    synthetic: bool
    seconds: dict[str, float]

    @property
    def probs(self) -> Float[np.ndarray, " class"]:
        return np.asarray(self.prediction.probs[0], np.float64)

    @property
    def origin(self) -> Int32[np.ndarray, "region 2"]:
        return self.plan.origin


class Predictor:
    """The best checkpoint of a run with the tiling that it was trained on.

    `split_of` holds the ids of the slides and cases that the run was fitted and chosen on. Raises InputError if the run
    is not usable.
    """

    def __init__(self, run: str | Path):
        opened = open_run(run)
        config = opened.config
        self.tiling: TilingParams = opened.tiling
        self.classes: tuple[str, ...] = tuple(config.data.classes)
        self.split_of = opened.split_of
        model = build_model(config.model, len(self.classes), config.seed, self.tiling.factors)
        params, self.step = restore_params(run, model)
        self.model_id = _model_id(params)
        mesh = device_mesh()
        self._forward = Forward(model, config.data.region_buckets, config.data.regions, mesh)
        self._params = jax.device_put(params, replicated(mesh))

    def predict(self, slide: Slide, threads: int) -> SlidePrediction:
        """The prediction of an open slide; `threads` decode ahead of the encoder. Raises SlideError."""
        start = time.monotonic()
        plan = plan_tiles(slide, self.tiling)
        seconds = {"plan": time.monotonic() - start, "wait": 0.0, "encode": 0.0}
        features, masks = [], []
        shards = self._timed(read_ahead(slide, plan, threads), seconds, "wait")
        for _, tiles in shards:
            begun = time.monotonic()
            for first in range(0, len(tiles.mask), self._forward.chunk):
                pixels = tiles.pixels[first : first + self._forward.chunk]
                features.append(np.asarray(self._forward.encode(self._params, pixels))[: len(pixels)])
            masks.append(tiles.mask)
            seconds["encode"] += time.monotonic() - begun
        begun = time.monotonic()
        mask, position = np.concatenate(masks), (plan.origin / plan.region_px).astype(np.float32)
        prediction = self._forward.pool(self._params, np.concatenate(features), mask, position)
        seconds["pool"] = time.monotonic() - begun
        return SlidePrediction(prediction, plan, mask, slide.info.synthetic, seconds)

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


def _model_id(params: Params) -> str:
    """The first 12 hex digits of the SHA-256 of the parameters, by name."""
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(value).tobytes())
    return digest.hexdigest()[:12]
