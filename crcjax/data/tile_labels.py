"""Labels of tiles: from areas annotated in QuPath, or from the ground truth of synthetic slides."""

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
# A tile has a tissue class above this covered fraction, and an artefact from this fraction on.
_TISSUE, _CORRUPTED = 0.5, 0.25
# Cells along the side of the smallest tile, of the grid on which areas are rasterised.
_CELLS = 8

Labels = Int8[np.ndarray, "region slot 2"]


def bag_labels(stores: Sequence[TileStore | CaseStore], config: ConfigDict) -> list[Labels]:
    """The tile labels of each slide or case; empty if `config` (config.tasks) has no task for them. Raises InputError."""
    if not config.labels or not (config.tissue or config.artefact):
        return []
    slides_by_bag = [store.stores if isinstance(store, CaseStore) else (store,) for store in stores]
    return [np.concatenate([tile_labels(slide, config) for slide in slides]) for slides in slides_by_bag]


def tile_labels(store: TileStore, config: ConfigDict) -> Labels:
    """The index of each tile's tissue in `config.tissue_classes` and of its artefact in ARTEFACTS, or UNKNOWN.

    | covered fraction of the tile | label |
    |---|---|
    | a tissue class: above 1/2 | that class |
    | every tissue class: up to 1/2 | UNKNOWN |
    | an artefact: from 1/4 | that artefact |
    | an artefact: above 0, below 1/4 | UNKNOWN |
    | no artefact, or no file of the slide | "none" |

    Raises InputError for a damaged file.
    """
    covered = _covered_fractions(Path(config.labels), store)
    zeros = np.zeros(store.mask.shape)
    # A class that covers no more than the threshold in the first row leaves the tile UNKNOWN (-1).
    tissue = np.stack([zeros + _TISSUE, *(covered.get(name, zeros) for name in config.tissue_classes)])
    corrupted = np.stack([covered.get(name, zeros) for name in ARTEFACTS[1:]])
    unknown_or_none = np.where(corrupted.max(axis=0) > 0, UNKNOWN, 0)
    artefact = np.where(corrupted.max(axis=0) >= _CORRUPTED, corrupted.argmax(axis=0) + 1, unknown_or_none)
    return np.stack([tissue.argmax(axis=0) - 1, artefact], axis=-1).astype(np.int8)


def _covered_fractions(folder: Path, store: TileStore) -> dict[str, Float[np.ndarray, "region slot"]]:
    """The fraction of every tile that the areas of each name cover; empty if the slide has no file."""
    geojson, truth_file = folder / f"{store.slide_id}.geojson", folder / f"{store.slide_id}.truth.npz"
    size = np.array(store.info.size)
    if geojson.exists():
        largest_cell_px = slot_boxes(store.params)[:, 2].min() * store.region_px / _CELLS
        width, height = np.ceil(size / largest_cell_px).astype(int).tolist()
        masks = read_classes(geojson, (height, width), store.info.size, store.info.corner)
        cell_px = size / (width, height)
    elif truth_file.exists():
        truth = load_truth(truth_file)
        masks = {name: truth.kinds == kind for kind, name in enumerate(truth.names)} | truth.artefacts
        cell_px = truth.um_per_px / np.array(store.info.mpp)
    else:
        return {}
    return {name: _covered_fraction(mask, cell_px, store) for name, mask in masks.items()}


def _covered_fraction(
    mask: Bool[np.ndarray, "y x"], cell_px: Float[np.ndarray, " 2"], store: TileStore
) -> Float[np.ndarray, "region slot"]:
    """The fraction of every tile where `mask` is True; `cell_px` is the size of its cells in level-0 px."""
    boxes = slot_boxes(store.params) * store.region_px
    corner = store.origin[:, None] + boxes[:, :2]
    return box_shares(mask, corner / cell_px, (corner + boxes[:, 2:]) / cell_px, outside_counts=False)
