"""Reading the tiles of planned regions from a slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from crcjax.slides.tiling.plan import Scale, TilePlan, TilingParams, Transform, mpp_of
from crcjax.slides.tiling.quality_control import (
    ABSENT,
    GLASS,
    KEPT,
    QUALITY_NAMES,
    Digest,
    digest,
    score_digests,
    scoring_shrink,
    tile_reasons,
)
from crcjax.slides.wsi.slide import Slide

_SCORED_TOGETHER = 32  # tiles: for single tiles NumPy's calls would take longer than its arithmetic


@dataclass(frozen=True)
class RegionTiles:
    """The tiles of regions; `mask` is the plan's without the tiles that quality control excludes.

    `reason` is an index into quality_control.REASONS; with `keep_all` the tiles that it names are kept. With a `pack` (see
    `read_regions`), `packed` holds its result for each kept tile by region and slot, and `pixels` has no regions.
    """

    pixels: UInt8[np.ndarray, "stored_region slot y x 3"]
    mask: Bool[np.ndarray, "region slot"]
    quality: Float32[np.ndarray, "region slot score"]
    reason: UInt8[np.ndarray, "region slot"]
    packed: dict[tuple[int, int], Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pack:
    """Functions that convert a kept tile for storage: from its `pixels`, or from its native JPEG `stream` if it has one."""

    pixels: Callable[[UInt8[np.ndarray, "y x 3"]], Any]
    stream: Callable[[bytes], Any] | None = None


def read_regions(
    slide: Slide, plan: TilePlan, start: int, stop: int, pack: Pack | None = None, transform: Transform | None = None
) -> RegionTiles:
    """Reads the tiles of regions start to stop, with one decode per region: coarser tiles are area means of the finest.

    Masked slots are zero. With `pack`, its result for each kept tile is returned instead of pixels, which then need no
    memory. Tiles are scored as they were scanned; the kept ones then pass through `transform`. Where `pack` takes native JPEG
    tiles, these are scored on a decode to a smaller size, and the coarser tiles are made from it (the QC result differs for
    one tile in 600). Raises SlideError (`corrupt`).
    """
    params, count = plan.params, stop - start
    pixels = np.zeros((0 if pack else count, params.slots, params.tile_px, params.tile_px, 3), np.uint8)
    packed: dict[tuple[int, int], Any] = {}
    quality = np.zeros((count, params.slots, len(QUALITY_NAMES)), np.float32)
    reason = np.full((count, params.slots), GLASS, np.uint8)
    mask = np.zeros((count, params.slots), bool)
    reason[:, sum(factor**2 for factor in params.factors[: plan.scale.finest + 1]) :] = ABSENT
    mpp = np.repeat([mpp_of(magnification) for magnification in params.magnifications], np.square(params.factors))
    step = max(1, _SCORED_TOGETHER // params.slots)
    for first in range(0, count, step):
        tiles: dict[tuple[int, int], bytes | np.ndarray] = {}
        digests: dict[tuple[int, int], Digest] = {}
        for i in range(first, min(first + step, count)):
            for slot, tile, tile_digest in _read_region(slide, plan, start + i, mpp, bool(pack and pack.stream)):
                tiles[i, slot], digests[i, slot] = tile, tile_digest
        _score(digests, plan, mpp, quality)
        places = tuple(np.array(list(tiles), np.intp).reshape(-1, 2).T)
        reason[places] = tile_reasons(quality[places], params.quality)
        mask[places] = params.keep_all | (reason[places] == KEPT)
        kept_tiles = {place: tile for place, tile in tiles.items() if mask[place]}
        if transform and kept_tiles:
            kept_tiles = dict(zip(kept_tiles, transform(np.stack(list(kept_tiles.values()))), strict=True))
        for (i, slot), tile in kept_tiles.items():
            if pack is None:
                pixels[i, slot] = tile
            elif isinstance(tile, bytes):
                assert pack.stream is not None
                packed[start + i, slot] = pack.stream(tile)
            else:
                packed[start + i, slot] = pack.pixels(tile)
    return RegionTiles(pixels, mask, quality, reason, packed)


def _read_region(
    slide: Slide, plan: TilePlan, region: int, mpp: np.ndarray, streams: bool
) -> Iterator[tuple[int, bytes | np.ndarray, Digest]]:
    """Yields each slot, its tile and digest, of a region; with `streams` the tiles are native JPEG where the slide has them."""
    params, scale, mask = plan.params, plan.scale, plan.mask[region]
    native_tiles = _native_streams(slide, plan, region) if streams else None
    if native_tiles is None:
        for slot, tile in enumerate(region_tiles(slide, params, scale, *plan.origin[region].tolist())):
            if mask[slot]:
                place = native_square(slide, plan, region, slot) if streams else None
                yield slot, (place and slide.jpeg_stream(*place)) or tile, digest(tile, mpp[slot])
        return
    first = sum(factor**2 for factor in params.factors[: scale.finest])
    shrink = 2 if scale.finest else scoring_shrink(params.tile_px, mpp[0])
    pictures = [slide.shrunk_stream(stream, *square, shrink) for square, stream in native_tiles]
    if mask[:first].any():
        factor = params.factors[scale.finest]
        picture = np.vstack([np.hstack(pictures[row : row + factor]) for row in range(0, factor**2, factor)])
        for slot, tile in enumerate(_cut(picture, params, scale.finest)):
            if mask[slot]:
                yield slot, tile, digest(tile, mpp[slot])
    for slot, (picture, (_, stream)) in enumerate(zip(pictures, native_tiles, strict=True), first):
        if mask[slot]:
            yield slot, stream, digest(picture, mpp[slot] * shrink)


def _native_streams(slide: Slide, plan: TilePlan, region: int) -> list[tuple[tuple[int, int, int, int], bytes]] | None:
    """Square and stream of each of a region's finest tiles; None unless the slide has all of them."""
    factors, finest = plan.params.factors, plan.scale.finest
    first, native_tiles = sum(factor**2 for factor in factors[:finest]), []
    for slot in range(first, first + factors[finest] ** 2):
        square = native_square(slide, plan, region, slot)
        if not square or not (stream := slide.jpeg_stream(*square)):
            return None
        native_tiles.append((square, stream))
    return native_tiles


def native_square(slide: Slide, plan: TilePlan, region: int, slot: int) -> tuple[int, int, int, int] | None:
    """Level, x, y and side, in px of the level, of a tile whose pixels are exactly the level's; None for a tile that was shrunk or changed."""
    scale, factors, side = plan.scale, plan.params.factors, plan.params.tile_px
    first = sum(factor**2 for factor in factors[: scale.finest])
    downsample = slide.info.level_downsamples[scale.level]
    if slot < first or scale.downsample != downsample or plan.params.stain:
        return None
    row, column = divmod(slot - first, factors[scale.finest])
    x, y = (round(int(corner) / downsample) for corner in plan.origin[region])
    return scale.level, x + column * side, y + row * side, side


def _score(digests: dict[tuple[int, int], Digest], plan: TilePlan, mpp: np.ndarray, quality: np.ndarray) -> None:
    """Fills in the scores of the digested tiles, one magnification at a time."""
    by_mpp: dict[float, list[tuple[int, int]]] = {}
    for place in digests:
        by_mpp.setdefault(mpp[place[1]], []).append(place)
    for places in by_mpp.values():
        quality[tuple(np.array(places).T)] = score_digests([digests[place] for place in places], plan.tissue)


def region_tiles(slide: Slide, params: TilingParams, scale: Scale, x: int, y: int) -> list[UInt8[np.ndarray, "y x 3"]]:
    """Reads the tiles of the region at (x, y), in level-0 px, at all magnifications of the slide, in slot order.

    Raises SlideError (`corrupt`).
    """
    if params.icc:
        slide.apply_icc()  # needed where the slide was opened to read the tiles of a store
    side = params.tile_px * params.factors[scale.finest]
    level_side = round(side * scale.downsample / slide.info.level_downsamples[scale.level])
    region = slide.read(x, y, level_side, level_side, scale.level)
    if level_side != side:
        region = cv2.resize(region, (side, side), interpolation=cv2.INTER_AREA)
    return _cut(region, params, scale.finest + 1)


def _cut(region: np.ndarray, params: TilingParams, magnifications: int) -> list[np.ndarray]:
    """Cuts the tiles of the first `magnifications` magnifications from a picture of their region."""
    tiles = []
    for factor in params.factors[:magnifications]:
        shown = params.tile_px * factor
        picture = region if shown == len(region) else cv2.resize(region, (shown, shown), interpolation=cv2.INTER_AREA)
        grid = picture.reshape(factor, params.tile_px, factor, params.tile_px, 3).swapaxes(1, 2)
        tiles += list(grid.reshape(-1, params.tile_px, params.tile_px, 3))
    return tiles
