"""Every slide of a run brought to one reference's stain: estimates from a sample of its tiles, kept in its store."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Bool, UInt8

from crcjax.errors import InputError
from crcjax.slides.reader import Slide
from crcjax.slides.stain import METHODS, Estimate, normalise
from crcjax.slides.store import TileStore, open_store
from crcjax.slides.tiling import TilePlan, TilingParams, read_regions

STANDARD = "standard"
_SAMPLED_REGIONS, _SAMPLED_PIXELS = 48, 512  # of a slide, and of each of them
_SEED = 0

Tiles = UInt8[np.ndarray, "region slot y x 3"]
Kept = Bool[np.ndarray, "region slot"]


@dataclass(frozen=True)
class StainNormaliser:
    """One of stain.METHODS with the reference that every slide is brought to."""

    method: str
    reference: Estimate

    def __call__(
        self, pixels: UInt8[Array | np.ndarray, "*tile y x 3"], source: Estimate
    ) -> UInt8[Array, "*tile y x 3"]:
        """Tiles of the slide that gave `source`; to be jitted with what follows."""
        return normalise(self.method, pixels, source, self.reference)

    def batch(
        self, pixels: UInt8[Array, "batch region slot y x 3"], source: Estimate
    ) -> UInt8[Array, "batch region slot y x 3"]:
        """Tiles of several slides, whose estimates have a leading axis."""
        return jax.vmap(self)(pixels, source)

    def of_store(self, store: TileStore) -> Estimate:
        """A tiled slide's estimate. Raises InputError as `stored_estimate`."""
        return stored_estimate(store, self.method)

    def of_slide(self, slide: Slide, plan: TilePlan) -> Estimate:
        """An open slide's estimate, the same as its lossless store would give. Raises SlideError."""
        chosen = _sampled_regions(len(plan.origin))
        read = [read_regions(slide, plan, index, index + 1) for index in chosen]
        tiles, kept = (np.concatenate([getattr(part, name) for part in read]) for name in ("pixels", "mask"))
        return _fit(self.method, tiles, kept, plan.params, plan.tissue.white)

    def to_json(self) -> dict:
        """Plain values, as runs keep them."""
        return {"method": self.method, "reference": _to_json(self.reference)}

    @classmethod
    def from_json(cls, values: dict) -> StainNormaliser:
        """The inverse of `to_json`."""
        return cls(values["method"], _from_json(values["method"], values["reference"]))


def stain_normaliser(method: str, reference: str, store: str | Path) -> StainNormaliser | None:
    """None for the method "none". `reference` is "standard" or the id of a slide in the store.

    Raises InputError for another method, a slide that is not there, or one whose stains could not be told.
    """
    if method == "none":
        return None
    if method not in METHODS:
        raise InputError(f"config.stain.method {method!r}: choose one of none, {', '.join(METHODS)}")
    if reference == STANDARD:
        return StainNormaliser(method, METHODS[method][1])
    estimate = stored_estimate(open_store(store, reference), method)
    if not bool(estimate.reliable):
        raise InputError(
            f"config.stain.reference {reference}: its stains could not be told apart; choose another slide"
        )
    return StainNormaliser(method, estimate)


def stored_estimate(store: TileStore, method: str) -> Estimate:
    """A tiled slide's estimate by one of stain.METHODS, read from its store, or made and kept there.

    Raises InputError if the store is damaged, or its tiles cannot be read.
    """
    path = store.path / "stain" / f"{method}.json"
    try:
        return _from_json(method, json.loads(path.read_text()))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it, and it is made anew") from error
    chosen = _sampled_regions(len(store.origin))
    white = store.attributes["white"]
    estimate = _fit(method, store.read_pixels(chosen), store.mask[chosen], store.params, white)
    partial = path.with_name(f".{method}.{os.getpid()}")
    with suppress(OSError):  # a store that may only be read is estimated anew by every run
        path.parent.mkdir(exist_ok=True)
        partial.write_text(json.dumps(_to_json(estimate), indent=1) + "\n")
        partial.rename(path)
    return estimate


def _sampled_regions(count: int) -> list[int]:
    """Evenly over the slide, so that neither a stain's gradient nor one odd place decides."""
    return np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_REGIONS)).round().astype(int)).tolist()


def _fit(method: str, tiles: Tiles, kept: Kept, params: TilingParams, white: Sequence[float]) -> Estimate:
    """From pixels of the finest magnification that each region has kept, where stains are the least mixed."""
    rng = np.random.default_rng(_SEED)
    last = np.cumsum(np.square(params.factors))
    pixels = np.zeros((_SAMPLED_REGIONS, _SAMPLED_PIXELS, 3), np.uint8)
    mask = np.zeros((_SAMPLED_REGIONS, _SAMPLED_PIXELS), bool)
    for i, (region, usable) in enumerate(zip(tiles, kept, strict=True)):
        if usable.any():
            finest = int(np.searchsorted(last, np.flatnonzero(usable)[-1], side="right"))
            first = last[finest] - params.factors[finest] ** 2
            shown = region[first : last[finest]][usable[first : last[finest]]].reshape(-1, 3)
            pixels[i], mask[i] = shown[rng.integers(len(shown), size=_SAMPLED_PIXELS)], True
    fit, _ = METHODS[method]
    estimate = fit(pixels.reshape(-1, 3), mask.reshape(-1), np.asarray(white, np.float32))
    return jax.device_get(estimate)


def _to_json(estimate: Estimate) -> dict:
    return {field.name: np.asarray(getattr(estimate, field.name)).tolist() for field in fields(estimate)}


def _from_json(method: str, values: dict) -> Estimate:
    kind = type(METHODS[method][1])
    arrays = {name: np.asarray(value, bool if name == "reliable" else np.float32) for name, value in values.items()}
    return kind(**arrays)
