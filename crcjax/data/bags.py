"""Bags of several slides, padded to one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from crcjax.data.cohort import Cohort, SlideRow
from crcjax.errors import InputError
from crcjax.slides.store import TileStore, open_store, tiled_slides


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bag:
    """Some slides' regions; `mask` is False for padding and for tiles that the store masks. On the host, of NumPy arrays."""

    pixels: UInt8[Array | np.ndarray, "batch region slot y x 3"]
    mask: Bool[Array | np.ndarray, "batch region slot"]
    position: Float32[Array | np.ndarray, "batch region 2"]  # (x, y) in sides of a region
    label: Int[Array | np.ndarray, " batch"]
    weight: Float[Array | np.ndarray, " batch"]  # of each bag in the loss


def read_bag(
    stores: Sequence[TileStore],
    regions: Sequence[Int[np.ndarray, " _"]],
    labels: Int[np.ndarray, " batch"],
    padded: int,
) -> Bag:
    """The chosen regions of each slide, padded to `padded` regions."""
    params = stores[0].params
    shape = (len(stores), padded, params.slots)
    pixels = np.zeros((*shape, params.tile_px, params.tile_px, 3), np.uint8)
    mask = np.zeros(shape, bool)
    position = np.zeros((len(stores), padded, 2), np.float32)
    for i, (store, chosen) in enumerate(zip(stores, regions, strict=True)):
        pixels[i, : len(chosen)] = store.read_pixels(chosen)
        mask[i, : len(chosen)] = store.mask[chosen]
        position[i, : len(chosen)] = store.origin[chosen] / store.region_px
    return Bag(pixels, mask, position, labels.astype(np.int32), np.ones(len(stores), np.float32))


def open_stores(store: str, cohort: Cohort) -> list[TileStore]:
    """The store of every slide of the cohort. Raises InputError: slides not tiled, or in different ways."""
    tiled = set(tiled_slides(store))
    missing = [row.slide_id for row in cohort.rows if row.slide_id not in tiled]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise InputError(
            f"{store}: {len(missing)} of {len(cohort.rows)} slides of the cohort are not in the store ({shown}); run "
            "crcjax tile for them, or take them out of the cohort"
        )
    stores = [open_store(store, row.slide_id) for row in cohort.rows]
    for opened in stores:
        opened.check_slide()
        if opened.params != stores[0].params:
            raise InputError(f"{opened.path}: tiled in another way than {stores[0].path}; tile it again")
    return stores


def label_of(row: SlideRow, classes: Sequence[str]) -> int:
    """The index of a slide's class. Raises InputError if it is unlabelled."""
    if row.subtype is None:
        raise InputError(f"slide {row.slide_id} of the cohort has no subtype; fill it in, or give it no split")
    return tuple(classes).index(row.subtype)
