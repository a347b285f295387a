"""What tiles are known to show: areas that somebody drew in QuPath, or the painter's truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int8
from ml_collections import ConfigDict

from crcjax.data.case_bags import CaseStore
from crcjax.data.corruptions import ARTEFACTS
from crcjax.slides.store.tile_store import TileStore
from crcjax.slides.synthetic.truth import load_truth
from crcjax.slides.tiling.box_shares import box_shares
from crcjax.slides.tiling.plan import slot_boxes
from crcjax.slides.tiling.regions_of_interest import read_classes

UNKNOWN = -1
# Fractions of a tile: above the first it has that tissue, from the second it counts as corrupted.
_TISSUE, _CORRUPTED = 0.5, 0.25
# Cells of the grid that areas are rasterised on, along the side of the smallest tile.
_CELLS = 8

Labels = Int8[np.ndarray, "region slot 2"]


def bag_labels(stores: Sequence[TileStore | CaseStore], config: ConfigDict) -> list[Labels]:
    """The labels of each slide's or case's tiles if `config` (config.tasks) has a task for them, else none. Raises InputError."""
    if not config.labels or not (config.tissue or config.artefact):
        return []
    slides = [store.stores if isinstance(store, CaseStore) else (store,) for store in stores]
    return [np.concatenate([tile_labels(store, config) for store in of]) for of in slides]


def tile_labels(store: TileStore, config: ConfigDict) -> Labels:
    """The index of each tile's tissue in `config.tissue_classes` and of its artefact in ARTEFACTS, or UNKNOWN.

    Tissue is known where more than half of the tile is of one class. A tile of which artefacts spoil less than a quarter is
    unknown; one without, and a slide without a file, have none. Raises InputError for a damaged file.
    """
    shares = _shares(Path(config.labels), store)
    none = np.zeros(store.mask.shape)
    tissue = np.stack([none + _TISSUE, *(shares.get(name, none) for name in config.tissue_classes)])
    corrupted = np.stack([shares.get(name, none) for name in ARTEFACTS[1:]])
    slight = np.where(corrupted.max(axis=0) > 0, UNKNOWN, 0)
    artefact = np.where(corrupted.max(axis=0) >= _CORRUPTED, corrupted.argmax(axis=0) + 1, slight)
    return np.stack([tissue.argmax(axis=0) - 1, artefact], axis=-1).astype(np.int8)


def _shares(folder: Path, store: TileStore) -> dict[str, Float[np.ndarray, "region slot"]]:
    """The share of every tile that each area covers, by its name; none if the slide has no file."""
    geojson, truth_file = folder / f"{store.slide_id}.geojson", folder / f"{store.slide_id}.truth.npz"
    size = np.array(store.info.size)
    if geojson.exists():
        cell = slot_boxes(store.params)[:, 2].min() * store.region_px / _CELLS
        width, height = np.ceil(size / cell).astype(int).tolist()
        masks = read_classes(geojson, (height, width), store.info.size, store.info.corner)
        cells_px = size / (width, height)
    elif truth_file.exists():
        truth = load_truth(truth_file)
        masks = {name: truth.kinds == kind for kind, name in enumerate(truth.names)} | truth.artefacts
        cells_px = truth.um_per_px / np.array(store.info.mpp)
    else:
        return {}
    return {name: _covered(mask, cells_px, store) for name, mask in masks.items()}


def _covered(
    mask: Bool[np.ndarray, "y x"], cells_px: Float[np.ndarray, " 2"], store: TileStore
) -> Float[np.ndarray, "region slot"]:
    boxes = slot_boxes(store.params) * store.region_px
    corner = store.origin[:, None] + boxes[:, :2]
    return box_shares(mask, corner / cells_px, (corner + boxes[:, 2:]) / cells_px, outside_counts=False)
