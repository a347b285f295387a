"""Bags of several slides, padded to one shape."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Float32, Int, Num
from ml_collections import ConfigDict

from crcjax.data.case_bags import CaseFeatures, CaseStore
from crcjax.data.cohort import Cohort, SlideRow
from crcjax.data.tile_labels import UNKNOWN
from crcjax.errors import InputError
from crcjax.slides.stain.methods import StainEstimate
from crcjax.slides.stain.normalisation import StainNormaliser, stored_estimate
from crcjax.slides.store.features import FeatureReader
from crcjax.slides.store.tile_store import TileStore, open_store, tiled_slides


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bag:
    """The regions of some slides or cases; `mask` is False for padding and for tiles that the store masks. On the host, of NumPy arrays.

    `tiles` are pixels (y x 3, 8 bits) or stored features. On devices its arrays are JAX's; to compile for, their shapes.
    """

    tiles: Num[Any, "batch region slot *tile"]
    mask: Bool[Any, "batch region slot"]
    position: Float32[Any, "batch region 2"]  # (x, y) in sides of a region
    label: Int[Any, " batch"]
    weight: Float[Any, " batch"]  # of each bag in the loss
    region: Int[Any, "batch region"] | None = None  # its index in the store, -1 for padding
    slide: Int[Any, " batch"] | None = None  # of the training slides, in the cohort's order
    stain: StainEstimate | None = None  # of each bag's slide, if the config needs it (`slide_stains`)
    tile_labels: Int[Any, "batch region slot 2"] | None = None  # tissue and artefact (data.labels), if tasks need them


_WITH_REGIONS = ("tiles", "mask", "position", "region", "tile_labels")  # the parts of a bag with an axis of regions


def bag_spec(path: tuple) -> PartitionSpec:
    """How the part of a Bag at `path` of the tree is divided: bags over `data`, and their regions over `bag`."""
    return PartitionSpec("data", "bag") if path[0].name in _WITH_REGIONS else PartitionSpec("data")


@dataclass(frozen=True)
class StoredSlides:
    """The slides of a cohort, row by row: their open stores, and the readers of their features (empty: pixels are read)."""

    cohort: Cohort
    stores: list[TileStore]
    features: list[FeatureReader]

    def split(self, name: str) -> StoredSlides:
        """The slides of one split."""
        rows = [i for i, row in enumerate(self.cohort.rows) if row.split == name]
        features = [self.features[i] for i in rows] if self.features else []
        return StoredSlides(self.cohort.split(name), [self.stores[i] for i in rows], features)


def read_bag(
    stores: Sequence[TileStore | CaseStore],
    regions: Sequence[Int[np.ndarray, " _"]],
    labels: Int[np.ndarray, " batch"],
    padded: int,
    stain: StainEstimate | None = None,
    features: Sequence[FeatureReader | CaseFeatures] = (),
    tile_labels: Sequence[Int[np.ndarray, "_ slot 2"]] = (),
) -> Bag:
    """The chosen regions of each slide or case, padded to `padded` regions: their pixels, or each one's features if given."""
    shape = (len(stores), padded, stores[0].params.slots)
    mask = np.zeros(shape, bool)
    position = np.zeros((len(stores), padded, 2), np.float32)
    region = np.full((len(stores), padded), -1, np.int32)
    if features:
        tiles = _lent((*shape, features[0].width), features[0].dtype)
    else:
        tiles = _lent((*shape, *(stores[0].params.tile_px,) * 2, 3), np.dtype(np.uint8))
    reads = [reader.read for reader in features] or [store.read_pixels for store in stores]
    for i, (store, read, chosen) in enumerate(zip(stores, reads, regions, strict=True)):
        read(chosen, tiles[i, : len(chosen)])  # where they stay
        tiles[i, len(chosen) :] = 0
        mask[i, : len(chosen)] = store.mask[chosen]
        position[i, : len(chosen)] = store.origin[chosen] / store.region_px
        region[i, : len(chosen)] = chosen
    label_array = np.full((*shape, 2), UNKNOWN, np.int8)
    for i, of_slide in enumerate(tile_labels):
        label_array[i, : len(regions[i])] = of_slide[regions[i]]
    weight = np.ones(len(stores), np.float32)
    known = label_array if tile_labels else None
    return Bag(tiles, mask, position, labels.astype(np.int32), weight, region, stain=stain, tile_labels=known)


class _Lent:
    """Memory that is kept for the next batch of its size when no array, on the host or on its way to a device, holds it.

    New memory would be cleared by the system page by page, which takes a third of the time that decoding into it does.
    """

    def __init__(self, size: int):
        self._free = _free_memory(size)
        try:
            self._memory = self._free.pop()
        except IndexError:
            room = np.empty(size + 64, np.uint8)
            first = -room.ctypes.data % 64  # JAX on a CPU takes multiples of 64 bytes without a copy
            self._memory = room[first : first + size]
        self.__array_interface__ = self._memory.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._memory)


@lru_cache(2)  # sizes: of training, and of its evaluation
def _free_memory(size: int) -> list[np.ndarray]:
    """The memory of that many bytes that is free."""
    return []


def _lent(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of what its memory held before."""
    return np.asarray(_Lent(math.prod(shape) * dtype.itemsize)).view(dtype).reshape(shape)


def open_slides(
    store: str, cohort: Cohort, magnifications: Collection[str] = (), encoder: str | None = None
) -> StoredSlides:
    """Opens the stores of a cohort's slides, and their features by `encoder` if one is given.

    Raises InputError as `open_stores` and `open_features`.
    """
    stores = open_stores(store, cohort, encoder is None, magnifications) if cohort.rows else []
    return StoredSlides(cohort, stores, open_features(stores, encoder, magnifications) if encoder and stores else [])


def open_stores(
    store: str, cohort: Cohort, pixels: bool = True, magnifications: Collection[str] = ()
) -> list[TileStore]:
    """The store of every slide of the cohort, its pixels at hand if they are to be read; other `magnifications` are masked.

    Raises InputError: slides not tiled, or in different ways.
    """
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
        if pixels:
            opened.check_slide()
        if opened.params != stores[0].params:
            raise InputError(f"{opened.path}: tiled in another way than {stores[0].path}; tile it again")
        opened.see(magnifications)
    return stores


def featured(stores: Sequence[TileStore], encoder: str) -> tuple[str, ...]:
    """The magnifications that the first slide has features of; the empty tuple if it has those of all, or of none."""
    about = FeatureReader(stores[0].path.parent, stores[0].slide_id, encoder).attributes
    magnifications = tuple(name for name in stores[0].params.magnifications if name in about.get("magnifications", ()))
    return magnifications if len(magnifications) < len(stores[0].params.magnifications) else ()


def open_features(
    stores: Sequence[TileStore], encoder: str, magnifications: Collection[str] = ()
) -> list[FeatureReader]:
    """The features of every slide by one encoder, at those magnifications, or at all of the store.

    Raises InputError: a slide has none, they were made by other weights than the first's, or lack one of these.
    """
    readers = [FeatureReader(store.path.parent, store.slide_id, encoder) for store in stores]
    first = readers[0]
    for reader, store in zip(readers, stores, strict=True):
        for name in ("weights_sha256", "dtype", "stated_encoder", "width"):
            if reader.attributes.get(name) != first.attributes.get(name):
                raise InputError(
                    f"{reader.path}: its features have the {name} {reader.attributes.get(name)}, those of {first.path} "
                    f"{first.attributes.get(name)}, and a run needs one for all; leave one of these slides out of the "
                    "cohort, or delete the features that you do not want and run crcjax embed as for the others"
                )
        wanted, known = magnifications or store.params.magnifications, reader.attributes.get("magnifications", ())
        if not set(wanted) <= set(known):
            raise InputError(
                f"{reader.path}: has features of {', '.join(known) or 'no magnification'}, and the run needs "
                f"{', '.join(wanted)}; set config.data.magnifications to use these features, or to replace them delete "
                f"the folder and run crcjax embed --mag {','.join(wanted)}"
            )
    return readers


def slide_stains(
    stores: Sequence[TileStore], config: ConfigDict, normaliser: StainNormaliser | None
) -> list[StainEstimate]:
    """Each slide's stain estimate if it is needed, else none: the normaliser's, or Macenko's for augmentation and the task.

    Raises InputError: a store is damaged, or its tiles have another stain than the slide had.
    """
    if normaliser:
        return [normaliser.of_store(store) for store in stores]
    if config.data.features:
        return []
    normalised = next((store for store in stores if store.params.stain), None)
    if config.augment.stain_swap_prob and normalised:
        raise InputError(f"{normalised.path}: its tiles were given one stain; set config.augment.stain_swap_prob to 0")
    if config.tasks.stain and normalised:
        raise InputError(f"{normalised.path}: its tiles were given one stain; set config.tasks.stain to 0")
    known = config.augment.stain_swap_prob or config.tasks.stain or (config.augment.hed and not normalised)
    return [stored_estimate(store, "macenko") for store in stores] if known else []


def label_of(row: SlideRow, classes: Sequence[str]) -> int:
    """The index of a slide's class. Raises InputError if it is unlabelled."""
    if row.subtype is None:
        raise InputError(f"slide {row.slide_id} of the cohort has no subtype; fill it in, or give it no split")
    return tuple(classes).index(row.subtype)
