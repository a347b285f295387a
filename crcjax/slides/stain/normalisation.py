"""Normalises every slide of a run to one reference's stain, with estimates from sampled tiles that the store keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, UInt8

from crcjax.errors import InputError
from crcjax.slides.stain.methods import METHODS, StainEstimate, normalise
from crcjax.slides.store.tile_store import TileStore, open_store
from crcjax.slides.tiling.plan import TilePlan, TilingParams, plan_tiles
from crcjax.slides.tiling.quality_control import QUALITY_NAMES
from crcjax.slides.tiling.read import read_regions
from crcjax.slides.wsi.slide import Slide, open_slide

STANDARD = "standard"
_SAMPLED_REGIONS, _SAMPLED_PIXELS = 48, 512  # regions of a slide, and pixels of each region
_SEED = 0
_TRACE = 0.005  # fraction of a tile
_BATCH_PX = 32 << 16  # pixels of the tiles that are normalised at a time

Tiles = UInt8[np.ndarray, "region slot y x 3"]
TileMask = Bool[np.ndarray, "region slot"]


@dataclass(frozen=True)
class StainNormaliser:
    """One of methods.METHODS with the reference to which every slide is normalised."""

    method: str
    reference: StainEstimate

    def __call__(
        self, pixels: UInt8[Array | np.ndarray, "*tile y x 3"], source: StainEstimate
    ) -> UInt8[Array, "*tile y x 3"]:
        """Normalises tiles of the slide with the estimate `source`; to be jitted together with the model."""
        return normalise(self.method, pixels, source, self.reference)

    def batch(
        self, pixels: UInt8[Array, "batch *tiles y x 3"], source: StainEstimate
    ) -> UInt8[Array, "batch *tiles y x 3"]:
        """Normalises tiles of several slides, or regions; their estimates have the same leading axis."""
        return jax.vmap(self)(pixels, source)

    def of_store(self, store: TileStore) -> StainEstimate:
        """A tiled slide's estimate. Raises InputError like `stored_estimate`, and if its tiles are already normalised."""
        if store.params.stain:
            done = store.params.stain["method"]
            raise InputError(f"{store.path}: was normalised ({done}) when it was tiled; set config.stain.method none")
        return stored_estimate(store, self.method)

    def of_slide(self, slide: Slide, plan: TilePlan) -> StainEstimate:
        """An open slide's estimate, equal to that of its lossless store. Raises SlideError."""
        chosen = _sampled_regions(len(plan.origin))
        read = [read_regions(slide, plan, index, index + 1) for index in chosen]
        tiles, mask, scores = (
            np.concatenate([getattr(part, name) for part in read]) for name in ("pixels", "mask", "quality")
        )
        return _fit(self.method, tiles, _spotless(mask, scores), plan.params, plan.tissue.white)

    def to_json(self) -> dict:
        """Plain values for runs."""
        return {"method": self.method, "reference": _to_json(self.reference)}

    @classmethod
    def from_json(cls, values: dict) -> StainNormaliser:
        """The inverse of `to_json`."""
        return cls(values["method"], _from_json(values["method"], values["reference"]))


@dataclass(frozen=True)
class SlideStain:
    """A slide's estimates by method; normalises its tiles to the reference of its tiling (`TilingParams.stain`)."""

    normaliser: StainNormaliser
    estimates: dict[str, StainEstimate]

    def __call__(self, tiles: UInt8[np.ndarray, "tile y x 3"]) -> UInt8[np.ndarray, "tile y x 3"]:
        """Normalises tiles in batches of one size, so that memory does not grow and one compiled program serves all."""
        batch_tiles = max(1, _BATCH_PX // (tiles.shape[1] * tiles.shape[2]))
        parts = [tiles[first : first + batch_tiles] for first in range(0, len(tiles), batch_tiles)]
        method, reference = self.normaliser.method, self.normaliser.reference
        source = self.estimates[method]
        padded = [np.pad(part, ((0, batch_tiles - len(part)), (0, 0), (0, 0), (0, 0))) for part in parts]
        return np.concatenate([_normalised(method, part, source, reference) for part in padded])[: len(tiles)]

    def files(self) -> dict[str, str]:
        """The estimates as files of the store; they cannot be estimated from its normalised tiles later."""
        return {f"stain/{method}.json": _text(estimate) for method, estimate in self.estimates.items()}


_normalised = jax.jit(normalise, static_argnums=0)


def slide_stain(slide: Slide, plan: TilePlan) -> SlideStain | None:
    """The normalisation of an open slide's tiles to the reference of its tiling; None without one. Raises SlideError."""
    if plan.params.stain is None:
        return None
    normaliser = StainNormaliser.from_json(plan.params.stain)
    # The overview compares slides by Macenko's estimate.
    methods = dict.fromkeys((normaliser.method, "macenko"))
    return SlideStain(normaliser, {name: replace(normaliser, method=name).of_slide(slide, plan) for name in methods})


def reference_stain(method: str, slide: str | Path | None, params: TilingParams, mpp: float | None = None) -> dict:
    """`TilingParams.stain` for one of methods.METHODS: normalisation to the published reference, or to the stain of a slide file.

    Raises InputError if the slide's stains cannot be distinguished, SlideError.
    """
    if slide is None:
        return StainNormaliser(method, METHODS[method][1]).to_json()
    with open_slide(slide, fallback_mpp=mpp) as opened:
        estimate = StainNormaliser(method, METHODS[method][1]).of_slide(opened, plan_tiles(opened, params))
    return StainNormaliser(method, _reliable(estimate, str(slide))).to_json()


def _reliable(estimate: StainEstimate, name: str) -> StainEstimate:
    if not bool(estimate.reliable):
        raise InputError(f"{name}: its stains cannot be distinguished; choose another slide as the reference")
    return estimate


def stain_normaliser(method: str, reference: str, store: str | Path) -> StainNormaliser | None:
    """None for the method "none". `reference` is "standard" or the id of a slide in the store.

    Raises InputError for another method, a slide that is not in the store, or one whose stains cannot be distinguished.
    """
    if method == "none":
        return None
    if method not in METHODS:
        raise InputError(f"config.stain.method {method!r}: choose one of none, {', '.join(METHODS)}")
    if reference == STANDARD:
        return StainNormaliser(method, METHODS[method][1])
    estimate = stored_estimate(open_store(store, reference), method)
    return StainNormaliser(method, _reliable(estimate, f"config.stain.reference {reference}"))


def stored_estimate(store: TileStore, method: str) -> StainEstimate:
    """A tiled slide's estimate by one of methods.METHODS, read from its store, or computed and stored there.

    Raises InputError if the store is damaged, or its tiles cannot be read.
    """
    path = store.path / "stain" / f"{method}.json"
    try:
        return _from_json(method, json.loads(path.read_text()))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it, and it is made anew") from error
    if store.params.stain:
        raise InputError(f"{path}: is missing, and the tiles kept are normalised ones; tile the slide again")
    chosen = _sampled_regions(len(store.origin))
    white, usable_tiles = store.attributes["white"], _spotless(store.mask[chosen], store.quality[chosen])
    estimate = _fit(method, store.read_pixels(chosen), usable_tiles, store.params, white)
    partial = path.with_name(f".{method}.{os.getpid()}")
    with suppress(OSError):  # every run estimates again if the store is read-only
        path.parent.mkdir(exist_ok=True)
        partial.write_text(_text(estimate))
        partial.rename(path)
    return estimate


def _sampled_regions(count: int) -> list[int]:
    """Samples regions evenly over the slide, so that neither a stain's gradient nor one unusual place decides."""
    return np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_REGIONS)).round().astype(int)).tolist()


def _spotless(mask: TileMask, scores: Float32[np.ndarray, "region slot score"]) -> TileMask:
    """True for the kept tiles without a trace of ink, bubbles or blood; all kept tiles if every one has a trace.

    Such traces do not harm a model, but an estimate depends on extreme colours.
    """
    traces = scores[..., [QUALITY_NAMES.index(name) for name in ("pen", "bubble", "blood")]]
    spotless = mask & (traces < _TRACE).all(axis=-1)
    return spotless if spotless.any() else mask


def _fit(method: str, tiles: Tiles, mask: TileMask, params: TilingParams, white: Sequence[float]) -> StainEstimate:
    """Fits a method to pixels of the finest unmasked magnification of each region, where stains are the least mixed."""
    rng = np.random.default_rng(_SEED)
    last = np.cumsum(np.square(params.factors))
    pixels = np.zeros((_SAMPLED_REGIONS, _SAMPLED_PIXELS, 3), np.uint8)
    is_sampled = np.zeros((_SAMPLED_REGIONS, _SAMPLED_PIXELS), bool)
    for i, (region, usable) in enumerate(zip(tiles, mask, strict=True)):
        if usable.any():
            finest = int(np.searchsorted(last, np.flatnonzero(usable)[-1], side="right"))
            first = last[finest] - params.factors[finest] ** 2
            shown = region[first : last[finest]][usable[first : last[finest]]].reshape(-1, 3)
            pixels[i], is_sampled[i] = shown[rng.integers(len(shown), size=_SAMPLED_PIXELS)], True
    fit, _ = METHODS[method]
    estimate = fit(pixels.reshape(-1, 3), is_sampled.reshape(-1), np.asarray(white, np.float32))
    return jax.device_get(estimate)


def _text(estimate: StainEstimate) -> str:
    return json.dumps(_to_json(estimate), indent=1) + "\n"


def _to_json(estimate: StainEstimate) -> dict:
    return {field.name: np.asarray(getattr(estimate, field.name)).tolist() for field in fields(estimate)}


def _from_json(method: str, values: dict) -> StainEstimate:
    kind = type(METHODS[method][1])
    arrays = {name: np.asarray(value, bool if name == "reliable" else np.float32) for name, value in values.items()}
    return kind(**arrays)
