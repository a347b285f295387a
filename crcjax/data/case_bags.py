"""Bags of cases: the regions of all slides of a case in one bag."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int, Num, UInt8

from crcjax.data.cohort import Cohort
from crcjax.errors import InputError
from crcjax.slides.store.features import FeatureReader
from crcjax.slides.store.tile_store import TileStore
from crcjax.slides.tiling.plan import TilingParams

UNITS = ("slide", "case")
# Distance between two slides of a case, in sides of a region: farther than neighbours, and near enough for rotary position
# embeddings to resolve.
_DISTANCE = 64.0

Read = Callable[..., np.ndarray]


@dataclass(frozen=True)
class CaseStore:
    """The slides of a case as one store.

    `origin` is in sides of a region. Slides do not overlap (`separate_slides`).
    """

    stores: tuple[TileStore, ...]
    path: Path
    params: TilingParams
    mask: Bool[np.ndarray, "region slot"]
    quality: Float32[np.ndarray, "region slot score"]
    origin: Float32[np.ndarray, "region 2"]
    region_px: float = 1.0

    def read_pixels(
        self, indices: Sequence[int] | Int[np.ndarray, " _"], out: UInt8[np.ndarray, "_ slot y x 3"] | None = None
    ) -> UInt8[np.ndarray, "_ slot y x 3"]:
        """Like `TileStore.read_pixels`."""
        sizes = [len(store.mask) for store in self.stores]
        return _read([store.read_pixels for store in self.stores], sizes, indices, out)


@dataclass(frozen=True)
class CaseFeatures:
    """The features of a case's slides as one reader; `sizes` are the regions of each slide."""

    readers: tuple[FeatureReader, ...]
    sizes: tuple[int, ...]

    @property
    def width(self) -> int:
        """Like `FeatureReader.width`."""
        return self.readers[0].width

    @property
    def dtype(self) -> np.dtype:
        """Like `FeatureReader.dtype`."""
        return self.readers[0].dtype

    def read(
        self, indices: Sequence[int] | Int[np.ndarray, " _"], out: Num[np.ndarray, "_ slot feature"] | None = None
    ) -> Num[np.ndarray, "_ slot feature"]:
        """Like `FeatureReader.read`."""
        return _read([reader.read for reader in self.readers], self.sizes, indices, out)


def by_unit(
    unit: str, cohort: Cohort, stores: Sequence[TileStore], features: Sequence[FeatureReader]
) -> tuple[Cohort, list[TileStore | CaseStore], list[FeatureReader | CaseFeatures]]:
    """The rows, stores and feature readers of a cohort's bags.

    With the unit "slide" they are those of the slides; with the unit "case" there is one of each per case. Raises InputError
    for another unit (config.data.unit).
    """
    rows = rows_by_unit(unit, cohort)
    if unit == "slide":
        return cohort, list(stores), list(features)
    slides_by_case = [[i for i, row in enumerate(cohort.rows) if row.case_id == case] for case in cohort.cases]
    case_stores = [_join_stores(tuple(stores[i] for i in slides)) for slides in slides_by_case]
    if not features:
        return rows, list(case_stores), []
    case_features = [
        CaseFeatures(tuple(features[i] for i in slides), tuple(len(stores[i].mask) for i in slides))
        for slides in slides_by_case
    ]
    return rows, list(case_stores), list(case_features)


def rows_by_unit(unit: str, cohort: Cohort) -> Cohort:
    """The cohort, or with the unit "case" the first slide of each case. Raises InputError for another unit."""
    if unit not in UNITS:
        raise InputError(f"config.data.unit must be one of {', '.join(UNITS)}, got {unit!r}; try slide")
    first_slide = {row.case_id: row for row in reversed(cohort.rows)}
    return cohort if unit == "slide" else replace(cohort, rows=tuple(first_slide[case] for case in cohort.cases))


def separate_slides(positions: Sequence[Float32[np.ndarray, "_ 2"]]) -> list[Float32[np.ndarray, "_ 2"]]:
    """Moves the slides of a case apart, one below the other.

    The slide with the most regions comes first and is not moved, so that the names and the order of the slides do not
    matter.

    Args:
      positions: (x, y) of the regions of each slide, in sides of a region.

    Returns:
      The moved positions, in the order of `positions`.
    """
    largest_first = sorted(range(len(positions)), key=lambda i: (-len(positions[i]), positions[i].tobytes()))
    moved, next_top = list(positions), None
    for i in largest_first:
        slide = positions[i]
        if not len(slide):
            continue
        shift = 0.0 if next_top is None else next_top - slide[:, 1].min()
        moved[i] = slide + np.array([0.0, shift], np.float32)
        next_top = moved[i][:, 1].max() + 1.0 + _DISTANCE
    return moved


def _join_stores(stores: tuple[TileStore, ...]) -> CaseStore:
    position = separate_slides([(store.origin / store.region_px).astype(np.float32) for store in stores])
    mask, quality = (np.concatenate([getattr(store, name) for store in stores]) for name in ("mask", "quality"))
    return CaseStore(stores, stores[0].path, stores[0].params, mask, quality, np.concatenate(position))


def _read(
    reads: Sequence[Read],
    sizes: Sequence[int],
    indices: Sequence[int] | Int[np.ndarray, " _"],
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Reads regions by their index in the concatenation of all slides.

    Args:
      reads: the read function of each slide.
      sizes: the regions of each slide.
      indices: the regions to read.
      out: where to write them; None allocates an array.
    """
    indices = np.asarray(indices, np.int64)
    ends = np.cumsum(sizes)
    slide_of_index = np.searchsorted(ends, indices, side="right")
    values = out
    for slide, (read, first) in enumerate(zip(reads, ends - np.asarray(sizes), strict=True)):
        is_of_slide = slide_of_index == slide
        if not is_of_slide.any() and len(indices):
            continue
        rows = read(indices[is_of_slide] - first)
        if values is None:
            values = np.empty((len(indices), *rows.shape[1:]), rows.dtype)
        values[is_of_slide] = rows
    assert values is not None
    return values
