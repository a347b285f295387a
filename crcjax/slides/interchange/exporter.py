"""Exports a store's kept tiles: GeoJSON for QuPath, and HDF5 files of coordinates in TRIDENT's layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int

from crcjax.errors import InputError, writing
from crcjax.slides.interchange.third_party_h5 import open_h5py
from crcjax.slides.preprocess.manifest import Outcome
from crcjax.slides.store.tile_pixels import NO_PIXELS
from crcjax.slides.store.tile_store import TileStore, open_store, tiled_slides
from crcjax.slides.tiling.plan import slot_boxes
from crcjax.slides.tiling.regions_of_interest import Box, write_boxes

FORMATS = ("geojson", "trident")


def export_store(
    store: Path, out: Path, layout: str, on_slide: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Writes the kept tiles of every slide of a store.

    Args:
      store: the store.
      out: the folder of the files.
      layout: `geojson` writes OUT/SLIDE_ID.geojson for QuPath; `trident` writes, for each magnification,
        OUT/20x_256px_0px_overlap/patches/SLIDE_ID_patches.h5, which TRIDENT reads.
      on_slide: called with each outcome.

    Returns:
      The outcome of every slide. A damaged slide has the status `failed`.

    Raises:
      InputError: another layout, or an empty store.
      OutputError: `out` cannot be written.
    """
    if layout not in FORMATS:
        raise InputError(f"format {layout!r}: choose {' or '.join(FORMATS)}")
    if layout == "trident":
        open_h5py()
    slide_ids, outcomes = tiled_slides(store), []
    if not slide_ids:
        raise InputError(f"{store}: has no slides; name the --out of crcjax tile or crcjax import")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for slide_id in slide_ids:
            path = str(store / f"{slide_id}.zarr")
            try:
                slide = open_store(store, slide_id)
                (_write_geojson if layout == "geojson" else _write_trident)(slide, out)
                outcome = Outcome(slide_id, path, "exported", regions=len(slide.origin), tiles=int(slide.mask.sum()))
            except InputError as error:
                outcome = Outcome(slide_id, path, "failed", str(error))
            outcomes.append(outcome)
            on_slide(outcome)
    return outcomes


def _kept_tiles(slide: TileStore) -> dict[str, tuple[Float64[np.ndarray, "tile 2"], float, Int[np.ndarray, "tile 2"]]]:
    """The kept tiles by magnification: corners and side in level-0 px, and each tile's (region, slot).

    Magnifications without kept tiles are left out.
    """
    boxes = slot_boxes(slide.params).astype(np.float64) * slide.region_px
    of_slot = np.repeat(slide.params.magnifications, np.square(slide.params.factors))
    tiles = {}
    for name in slide.params.magnifications:
        places = np.argwhere(slide.mask & (of_slot == name))
        if len(places):
            side = float(boxes[places[0, 1], 2])
            tiles[name] = (slide.origin[places[:, 0]] + boxes[places[:, 1], :2], side, places)
    return tiles


def _write_geojson(slide: TileStore, out: Path) -> None:
    has_scores = slide.pixels != NO_PIXELS
    boxes = []
    for name, (corners, side, places) in _kept_tiles(slide).items():
        for corner, (region, slot) in zip(corners, places.tolist(), strict=True):
            scores = slide.quality[region, slot].tolist() if has_scores else []
            measurements = dict(zip(slide.attributes["quality"], scores, strict=False))
            boxes.append(Box(corner, side, f"Tile {name}", measurements))
    write_boxes(out / f"{slide.slide_id}.geojson", boxes, slide.info.corner)


def _write_trident(slide: TileStore, out: Path) -> None:
    params, info = slide.params, slide.info
    overlap = slide.attributes.get("imported", {}).get("overlap_px", 0)
    for name, (corners, side, _) in _kept_tiles(slide).items():
        folder = out / f"{name}_{params.tile_px}px_{overlap}px_overlap" / "patches"
        folder.mkdir(parents=True, exist_ok=True)
        path, target = folder / f"{slide.slide_id}_patches.h5", float(name.removesuffix("x"))
        # TRIDENT computes the side as patch_size * level0_magnification / target_magnification.
        power = round(target * side / params.tile_px)
        exact = round(params.tile_px * power / target) == round(side)
        partial = path.with_suffix(".partial")
        with open_h5py().File(partial, "w") as file:
            coords = file.create_dataset("coords", data=np.rint(corners).astype(np.int64))
            coords.attrs.update(
                {
                    "patch_size": params.tile_px,
                    "patch_size_level0": round(side),
                    "level0_magnification": power if exact else target * side / params.tile_px,
                    "target_magnification": int(target) if target.is_integer() else target,
                    "overlap": overlap,
                    "name": slide.slide_id,
                    "savetodir": str(folder.parent.name),
                    "level0_width": info.size[0],
                    "level0_height": info.size[1],
                    "level0_mpp": sum(info.mpp) / 2,
                    "synthetic": info.synthetic,
                }
            )
        partial.replace(path)
