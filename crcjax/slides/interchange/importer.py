"""Imports tiles and features that other tools made into a store."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32

from crcjax.errors import BusyError, InputError, SlideError
from crcjax.slides.interchange.third_party_h5 import (
    ThirdPartyTiles,
    merged,
    open_h5py,
    read_third_party,
    third_party_files,
)
from crcjax.slides.jobs.usable_cores import usable_cores
from crcjax.slides.preprocess.manifest import Outcome, append_outcome
from crcjax.slides.preprocess.tile_slides import check_slide_ids, read_shards, with_qc_result
from crcjax.slides.store.features import feature_attributes, write_features
from crcjax.slides.store.locks import slide_lock
from crcjax.slides.store.tile_pixels import NO_PIXELS
from crcjax.slides.store.tile_store import (
    THUMBNAIL_PX,
    StoreWriter,
    TileStore,
    open_store,
    remove_partials,
    tiled_slides,
)
from crcjax.slides.store.zarr_arrays import store_path
from crcjax.slides.tiling.plan import SAME_SCALE, Scale, TilePlan, TilingParams, mpp_of, plan_tiles
from crcjax.slides.tiling.quality_control import QUALITY_NAMES, slide_verdict
from crcjax.slides.tiling.tissue_segmentation import TissueModel
from crcjax.slides.wsi.slide import SlideInfo, check_mpp, open_slide

_POWERS = (1.25, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)  # objectives of scanners
# TRIDENT rounds the objective to 5, 10, 20, 40, 60 or 80; its ranges of µm per px reach 1.7 times as far.
_SAME_POWER = 1.8
_WHITE = 255


def import_files(
    paths: Sequence[Path],
    store: Path,
    *,
    slides: Mapping[str, Path] | None = None,
    slide_mpp: Mapping[str, float] | None = None,
    encoder: str | None = None,
    mpp: float | None = None,
    side_px: float | None = None,
    threads: int | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Imports HDF5 files of CLAM, TRIDENT or STAMP, one slide after another; tiles and features in the store are not changed.

    Every outcome is also a line of STORE/manifest.jsonl. A file that cannot be imported, or contradicts its slide, has an
    outcome with the reason; the others are still imported.

    Args:
      paths: files, and folders to search.
      store: the store.
      slides: the slide files by slide id. Their tiles are read and pass quality control, and pixels are read from the slide
        files later. Without it, the store has neither pixels nor scores.
      slide_mpp: µm per level-0 px by slide id, in place of what the slide states.
      encoder: name of the features, by default the file's.
      mpp: µm per level-0 px, in place of what the files state, and for slides that state none.
      side_px: side of a tile in level-0 px, for files that do not state it.
      threads: threads that read the slides; by default, all cores.
      on_outcome: called with each outcome.

    Raises:
      InputError: a wrong argument.
      OutputError: the store cannot be written.
    """
    check_mpp(mpp)
    if side_px is not None and not side_px > 0:
        raise InputError(f"--side-px must be above 0, got {side_px}; give the side of a tile in level-0 px")
    open_h5py()
    input_files = third_party_files(paths)
    check_slide_ids([(slide_id, files[0]) for slide_id, files in input_files.items()])
    store = store_path(store)
    remove_partials(store)
    outcomes = []
    for slide_id, files in input_files.items():
        begun, outcome = time.monotonic(), Outcome(slide_id, str(files[0]), "imported")
        try:
            tiles = merged([read_third_party(file) for file in files])
            tiles = replace(tiles, side=tiles.side or side_px)
            _check_name(tiles, slide_id, {*input_files, *(slides or ())})
            if slides is not None and slide_id not in slides:
                remedy = "add it, or import without pixels: without --slides and --cohort"
                raise SlideError(tiles.path, "missing", f"{slide_id} is not among the given slides", remedy)
            slide = None if slides is None else slides[slide_id]
            given = (slide_mpp or {}).get(slide_id), mpp
            with slide_lock(store, slide_id):
                outcome = _import_slide(store, outcome, tiles, slide, given, encoder, threads)
        except SlideError as error:
            outcome = replace(outcome, status=error.status, reason=f"{error.reason}; {error.remedy}")
        # Another process writes the slide, or its tiles or features in the store are damaged.
        except (BusyError, InputError) as error:
            outcome = replace(outcome, status="failed", reason=str(error))
        outcome = replace(outcome, seconds=time.monotonic() - begun)
        append_outcome(store, outcome)
        outcomes.append(outcome)
        on_outcome(outcome)
    return outcomes


def _import_slide(
    store: Path,
    outcome: Outcome,
    tiles: ThirdPartyTiles,
    slide: Path | None,
    mpp: tuple[float | None, float | None],
    encoder: str | None,
    threads: int | None,
) -> Outcome:
    name = _encoder_name(tiles, encoder)
    stored = _open_if_stored(store, outcome.slide_id)
    if stored is None:
        if slide is None:
            stored = _write_without_slide(store, outcome.slide_id, replace(tiles, mpp=mpp[1] or tiles.mpp))
        else:
            stored = _write_from_slide(store, outcome.slide_id, tiles, slide, mpp, threads or usable_cores())
    elif slide and stored.pixels == NO_PIXELS:
        reason = "the store has the slide without its pixels"
        raise SlideError(tiles.path, "unsupported", reason, "import it into another --out")
    else:
        # A store without a content hash knows only what an earlier file stated of the slide.
        if stored.info.content_hash:
            _check_statements(tiles, stored.info)
        if not name:
            _rows_of(stored, tiles)
            outcome = replace(outcome, status="already imported")
    if name and not _store_features(store, stored, tiles, name):
        outcome = replace(outcome, status="already imported")
    tile_count, content_hash = int(stored.mask.sum()), stored.info.content_hash
    outcome = replace(outcome, regions=len(stored.origin), tiles=tile_count, content_hash=content_hash)
    return with_qc_result(outcome, stored.info, stored.attributes)


def _encoder_name(tiles: ThirdPartyTiles, encoder: str | None) -> str | None:
    if tiles.features is None:
        return None
    name = encoder or tiles.encoder
    if not name:
        raise SlideError(
            tiles.path, "unsupported", "does not state which encoder made its features", "give --encoder NAME"
        )
    if name.startswith(".") or "/" in name:
        raise SlideError(tiles.path, "unsupported", f"the encoder {name!r} cannot name a folder", "give --encoder NAME")
    return name


def _open_if_stored(store: Path, slide_id: str) -> TileStore | None:
    return open_store(store, slide_id) if slide_id in tiled_slides(store) else None


def _check_name(tiles: ThirdPartyTiles, slide_id: str, known: set[str]) -> None:
    """Raises SlideError if the file names another slide of this import. Other names pass, because slides may be renamed."""
    stated = (tiles.slide_name or "").strip()
    stated = next((name for name in (stated, stated.rpartition(".")[0]) if name in known), slide_id)
    if stated != slide_id:
        reason = f"has the name of slide {slide_id}, but states that it is of slide {stated}"
        raise SlideError(tiles.path, "corrupt", reason, "give the file its slide's name, or write it again")


def _check_statements(tiles: ThirdPartyTiles, info: SlideInfo) -> None:
    """Raises SlideError if the file contradicts its slide in size, scale or objective, or in whether it is synthetic.

    A scale that the user gave (`mpp_source`) overrides both and is not compared.
    """
    differences = []
    if tiles.size and np.abs(np.subtract(tiles.size, info.size)).max() > tiles.size_error_px:
        stated = f"{'about ' * (tiles.size_error_px > 0)}{tiles.size[0]} x {tiles.size[1]} px"
        differences.append(f"{stated}, the slide has {info.size[0]} x {info.size[1]}")
    mpp = sum(info.mpp) / 2
    if info.mpp_source != "given" and tiles.mpp and abs(tiles.mpp / mpp - 1) > SAME_SCALE:
        differences.append(f"{tiles.mpp:.4g} µm per pixel, the slide has {mpp:.4g}")
    elif info.mpp_source != "given" and tiles.power and abs(math.log(tiles.power * mpp / 10)) > math.log(_SAME_POWER):
        differences.append(f"an objective of {tiles.power:g}x, the slide has {mpp:.4g} µm per pixel")
    if tiles.synthetic and not info.synthetic:
        differences.append("that its slide is synthetic, the slide is not")
    if differences:
        reason = f"contradicts the slide: it states {'; '.join(differences)}"
        raise SlideError(tiles.path, "corrupt", reason, "check that the file is this slide's, and write it again")


def _placed(tiles: ThirdPartyTiles, info: SlideInfo) -> tuple[Int32[np.ndarray, "tile 2"], float]:
    """The tiles' corners, in the file's order, and their side, both in level-0 px. Raises SlideError if a tile is impossible."""
    if tiles.side is None:
        reason = f"{tiles.layout}'s files of features do not state the side of a tile"
        remedy = "import it together with the file of coordinates, or give --side-px"
        raise SlideError(tiles.path, "unsupported", reason, remedy)
    scale = np.array(info.mpp) if tiles.unit == "um" else np.ones(2)
    origin, side = np.rint(tiles.corner / scale), tiles.side / float(scale.mean())
    outside = (origin < 0) | (origin >= np.minimum(info.size, np.iinfo(np.int32).max))
    if outside.any():
        row = int(np.flatnonzero(outside.any(axis=1))[0])
        x, y = origin[row]
        reason = f"tile {row} at ({x:.0f}, {y:.0f}) is outside the slide of {info.size[0]} x {info.size[1]} px"
        remedy = "check that the file is this slide's, and its mpp"
        raise SlideError(tiles.path, "corrupt", reason, remedy)
    if len(np.unique(origin, axis=0)) < len(origin):
        raise SlideError(tiles.path, "corrupt", "has two tiles at one place", "write the file again")
    return origin.astype(np.int32), side


def _params_of(store: Path, tiles: ThirdPartyTiles, side_um: float, side_px: float) -> TilingParams:
    """The tiling parameters of these tiles.

    Args:
      store: its parameters are used if it has slides and the tiles' size agrees with them within 2 %.
      tiles: the tiles.
      side_um: their side in µm.
      side_px: their side in level-0 px.

    Raises:
      SlideError: the store's tiles have another size, or the parameters are out of range.
    """
    tile_px = tiles.tile_px or round(side_px)
    for slide_id in tiled_slides(store)[:1]:
        params = open_store(store, slide_id).params
        field_um = params.tile_px * mpp_of(params.magnifications[0])
        if len(params.magnifications) > 1 or params.tile_px != tile_px or abs(side_um / field_um - 1) > SAME_SCALE:
            reason = (
                f"its tiles are {tile_px} px of {side_um:.4g} µm, the store's {params.tile_px} px of {field_um:.4g} µm"
            )
            reason += f" at {', '.join(params.magnifications)}"
            raise SlideError(tiles.path, "unsupported", reason, "import it into another --out")
        return params
    power = 10.0 * tile_px / side_um
    named = min(_POWERS, key=lambda known: abs(math.log(known / power)))
    try:
        return TilingParams((f"{named if abs(named / power - 1) <= SAME_SCALE else power:.4g}x",), tile_px)
    except InputError as error:
        reason = f"its tiles are {tile_px} px of {side_um:.4g} µm ({error})"
        raise SlideError(tiles.path, "unsupported", reason, "check --mpp and --side-px") from error


def _write_from_slide(
    store: Path, slide_id: str, tiles: ThirdPartyTiles, path: Path, mpp: tuple[float | None, float | None], threads: int
) -> TileStore:
    with open_slide(path, *mpp, info_path=os.path.abspath(path)) as slide:
        info = slide.info
        _check_statements(tiles, info)
        origin, side = _placed(tiles, info)
        params = _params_of(store, tiles, side * sum(info.mpp) / 2, side)
        ordered = origin[_row_by_row(origin)]
        slide_plan = plan_tiles(slide, params)
        plan = replace(slide_plan, origin=ordered, mask=np.ones((len(ordered), 1), bool), region_px=side, rejected={})
        with StoreWriter(store, slide_id, slide, plan, "none", locked=True) as writer:
            for first, pack in read_shards(slide, plan, threads, writer.pack):
                writer.write(first, pack)
            writer.commit({"imported": _origin(tiles)})
    return open_store(store, slide_id)


def _write_without_slide(store: Path, slide_id: str, tiles: ThirdPartyTiles) -> TileStore:
    """Writes a slide without its file: the places of the tiles. All tiles are kept, because none can be scored."""
    info = _info_of(tiles)
    origin, side = _placed(tiles, info)
    params = _params_of(store, tiles, side * info.mpp[0], side)
    ordered = origin[_row_by_row(origin)]
    shrink = min(1.0, THUMBNAIL_PX / max(info.size))
    shape = tuple(max(1, round(length * shrink)) for length in reversed(info.size))
    covered = np.zeros(shape, bool)
    for (left, top), (right, bottom) in zip(ordered * shrink, (ordered + side) * shrink, strict=True):
        covered[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = True
    plan = TilePlan(
        params,
        Scale(0, side / params.tile_px, 0, 0),
        side,
        TissueModel((float(_WHITE),) * 3, 0.0),
        ordered,
        np.ones((len(ordered), 1), bool),
        np.full((*shape, 3), _WHITE, np.uint8),
        covered,
    )
    scores = np.zeros((len(ordered), 1, len(QUALITY_NAMES)), np.float32)
    no_scores = slide_verdict(scores, np.zeros((len(ordered), 1), np.uint8), params.quality)
    qc_result = no_scores | {
        "marked": {},
        "verdict": "review",
        "reasons": ["imported without its slide: no tile was scored"],
    }
    with StoreWriter(store, slide_id, info, plan, NO_PIXELS, locked=True) as writer:
        writer.commit({"imported": _origin(tiles), "verdict": qc_result})
    return open_store(store, slide_id)


def _info_of(tiles: ThirdPartyTiles) -> SlideInfo:
    """The slide's properties as the file of the tiles states them. Raises SlideError (`mpp_missing`) without a resolution."""
    if tiles.mpp is None and tiles.power is None:
        reason = f"{tiles.layout}'s files do not state the slide's micrometres per pixel"
        raise SlideError(tiles.path, "mpp_missing", reason, "give --slides FOLDER, --cohort CSV or --mpp")
    mpp, source = (tiles.mpp, "given") if tiles.mpp else (10.0 / float(tiles.power or 1), "objective")
    try:
        check_mpp(mpp)
    except InputError:
        reason = f"states an impossible {mpp:.4g} µm per pixel"
        raise SlideError(tiles.path, "mpp_missing", reason, "give --mpp") from None
    side = (tiles.side or 1.0) / (mpp if tiles.unit == "um" else 1.0)
    corner = tiles.corner / (mpp if tiles.unit == "um" else 1.0)
    width, height = np.ceil(corner.max(axis=0) + side).astype(int).tolist()
    return SlideInfo(
        "", "unknown", tiles.size or (width, height), (1.0,), (mpp, mpp), source, tiles.power, "", tiles.synthetic
    )


def _row_by_row(origin: Int32[np.ndarray, "tile 2"]) -> Int[np.ndarray, " tile"]:
    return np.lexsort(origin.T)


def _origin(tiles: ThirdPartyTiles) -> dict:
    """Where imported tiles or features come from, for the store's attributes."""
    return {"layout": tiles.layout, "sources": tiles.sources, "overlap_px": tiles.overlap_px}


def _rows_of(stored: TileStore, tiles: ThirdPartyTiles) -> Int[np.ndarray, " region"]:
    """The file's tile at every region of the store, -1 for a masked region without one. Raises SlideError for other tiles."""
    origin, side = _placed(tiles, stored.info)
    order = {place: row for row, place in enumerate(map(tuple, origin.tolist()))}
    rows = np.array([order.get(place, -1) for place in map(tuple, stored.origin.tolist())])
    same = stored.params.slots == 1 and abs(side / stored.region_px - 1) <= SAME_SCALE
    if not same or (rows[stored.mask[:, 0]] < 0).any():
        reason = f"the store has other tiles of {stored.slide_id} than this file"
        raise SlideError(tiles.path, "unsupported", reason, "import it into another --out")
    return rows


def _store_features(store: Path, stored: TileStore, tiles: ThirdPartyTiles, name: str) -> bool:
    """Writes the features beside the tiles; returns False if the store has them.

    Raises SlideError if the store has other features of that name.
    """
    assert tiles.features is not None
    rows = _rows_of(stored, tiles)
    width, mpp = tiles.features.shape[1], mpp_of(stored.params.magnifications[0])
    attributes = {
        "encoder": name,
        # Not known: nothing proves which file of weights made them.
        "weights_sha256": None,
        "dtype": None,
        "mpp": [mpp],
        "magnifications": list(stored.params.magnifications),
        "stated_encoder": tiles.encoder,
        "width": width,
        "imported": _origin(tiles),
    }
    earlier = feature_attributes(store, stored.slide_id, name)
    if earlier == attributes:
        return False
    _check_same_encoder(store, tiles, name)
    if earlier is not None:
        reason = f"the store has other features of the name {name}"
        raise SlideError(tiles.path, "unsupported", reason, "give another --encoder to have both, or delete the others")
    values = np.zeros((*stored.mask.shape, width), tiles.features.dtype)
    values[rows >= 0, 0] = tiles.features[rows[rows >= 0]]
    write_features(store, stored.slide_id, name, values, attributes)
    return True


def _check_same_encoder(store: Path, tiles: ThirdPartyTiles, name: str) -> None:
    """Raises SlideError if the store's features of that name have another width or, as their file states, another encoder."""
    assert tiles.features is not None
    for slide_id in tiled_slides(store):
        stored = feature_attributes(store, slide_id, name)
        if stored is None:
            continue
        stated, width = stored.get("stated_encoder"), stored.get("width", tiles.features.shape[1])
        if (stated, width) != (tiles.encoder, tiles.features.shape[1]):
            reason = f"its features are {tiles.features.shape[1]} numbers of {tiles.encoder or 'an unnamed encoder'}"
            reason += f", those of {slide_id} with the name {name} are {width} of {stated or 'an unnamed encoder'}"
            raise SlideError(tiles.path, "unsupported", reason, "give another --encoder")
        return
