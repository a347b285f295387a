"""Tile stores in the Python API: tiling, features, and the slides of a store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, UInt8

from crcjax.api.display import Picture, Table, heading
from crcjax.audit.commands import audited
from crcjax.data.slide_selection import named_slides
from crcjax.environment import require_extra
from crcjax.errors import InputError
from crcjax.progress import progress_bar
from crcjax.slides.jobs.worker_pool import check_main_guard
from crcjax.slides.preprocess.manifest import read_manifest
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.features import feature_attributes, feature_names, read_features
from crcjax.slides.store.tile_pixels import NO_PIXELS
from crcjax.slides.store.tile_store import TileStore, tiled_slides
from crcjax.slides.store.tile_store import open_store as _open_slide_store
from crcjax.slides.tiling.plan import TilingParams, slot_boxes
from crcjax.slides.tiling.tissue_segmentation import SMALLEST_UM2

if TYPE_CHECKING:
    import anndata
    import pandas as pd

AnyPath = str | PathLike[str]


@audited("tile")
def tile(
    slides: AnyPath | Iterable[AnyPath],
    store: AnyPath,
    *,
    magnifications: Sequence[str] | str = ("20x",),
    tile_px: int = 256,
    mpp: float | None = None,
    min_tissue_mm2: float = SMALLEST_UM2 * 1e-6,
    keep_all: bool = False,
    workers: int | None = None,
) -> Store:
    """Cuts slides into tiles; slides that the store already has are not tiled again.

    Args:
      slides: slide files, folders to search, or one cohort CSV with the columns slide_id, case_id and path.
      store: the folder of the tile store.
      magnifications: such as ("10x", "20x"); 20x is 0.5 µm per pixel.
      tile_px: the side of a tile in pixels.
      mpp: micrometres per level-0 pixel of slides that state none.
      min_tissue_mm2: the area of the smallest piece of tissue that is tiled; smaller for cores and single tiles.
      keep_all: keeps every tile with tissue; quality control then only states the tiles that it would exclude.
      workers: processes; by default one per usable core.

    Returns:
      The store. A slide that cannot be tiled does not stop the others: `Store.failed` lists it with its reason.

    Raises:
      InputError: no slides are found, an argument is out of range, or the store was made with other parameters.
      OutputError: the store cannot be written.
    """
    names = (magnifications,) if isinstance(magnifications, str) else tuple(magnifications)
    paths, cohort = _slides_or_cohort(slides)
    jobs = [TileJob(s.slide_id, s.path, s.mpp, fallback_mpp=mpp) for s in named_slides(paths, cohort)]
    with progress_bar(quiet=True) as bar:
        task = bar.add_task("tile", total=len(jobs))
        tile_slides(
            jobs,
            Path(store),
            TilingParams(names, tile_px, min_tissue_mm2=min_tissue_mm2, keep_all=keep_all),
            workers=workers,
            on_outcome=lambda outcome: bar.advance(task),
        )
    return Store(store)


def open_store(store: AnyPath) -> Store:
    """Opens a tile store.

    Raises:
      InputError: the folder holds no slides.
    """
    opened = Store(store)
    if not len(opened):
        raise InputError(f"{opened.path}: holds no tiled slides; run crcjax.tile or crcjax tile first")
    return opened


def embed(store: Store | AnyPath, encoder: str, weights: AnyPath | None = None, *, batch: int | None = None) -> Store:
    """Encodes all tiles of a store with a published encoder and stores the features.

    Args:
      store: the store.
      encoder: a name of docs/encoders.md, such as "uni2-h".
      weights: the encoder's weights, a local .safetensors, .bin or .pth file.
      batch: tiles at a time; by default as many as memory allows.

    Raises:
      InputError: the encoder is unknown, the weights are missing or do not fit, or no slide could be embedded.
      OutputError: the store cannot be written.
    """
    from crcjax.predict.embed import embed_store

    check_main_guard()
    if weights is None:
        raise InputError(
            f"weights: crcjax does not download the weights of {encoder}; give the path of a local file "
            "(docs/encoders.md says where they are published)"
        )
    path = store.path if isinstance(store, Store) else Path(store)
    with progress_bar(quiet=True) as bar:
        task = bar.add_task("embed", total=len(tiled_slides(path)))
        outcomes = embed_store(path, encoder, Path(weights), batch=batch, on_slide=lambda outcome: bar.advance(task))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed and len(failed) == len(outcomes):
        raise InputError(f"{path}: no slide could be embedded; the first: {failed[0].slide_id}: {failed[0].reason}")
    return Store(path)


class Store:
    """A folder of tiled slides. `store[slide_id]` is one slide; iteration yields the slide ids."""

    def __init__(self, path: AnyPath):
        self.path = Path(path)

    @property
    def slide_ids(self) -> list[str]:
        """The ids of the slides, sorted."""
        return tiled_slides(self.path)

    @property
    def failed(self) -> Table:
        """The slides that could not be tiled: the slide id, and the status and reason of the last attempt."""
        outcomes = read_manifest(self.path)
        ids = set(self.slide_ids)
        columns = ("slide_id", "status", "reason")
        return Table({name: o[name] for name in columns} for o in outcomes.values() if o["slide_id"] not in ids)

    @property
    def slides(self) -> Table:
        """One row per slide: size, micrometres per pixel, tiles, QC result and features."""
        return Table(self[slide_id].summary() for slide_id in self.slide_ids)

    def __getitem__(self, slide_id: str) -> StoredSlide:
        return StoredSlide(_open_slide_store(self.path, slide_id))

    def __iter__(self) -> Iterator[str]:
        return iter(self.slide_ids)

    def __len__(self) -> int:
        return len(self.slide_ids)

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self.slide_ids

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self)} slides)"

    def _repr_html_(self) -> str:
        failed = self.failed
        text = heading(f"{self.path}: {len(self)} slides") + self.slides._repr_html_()
        return text + (heading(f"{len(failed)} slides could not be tiled") + failed._repr_html_() if failed else "")


class StoredSlide:
    """One slide of a store, with its tiles, their features and a picture."""

    def __init__(self, stored: TileStore):
        self._stored = stored
        self.slide_id = stored.slide_id
        self.info = stored.info

    def summary(self) -> dict[str, Any]:
        """Returns the slide's row of `Store.slides`."""
        stored = self._stored
        return {
            "slide_id": self.slide_id,
            "width_px": self.info.size[0],
            "height_px": self.info.size[1],
            "mpp": round(float(self.info.mpp[0]), 4),
            "magnifications": ", ".join(stored.params.magnifications),
            "tiles": int(stored.mask.sum()),
            "qc_status": _qc_status(stored.attributes),
            "features": ", ".join(self.feature_names),
        }

    @property
    def feature_names(self) -> list[str]:
        """The names of the encoders whose features the store has for this slide."""
        return feature_names(self._stored.path.parent, self.slide_id)

    def tiles(self, magnification: str | None = None) -> Tiles:
        """The tiles that passed quality control, at all magnifications or one. Raises InputError for an unknown one."""
        magnifications = self._stored.params.magnifications
        if magnification is not None and magnification not in magnifications:
            raise InputError(f"magnification must be one of {', '.join(magnifications)}, got {magnification!r}")
        return Tiles(self._stored, self._stored.params.slots_of(() if magnification is None else (magnification,)))

    def features(self, name: str) -> Float[np.ndarray, "tile feature"]:
        """The features of one encoder; row i belongs to tile i of `feature_tiles(name)`. Raises InputError if there are none."""
        values = read_features(self._stored.path.parent, self.slide_id, name)
        places = self.feature_tiles(name).places
        return values[places[:, 0], places[:, 1]]

    def feature_tiles(self, name: str) -> Tiles:
        """The tiles that have features of one encoder. Raises InputError if the features are damaged."""
        attributes = feature_attributes(self._stored.path.parent, self.slide_id, name) or {}
        magnifications = tuple(attributes.get("magnifications") or ())
        return Tiles(self._stored, self._stored.params.slots_of(magnifications))

    def to_anndata(self, name: str) -> anndata.AnnData:
        """Returns features as AnnData: one observation per tile, with its centre in level-0 pixels in obsm["spatial"].

        Raises InputError if the slide has no such features, or without the extra `notebook`.
        """
        package = require_extra("anndata", "notebook", "to_anndata")
        features, tiles = self.features(name), self.feature_tiles(name)
        observations = tiles.to_pandas()
        observations.index = [f"{self.slide_id}-{i}" for i in range(len(tiles))]
        data = package.AnnData(X=features.astype(np.float32), obs=observations)
        data.obsm["spatial"] = tiles.corners + tiles.sides[:, None] / 2
        data.uns["encoder"], data.uns["slide_id"] = name, self.slide_id
        return data

    def plot(self, magnification: str | None = None) -> Picture:
        """Plots the slide with the outlines of its tiles at one magnification, by default the coarsest."""
        from matplotlib.collections import PatchCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        tiles = self.tiles(magnification or self._stored.params.magnifications[0])
        figure = Figure(figsize=(7, 7), layout="constrained")
        axes = figure.subplots()
        width, height = self.info.size
        if self._stored.pixels != NO_PIXELS:
            axes.imshow(self._stored.thumbnail()[0], extent=(0, width, height, 0))
        boxes = [Rectangle(tuple(xy), side, side) for xy, side in zip(tiles.corners, tiles.sides, strict=True)]
        axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor="tab:blue", linewidth=0.8))
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xlabel="x (level-0 px)", ylabel="y (level-0 px)")
        synthetic = "SYNTHETIC SLIDE · " if self.info.synthetic else ""
        axes.set_title(f"{synthetic}{self.slide_id}: {len(tiles)} tiles", fontsize=10)
        return Picture.of_figure(figure, f"{self.slide_id}: {len(tiles)} tiles")

    def __repr__(self) -> str:
        return f"StoredSlide({self.slide_id!r}, {int(self._stored.mask.sum())} tiles)"

    def _repr_html_(self) -> str:
        import base64

        picture = base64.b64encode(self.plot().png).decode()
        return Table([self.summary()])._repr_html_() + f'<img width="480" src="data:image/png;base64,{picture}">'


class Tiles:
    """Tiles of one slide: their places, quality scores, and pixels, which are read on access.

    Attributes:
      corners: the top-left corner (x, y) of each tile in level-0 pixels.
      sides: the side of each tile in level-0 pixels.
      places: the region and the slot of each tile within the store.
      magnifications: the magnification of each tile.
    """

    def __init__(self, stored: TileStore, slots: Bool[np.ndarray, " slot"]):
        params = stored.params
        boxes = slot_boxes(params).astype(np.float64) * stored.region_px
        self._stored = stored
        self.slide_id = stored.slide_id
        self.places: Int[np.ndarray, "tile 2"] = np.argwhere(stored.mask & slots)
        region, slot = self.places[:, 0], self.places[:, 1]
        self.corners: Float64[np.ndarray, "tile 2"] = stored.origin[region] + boxes[slot, :2]
        self.sides: Float64[np.ndarray, " tile"] = boxes[slot, 2]
        self.magnifications: list[str] = np.repeat(params.magnifications, np.square(params.factors))[slot].tolist()

    def pixels(self, indices: Sequence[int] | slice | None = None) -> UInt8[np.ndarray, "tile y x 3"]:
        """Reads the pixels of the given tiles, by default of all. Raises InputError if the store does not hold them."""
        places = self.places if indices is None else self.places[indices]
        regions, inverse = np.unique(places[:, 0], return_inverse=True)
        return self._stored.read_pixels(regions)[inverse, places[:, 1]]

    @property
    def table(self) -> Table:
        """One row per tile: corner, side, magnification and quality scores."""
        scores = self._stored.quality[self.places[:, 0], self.places[:, 1]].tolist()
        names = self._stored.attributes["quality"] if self._stored.pixels != NO_PIXELS else []
        rows = zip(self.corners.tolist(), self.sides.tolist(), self.magnifications, scores, strict=True)
        return Table(
            {"x": x, "y": y, "side": side, "magnification": name} | dict(zip(names, score, strict=False))
            for (x, y), side, name, score in rows
        )

    def to_pandas(self) -> pd.DataFrame:
        """Returns `table` as a DataFrame. Raises InputError without the extra `notebook`."""
        return self.table.to_pandas()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "y x 3"]:
        # An IndexError ends the iteration over tiles.
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.pixels([index])[0]

    def __repr__(self) -> str:
        return f"Tiles({len(self)} of {self.slide_id})"

    def _repr_html_(self) -> str:
        return heading(repr(self)) + self.table._repr_html_()


def _qc_status(attributes: dict) -> str:
    """The QC result; older stores have the key `verdict`."""
    result = attributes.get("qc") or attributes.get("verdict") or {}
    return result.get("qc_status") or result.get("verdict") or "" if isinstance(result, dict) else ""


def _slides_or_cohort(slides: AnyPath | Iterable[AnyPath]) -> tuple[list[Path] | None, Path | None]:
    """Returns (paths, None) for slides and folders, and (None, cohort) for a single CSV."""
    paths = [Path(slides)] if isinstance(slides, str | PathLike) else [Path(path) for path in slides]
    if len(paths) == 1 and paths[0].suffix.lower() == ".csv":
        return None, paths[0]
    return paths, None
