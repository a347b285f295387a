"""Bags of a case: the regions of all its slides in one bag."""

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
_APART = 64.0  # sides of a region between two slides: farther than neighbours, near enough for rotary angles to tell

Read = Callable[..., np.ndarray]


@dataclass(frozen=True)
class CaseStore:
    """The slides of a case as one store: `origin` is in sides of a region, and no slide lies over another."""

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
        """As of a slide's store."""
        sizes = [len(store.mask) for store in self.stores]
        return _read([store.read_pixels for store in self.stores], sizes, indices, out)


@dataclass(frozen=True)
class CaseFeatures:
    """The features of a case's slides as one reader."""

    readers: tuple[FeatureReader, ...]
    sizes: tuple[int, ...]

    @property
    def width(self) -> int:
        """As of a slide's features."""
        return self.readers[0].width

    @property
    def dtype(self) -> np.dtype:
        """As of a slide's features."""
        return self.readers[0].dtype

    def read(
        self, indices: Sequence[int] | Int[np.ndarray, " _"], out: Num[np.ndarray, "_ slot feature"] | None = None
    ) -> Num[np.ndarray, "_ slot feature"]:
        """As of a slide's features."""
        return _read([reader.read for reader in self.readers], self.sizes, indices, out)


def by_unit(
    unit: str, cohort: Cohort, stores: Sequence[TileStore], features: Sequence[FeatureReader]
) -> tuple[Cohort, list[TileStore | CaseStore], list[FeatureReader | CaseFeatures]]:
    """What bags are made of: the slides as they are, or with the unit `case`, one row, store and reader a case.

    Raises InputError for another unit (config.data.unit).
    """
    rows = rows_by_unit(unit, cohort)
    if unit == "slide":
        return cohort, list(stores), list(features)
    slides_of = {case: [i for i, row in enumerate(cohort.rows) if row.case_id == case] for case in cohort.cases}
    stores_of_case = [tuple(stores[i] for i in slides) for slides in slides_of.values()]
    readers = [tuple(features[i] for i in slides) for slides in slides_of.values()] if features else []
    joined = [
        CaseFeatures(readers_of_case, tuple(len(store.mask) for store in of))
        for readers_of_case, of in zip(readers, stores_of_case, strict=False)
    ]
    return rows, [_joined(of) for of in stores_of_case], list(joined)


def rows_by_unit(unit: str, cohort: Cohort) -> Cohort:
    """The cohort, or with the unit `case`, the first slide of each case. Raises InputError for another unit."""
    if unit not in UNITS:
        raise InputError(f"config.data.unit {unit!r}: choose one of {', '.join(UNITS)}")
    first = {row.case_id: row for row in reversed(cohort.rows)}
    return cohort if unit == "slide" else replace(cohort, rows=tuple(first[case] for case in cohort.cases))


def side_by_side(positions: Sequence[Float32[np.ndarray, "_ 2"]]) -> list[Float32[np.ndarray, "_ 2"]]:
    """Positions (x, y) of the slides of a case, in sides of a region, moved so that each slide lies below another.

    The largest comes first and stays where it is, so that neither the names of slides nor their order matter.
    """
    order = sorted(range(len(positions)), key=lambda i: (-len(positions[i]), positions[i].tobytes()))
    moved, top = list(positions), None
    for i in order:
        here = positions[i]
        if not len(here):
            continue
        down = 0.0 if top is None else top - here[:, 1].min()
        moved[i] = here + np.array([0.0, down], np.float32)
        top = moved[i][:, 1].max() + 1.0 + _APART
    return moved


def _joined(stores: tuple[TileStore, ...]) -> CaseStore:
    position = side_by_side([(store.origin / store.region_px).astype(np.float32) for store in stores])
    mask, quality = (np.concatenate([getattr(store, name) for store in stores]) for name in ("mask", "quality"))
    return CaseStore(stores, stores[0].path, stores[0].params, mask, quality, np.concatenate(position))


def _read(
    reads: Sequence[Read],
    sizes: Sequence[int],
    indices: Sequence[int] | Int[np.ndarray, " _"],
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Rows of what the readers hold one after the other."""
    wanted = np.asarray(indices, np.int64)
    ends = np.cumsum(sizes)
    slide = np.searchsorted(ends, wanted, side="right")
    parts = [(slide == i, read, ends[i] - sizes[i]) for i, read in enumerate(reads)]
    pieces = [(here, read(wanted[here] - first)) for here, read, first in parts if here.any() or not len(wanted)]
    values = np.empty((len(wanted), *pieces[0][1].shape[1:]), pieces[0][1].dtype) if out is None else out
    for here, rows in pieces:
        values[here] = rows
    return values
