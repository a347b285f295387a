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
    judge,
    judged_shrink,
    score_digests,
)
from crcjax.slides.wsi.slide import Slide

_JUDGED_TOGETHER = 32  # tiles: one by one, NumPy's calls would take longer than its arithmetic


@dataclass(frozen=True)
class RegionTiles:
    """Some regions' tiles; `mask` is the plan's, less the tiles that failed quality control; `reason` says why.

    `reason` is an index into quality.REASONS. With a `pack` (see `read_regions`) `packed` holds what it made of each kept
    tile, by region and slot, and `pixels` has no regions.
    """

    pixels: UInt8[np.ndarray, "some slot y x 3"]
    mask: Bool[np.ndarray, "region slot"]
    quality: Float32[np.ndarray, "region slot score"]
    reason: UInt8[np.ndarray, "region slot"]
    packed: dict[tuple[int, int], Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pack:
    """What is made of a kept tile: of its `pixels`, or, unless that is None, of the slide's own `stream` if it has one."""

    pixels: Callable[[UInt8[np.ndarray, "y x 3"]], Any]
    stream: Callable[[bytes], Any] | None = None


def read_regions(
    slide: Slide, plan: TilePlan, start: int, stop: int, pack: Pack | None = None, transform: Transform | None = None
) -> RegionTiles:
    """The tiles of regions start to stop, from one decode a region: coarser tiles are area means of the finest.

    Masked slots are zero. With `pack`, what it makes of each kept tile is returned instead of the pixels, which then need
    no memory of their own. Tiles are judged as they were scanned, then those that are kept go through `transform`. Where
    the finest tiles are wanted as the slide's own streams, they are judged by a decode that is smaller from the start (of
    600 one is judged otherwise), and the coarser tiles are made of that. Raises SlideError (`corrupt`).
    """
    params, count = plan.params, stop - start
    pixels = np.zeros((0 if pack else count, params.slots, params.tile_px, params.tile_px, 3), np.uint8)
    packed: dict[tuple[int, int], Any] = {}
    quality = np.zeros((count, params.slots, len(QUALITY_NAMES)), np.float32)
    reason = np.full((count, params.slots), GLASS, np.uint8)
    reason[:, sum(factor**2 for factor in params.factors[: plan.scale.finest + 1]) :] = ABSENT
    mpp = np.repeat([mpp_of(magnification) for magnification in params.magnifications], np.square(params.factors))
    step = max(1, _JUDGED_TOGETHER // params.slots)
    for first in range(0, count, step):
        tiles: dict[tuple[int, int], bytes | np.ndarray] = {}
        judged: dict[tuple[int, int], Digest] = {}
        for i in range(first, min(first + step, count)):
            for slot, tile, found in _read_region(slide, plan, start + i, mpp, bool(pack and pack.stream)):
                tiles[i, slot], judged[i, slot] = tile, found
        _score(judged, plan, mpp, quality)
        places = tuple(np.array(list(tiles), np.intp).reshape(-1, 2).T)
        reason[places] = judge(quality[places], params.quality)
        kept = {place: tile for place, tile in tiles.items() if reason[place] == KEPT}
        if transform and kept:
            kept = dict(zip(kept, transform(np.stack(list(kept.values()))), strict=True))
        for (i, slot), tile in kept.items():
            if pack is None:
                pixels[i, slot] = tile
            elif isinstance(tile, bytes):
                assert pack.stream is not None
                packed[start + i, slot] = pack.stream(tile)
            else:
                packed[start + i, slot] = pack.pixels(tile)
    return RegionTiles(pixels, reason == KEPT, quality, reason, packed)


def _read_region(
    slide: Slide, plan: TilePlan, region: int, mpp: np.ndarray, streams: bool
) -> Iterator[tuple[int, bytes | np.ndarray, Digest]]:
    """Slot by slot the tile and what it is judged by, of a region; with `streams` as the slide's own where it has them."""
    params, scale, mask = plan.params, plan.scale, plan.mask[region]
    own = _own_streams(slide, plan, region) if streams else None
    if own is None:
        for slot, tile in enumerate(region_tiles(slide, params, scale, *plan.origin[region].tolist())):
            if mask[slot]:
                place = own_square(slide, plan, region, slot) if streams else None
                yield slot, (place and slide.jpeg_stream(*place)) or tile, digest(tile, mpp[slot])
        return
    first = sum(factor**2 for factor in params.factors[: scale.finest])
    shrink = 2 if scale.finest else judged_shrink(params.tile_px, mpp[0])
    pictures = [slide.shrunk_stream(stream, *square, shrink) for square, stream in own]
    if mask[:first].any():
        factor = params.factors[scale.finest]
        whole = np.vstack([np.hstack(pictures[row : row + factor]) for row in range(0, factor**2, factor)])
        for slot, tile in enumerate(_cut(whole, params, scale.finest)):
            if mask[slot]:
                yield slot, tile, digest(tile, mpp[slot])
    for slot, (picture, (_, stream)) in enumerate(zip(pictures, own, strict=True), first):
        if mask[slot]:
            yield slot, stream, digest(picture, mpp[slot] * shrink)


def _own_streams(slide: Slide, plan: TilePlan, region: int) -> list[tuple[tuple[int, int, int, int], bytes]] | None:
    """Square and stream of each of a region's finest tiles; None unless the slide has all of them."""
    factors, finest = plan.params.factors, plan.scale.finest
    first, own = sum(factor**2 for factor in factors[:finest]), []
    for slot in range(first, first + factors[finest] ** 2):
        square = own_square(slide, plan, region, slot)
        if not square or not (stream := slide.jpeg_stream(*square)):
            return None
        own.append((square, stream))
    return own


def own_square(slide: Slide, plan: TilePlan, region: int, slot: int) -> tuple[int, int, int, int] | None:
    """Level, x, y and side, in px of the level, of a tile whose pixels are the level's own; None of one that was shrunk or changed."""
    scale, factors, side = plan.scale, plan.params.factors, plan.params.tile_px
    first = sum(factor**2 for factor in factors[: scale.finest])
    downsample = slide.info.level_downsamples[scale.level]
    if slot < first or scale.downsample != downsample or plan.params.stain:
        return None
    row, column = divmod(slot - first, factors[scale.finest])
    x, y = (round(int(corner) / downsample) for corner in plan.origin[region])
    return scale.level, x + column * side, y + row * side, side


def _score(judged: dict[tuple[int, int], Digest], plan: TilePlan, mpp: np.ndarray, quality: np.ndarray) -> None:
    """Fills in the scores of some tiles, those of one magnification at a time."""
    by_mpp: dict[float, list[tuple[int, int]]] = {}
    for place in judged:
        by_mpp.setdefault(mpp[place[1]], []).append(place)
    for places in by_mpp.values():
        quality[tuple(np.array(places).T)] = score_digests([judged[place] for place in places], plan.tissue)


def region_tiles(slide: Slide, params: TilingParams, scale: Scale, x: int, y: int) -> list[UInt8[np.ndarray, "y x 3"]]:
    """The tiles of the region at (x, y), in level-0 px, at all magnifications that the slide has, in slot order.

    Raises SlideError (`corrupt`).
    """
    if params.icc:
        slide.apply_icc()  # of a slide that was opened to read the tiles of a store
    side = params.tile_px * params.factors[scale.finest]
    level_side = round(side * scale.downsample / slide.info.level_downsamples[scale.level])
    region = slide.read(x, y, level_side, level_side, scale.level)
    if level_side != side:
        region = cv2.resize(region, (side, side), interpolation=cv2.INTER_AREA)
    return _cut(region, params, scale.finest + 1)


def _cut(region: np.ndarray, params: TilingParams, magnifications: int) -> list[np.ndarray]:
    """The tiles of so many of the first magnifications, from a picture of their region."""
    tiles = []
    for factor in params.factors[:magnifications]:
        shown = params.tile_px * factor
        picture = region if shown == len(region) else cv2.resize(region, (shown, shown), interpolation=cv2.INTER_AREA)
        grid = picture.reshape(factor, params.tile_px, factor, params.tile_px, 3).swapaxes(1, 2)
        tiles += list(grid.reshape(-1, params.tile_px, params.tile_px, 3))
    return tiles
