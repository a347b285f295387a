"""Batches of bags: the regions of several slides, padded to one shape."""

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
    """A batch of bags; each contains regions of one slide or one case.

    Arrays are NumPy's on the host, JAX's on the devices, and shapes where a program is compiled without data.

    Attributes:
      tiles: pixels (y x 3, 8 bits) or stored features.
      mask: False for padding and for tiles that the store masks.
      position: (x, y) of each region, in sides of a region.
      label: class index of each bag.
      weight: weight of each bag in the loss.
      region: index of each region in the store; -1 for padding.
      slide: index of each bag among the training slides (or cases), in the cohort's order.
      stain: stain estimate of each bag's slide, where the config needs it (`slide_stains`).
      tile_labels: tissue and artefact of each tile (`data.tile_labels`), where auxiliary tasks need them.
    """

    tiles: Num[Any, "batch region slot *tile"]
    mask: Bool[Any, "batch region slot"]
    position: Float32[Any, "batch region 2"]
    label: Int[Any, " batch"]
    weight: Float[Any, " batch"]
    region: Int[Any, "batch region"] | None = None
    slide: Int[Any, " batch"] | None = None
    stain: StainEstimate | None = None
    tile_labels: Int[Any, "batch region slot 2"] | None = None


# The fields of a Bag with an axis of regions.
_WITH_REGIONS = ("tiles", "mask", "position", "region", "tile_labels")


def bag_spec(path: tuple) -> PartitionSpec:
    """Returns the sharding of a Bag's field (`path` in the tree): bags over `data`, and their regions over `bag`."""
    return PartitionSpec("data", "bag") if path[0].name in _WITH_REGIONS else PartitionSpec("data")


@dataclass(frozen=True)
class StoredSlides:
    """A cohort with the open store and the feature reader of each of its slides; without readers, pixels are read."""

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
    padded_regions: int,
    stain: StainEstimate | None = None,
    features: Sequence[FeatureReader | CaseFeatures] = (),
    tile_labels: Sequence[Int[np.ndarray, "_ slot 2"]] = (),
) -> Bag:
    """Reads regions of several slides or cases into one batch of bags.

    Args:
      stores: the store of each slide or case.
      regions: the store indices of the regions to read from each.
      labels: the class index of each slide or case.
      padded_regions: regions of each bag in the batch, with padding.
      stain: the stain estimates of the slides, stacked.
      features: a reader for each slide or case; if empty, pixels are read.
      tile_labels: the labels of all tiles of each slide or case; if empty, the batch has none.
    """
    shape = (len(stores), padded_regions, stores[0].params.slots)
    mask = np.zeros(shape, bool)
    position = np.zeros((len(stores), padded_regions, 2), np.float32)
    region = np.full((len(stores), padded_regions), -1, np.int32)
    if features:
        tiles = _recycled_array((*shape, features[0].width), features[0].dtype)
    else:
        tiles = _recycled_array((*shape, *(stores[0].params.tile_px,) * 2, 3), np.dtype(np.uint8))
    readers = [reader.read for reader in features] or [store.read_pixels for store in stores]
    for i, (store, read, indices) in enumerate(zip(stores, readers, regions, strict=True)):
        # Tiles are decoded into their place in the batch, without a copy.
        read(indices, tiles[i, : len(indices)])
        tiles[i, len(indices) :] = 0
        mask[i, : len(indices)] = store.mask[indices]
        position[i, : len(indices)] = store.origin[indices] / store.region_px
        region[i, : len(indices)] = indices
    padded_labels = np.full((*shape, 2), UNKNOWN, np.int8)
    for i, slide_labels in enumerate(tile_labels):
        padded_labels[i, : len(regions[i])] = slide_labels[regions[i]]
    weight = np.ones(len(stores), np.float32)
    batch_labels = padded_labels if tile_labels else None
    return Bag(tiles, mask, position, labels.astype(np.int32), weight, region, stain=stain, tile_labels=batch_labels)


class _RecycledMemory:
    """Memory that returns to a pool when no array on the host, and no transfer to a device, uses it any longer.

    The system clears new memory page by page, which takes a third of the time of decoding tiles into it.
    """

    def __init__(self, size: int):
        self._pool = _memory_pool(size)
        try:
            self._memory = self._pool.pop()
        except IndexError:
            unaligned = np.empty(size + 64, np.uint8)
            # On a CPU, JAX takes memory at a multiple of 64 bytes without a copy.
            first = -unaligned.ctypes.data % 64
            self._memory = unaligned[first : first + size]
        self.__array_interface__ = self._memory.__array_interface__

    def __del__(self) -> None:
        self._pool.append(self._memory)


# Two sizes: one of training, one of its evaluation.
@lru_cache(2)
def _memory_pool(size: int) -> list[np.ndarray]:
    """The unused memory of `size` bytes."""
    return []


def _recycled_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in recycled memory; its values are arbitrary."""
    return np.asarray(_RecycledMemory(math.prod(shape) * dtype.itemsize)).view(dtype).reshape(shape)


def open_slides(
    store: str, cohort: Cohort, magnifications: Collection[str] = (), encoder: str | None = None
) -> StoredSlides:
    """Opens the stores of a cohort's slides and, with an encoder, the features that it computed.

    Raises InputError like `open_stores` and `open_features`.
    """
    stores = open_stores(store, cohort, encoder is None, magnifications) if cohort.rows else []
    return StoredSlides(cohort, stores, open_features(stores, encoder, magnifications) if encoder and stores else [])


def open_stores(
    store: str, cohort: Cohort, pixels: bool = True, magnifications: Collection[str] = ()
) -> list[TileStore]:
    """Opens the store of every slide of a cohort.

    Args:
      store: the folder of tile stores.
      cohort: the slides to open.
      pixels: whether pixels will be read; a store without pixels then needs its slide.
      magnifications: the magnifications that stay visible; all others are masked. Empty keeps all.

    Raises:
      InputError: slides are not tiled, were tiled in different ways, or lack a magnification or their pixels.
    """
    tiled = set(tiled_slides(store))
    missing = [row.slide_id for row in cohort.rows if row.slide_id not in tiled]
    if missing:
        shown_ids = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise InputError(
            f"{store}: {len(missing)} of {len(cohort.rows)} slides of the cohort are not in the store ({shown_ids}); run "
            "crcjax tile for them, or take them out of the cohort"
        )
    stores = [open_store(store, row.slide_id) for row in cohort.rows]
    for slide in stores:
        if pixels:
            slide.check_slide()
        if slide.params != stores[0].params:
            raise InputError(f"{slide.path}: tiled in another way than {stores[0].path}; tile it again")
        slide.see(magnifications)
    return stores


def featured(stores: Sequence[TileStore], encoder: str) -> tuple[str, ...]:
    """The magnifications that the first slide has features of; empty if it has features of all, or of none."""
    attributes = FeatureReader(stores[0].path.parent, stores[0].slide_id, encoder).attributes
    embedded = attributes.get("magnifications", ())
    magnifications = tuple(name for name in stores[0].params.magnifications if name in embedded)
    return magnifications if len(magnifications) < len(stores[0].params.magnifications) else ()


def open_features(
    stores: Sequence[TileStore], encoder: str, magnifications: Collection[str] = ()
) -> list[FeatureReader]:
    """Opens the features that an encoder computed of every slide, at the given magnifications or at all of the store.

    Raises InputError for a slide without features, with features by other weights than the first slide's, or without
    features of a magnification.
    """
    readers = [FeatureReader(store.path.parent, store.slide_id, encoder) for store in stores]
    check_features(readers, stores, magnifications)
    return readers


def check_features(
    readers: Sequence[FeatureReader], stores: Sequence[TileStore], magnifications: Collection[str] = ()
) -> None:
    """Raises InputError: features were made by other weights than the first slide's, or lack one of the magnifications."""
    first = readers[0]
    for reader, store in zip(readers, stores, strict=True):
        for name in ("weights_sha256", "dtype", "stated_encoder", "width"):
            if reader.attributes.get(name) != first.attributes.get(name):
                raise InputError(
                    f"{reader.path}: its features have the {name} {reader.attributes.get(name)}, those of {first.path} "
                    f"{first.attributes.get(name)}, and a run needs one for all; leave one of these slides out of the "
                    "cohort, or delete the features that you do not want and run crcjax embed as for the others"
                )
        required, embedded = magnifications or store.params.magnifications, reader.attributes.get("magnifications", ())
        if not set(required) <= set(embedded):
            raise InputError(
                f"{reader.path}: has features of {', '.join(embedded) or 'no magnification'}, and the run needs "
                f"{', '.join(required)}; set config.data.magnifications to use these features, or to replace them delete "
                f"the folder and run crcjax embed --mag {','.join(required)}"
            )


def slide_stains(
    stores: Sequence[TileStore], config: ConfigDict, normaliser: StainNormaliser | None
) -> list[StainEstimate]:
    """Each slide's stain estimate: the normaliser's, or Macenko's for augmentation and the stain task.

    The list is empty if `config` (the whole config) does not need estimates. Raises InputError for a damaged store, and
    for tiles whose stains were normalised already.
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
    needs_estimates = config.augment.stain_swap_prob or config.tasks.stain or (config.augment.hed and not normalised)
    return [stored_estimate(store, "macenko") for store in stores] if needs_estimates else []


def label_of(row: SlideRow, classes: Sequence[str]) -> int:
    """The index of a slide's class. Raises InputError if it is unlabelled."""
    if row.label is None:
        raise InputError(f"slide {row.slide_id} of the cohort has no label; fill it in, or give it no split")
    return tuple(classes).index(row.label)
