"""Writes and reads the pixels of a store's tiles in one of three modes (`MODES`)."""

from __future__ import annotations

import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import simplejpeg
import tensorstore as ts
from jaxtyping import Bool, Int, Int32, UInt8

from crcjax.errors import InputError, SlideError
from crcjax.slides.jobs.usable_cores import usable_cores
from crcjax.slides.store.zarr_arrays import create_array, open_array
from crcjax.slides.tiling.plan import TilePlan, TilingParams, slide_scale
from crcjax.slides.tiling.read import Pack, RegionTiles, region_tiles
from crcjax.slides.wsi.slide import Slide, SlideInfo, open_slide

MODES = {
    "jpeg": "a JPEG stream a tile: the slide's own where its grid is the tiles', else encoded",
    "lossless": "the pixels as they were read, compressed by zstd",
    "none": "only a checksum of each tile: pixels are read from the slide file, which must stay where it is",
}
NO_PIXELS = "absent"  # the mode of tiles that were imported without their slide
IMPORTED_ALONE = "was imported without its slide and has no pixels; import it with --slides into another --out"
JPEG_QUALITY = 90
JPEG_SUBSAMPLING = "444"  # stains differ by colour: at equal bytes 4:4:4 has smaller errors than 4:2:0
_SHARD_TILES = 128  # tiles a shard at most: whole shards are written at once, single tiles are read
_SHARD_PIXELS = (
    _SHARD_TILES << 16
)  # at most the pixels of that many tiles of 256 px: a shard is in memory while it is written
_SHARD_BYTES = 4 << 20
_CHUNK_BYTES = 16 << 10  # about half a stream: the excess bytes when one tile is read
_UNBOUNDED = (1 << 62) - 2  # TensorStore's longest axis: the streams' total length is only known at the end
_DECODED_TOGETHER = 8  # tiles per task: with fewer, the overhead of a task is noticeable
_OPEN_SLIDES = 8  # each caches some decoded tiles per thread


def shard_regions(params: TilingParams) -> int:
    """Regions per shard, the unit in which regions are decoded and written."""
    return max(1, min(_SHARD_TILES, _SHARD_PIXELS // params.tile_px**2) // params.slots)


class _Writes:
    """Array writes under way, a few at a time."""

    def __init__(self, most: int):
        self._most = most
        self._futures: deque[ts.WriteFutures] = deque()

    def add(self, future: ts.WriteFutures) -> None:
        self._futures.append(future)
        while len(self._futures) > self._most:
            self._futures.popleft().result()

    def finish(self) -> None:
        while self._futures:
            self._futures.popleft().result()

    def abandon(self) -> None:
        """Waits for all writes and ignores their errors: a pending write would recreate a removed folder."""
        for future in self._futures:
            with suppress(ValueError):
                future.result()


class LosslessWriter:
    """Writes one array per magnification, one chunk per tile. Its methods raise ValueError where they cannot write."""

    pack = None  # the pixels themselves are written

    def __init__(self, folder: Path, plan: TilePlan):
        params = plan.params
        tile = (params.tile_px, params.tile_px, 3)
        self._factors, self._arrays = params.factors, []
        for name, factor in zip(params.magnifications, params.factors, strict=True):
            shape, shard = ((regions, factor**2, *tile) for regions in (len(plan.origin), shard_regions(params)))
            self._arrays.append(create_array(folder / name, "uint8", shape, shard, (1, 1, *tile)))
        self._writes = _Writes(2 * len(self._arrays))

    def write(self, start: int, tiles: RegionTiles) -> None:
        """Writes regions from `start` on: a whole shard, except the last."""
        first = 0
        for array, factor in zip(self._arrays, self._factors, strict=True):
            part = tiles.pixels[:, first : first + factor**2]
            # The caller makes new arrays for every shard, so TensorStore may still read this one while it compresses.
            piece = array[start : start + len(part)]
            self._writes.add(piece.write(part, can_reference_source_data_indefinitely=True))
            first += factor**2

    def finish(self) -> dict:
        """Waits until everything is written; returns the store's attributes of the pixels."""
        self._writes.finish()
        return {}

    def close(self) -> None:
        """Waits for pending writes."""
        self._writes.abandon()


class JpegWriter:
    """Writes `streams`, the bytes of all tiles region by region, and `offset`, where each slot's begin; masked slots have none.

    Its methods raise ValueError where they cannot write.
    """

    # The stream of every tile, and whether it is the slide's native JPEG tile.
    pack = Pack(
        lambda tile: (
            simplejpeg.encode_jpeg(np.ascontiguousarray(tile), JPEG_QUALITY, "RGB", JPEG_SUBSAMPLING),
            False,
        ),
        lambda stream: (stream, True),
    )

    def __init__(self, folder: Path, plan: TilePlan):
        self._folder = folder
        shape, shard, chunk = (_UNBOUNDED,), (_SHARD_BYTES,), (_CHUNK_BYTES,)
        self._streams = create_array(folder / "streams", "uint8", shape, shard, chunk, packed=False)
        self._lengths = np.zeros(plan.mask.shape, np.int64)
        self._writes = _Writes(2)
        self._waiting = bytearray()  # less than a shard
        self._written = self._native = 0

    def write(self, start: int, tiles: RegionTiles) -> None:
        """Writes packed regions from `start` on, in order."""
        for place, (stream, is_native) in tiles.packed.items():
            self._lengths[place] = len(stream)
            self._waiting += stream
            self._native += is_native
        while len(self._waiting) >= _SHARD_BYTES:
            self._write(_SHARD_BYTES)

    def finish(self) -> dict:
        """Waits until everything is written; returns the store's attributes of the pixels."""
        total = self._written + len(self._waiting)
        self._streams = self._streams.resize(exclusive_max=[total], resize_metadata_only=True).result()
        if self._waiting:
            self._write(len(self._waiting))
        offset = np.concatenate([[0], np.cumsum(self._lengths)])
        create_array(self._folder / "offset", "int64", offset.shape).write(offset).result()
        self._writes.finish()
        return {"jpeg": {"quality": JPEG_QUALITY, "subsampling": JPEG_SUBSAMPLING, "own_streams": self._native}}

    def close(self) -> None:
        """Waits for pending writes."""
        self._writes.abandon()

    def _write(self, count: int) -> None:
        shard = np.frombuffer(self._waiting[:count], np.uint8)
        del self._waiting[:count]
        self._writes.add(self._streams[self._written : self._written + count].write(shard))
        self._written += count


class ChecksumWriter:
    """Writes `checksum`, the CRC-32 of every tile's pixels, to detect a slide that changed after quality control."""

    pack = Pack(lambda tile: zlib.crc32(np.ascontiguousarray(tile).data))

    def __init__(self, folder: Path, plan: TilePlan):
        self._folder = folder
        self._checksum = np.zeros(plan.mask.shape, np.uint32)

    def write(self, start: int, tiles: RegionTiles) -> None:
        """Writes packed regions from `start` on."""
        for place, checksum in tiles.packed.items():
            self._checksum[place] = checksum

    def finish(self) -> dict:
        """Waits until everything is written; returns the store's attributes of the pixels."""
        create_array(self._folder / "checksum", "uint32", self._checksum.shape).write(self._checksum).result()
        return {}

    def close(self) -> None:
        """No write is pending."""


class NoPixels:
    """Neither writes nor reads pixels: for tiles that were imported without their slide."""

    pack = None

    def __init__(self, folder: Path):
        self._store = folder.parent

    def write(self, start: int, tiles: RegionTiles) -> None:
        """Writes nothing."""

    def finish(self) -> dict:
        """Returns the store's attributes of the pixels: none."""
        return {}

    def close(self) -> None:
        """No write is pending."""

    def read(self, chosen: Int[np.ndarray, " region"], out: UInt8[np.ndarray, "region slot y x 3"]) -> None:
        """Raises InputError."""
        raise InputError(f"{self._store}: {IMPORTED_ALONE}")


PixelWriter = LosslessWriter | JpegWriter | ChecksumWriter | NoPixels


def pixel_writer(mode: str, folder: Path, plan: TilePlan, slide: Slide | SlideInfo) -> PixelWriter:
    """Returns a writer into `folder`. A SlideInfo stands for a slide that is not available; `mode` is then NO_PIXELS.

    Raises InputError for another mode than `MODES`, ValueError where it cannot write.
    """
    if isinstance(slide, SlideInfo):
        return NoPixels(folder)
    check_mode(mode)
    if mode == "jpeg":
        return JpegWriter(folder, plan)
    return LosslessWriter(folder, plan) if mode == "lossless" else ChecksumWriter(folder, plan)


def check_mode(mode: str) -> None:
    """Raises InputError for another mode than `MODES`."""
    if mode not in MODES:
        raise InputError(f"pixels {mode!r}: choose one of {', '.join(MODES)}")


class LosslessReader:
    """Reads the arrays of `LosslessWriter`. Raises ValueError if they are damaged."""

    def __init__(self, folder: Path, params: TilingParams):
        self._arrays = [open_array(folder / name) for name in params.magnifications]

    def read(self, chosen: Int[np.ndarray, " region"], out: UInt8[np.ndarray, "region slot y x 3"]) -> None:
        """Reads the tiles of the chosen regions into `out`; masked slots are zero."""
        np.concatenate(
            [future.result() for future in [array[chosen].read() for array in self._arrays]], axis=1, out=out
        )


class JpegReader:
    """Reads the streams of `JpegWriter`. Raises ValueError if they are damaged."""

    def __init__(self, folder: Path, params: TilingParams):
        self._params = params
        self._streams = open_array(folder / "streams")
        self._offset: Int[np.ndarray, " _"] = open_array(folder / "offset").read().result()

    def read(self, chosen: Int[np.ndarray, " region"], out: UInt8[np.ndarray, "region slot y x 3"]) -> None:
        """Like `LosslessReader.read`."""
        slots = self._params.slots
        offset = self._offset[chosen[:, None] * slots + np.arange(slots + 1)]
        # Adjacent regions are read with one request.
        first, last = (np.flatnonzero(np.diff(chosen, **beyond) != 1) for beyond in ({"prepend": -2}, {"append": -2}))
        bounds = zip(offset[first, 0].tolist(), offset[last, -1].tolist(), strict=True)
        reads = [self._streams[start:stop].read() for start, stop in bounds]
        run = np.repeat(np.arange(len(first)), last - first + 1).tolist()
        within = (offset - offset[first, 0][run, None]).tolist()
        step, decoding = max(1, _DECODED_TOGETHER // slots), []
        for start in range(0, len(chosen), step):
            part = slice(start, start + step)
            # The first streams are decoded while the rest are read.
            streams = [reads[i].result() for i in run[part]]
            decoding.append(_threads().submit(_decode, streams, within[part], out[part]))
        for future in decoding:
            future.result()


def _decode(streams: list[np.ndarray], offsets: list[list[int]], out: np.ndarray) -> None:
    """Decodes the streams of every region, given its bytes and the offset of each slot in them."""
    for region_bytes, offset, tiles in zip(streams, offsets, out, strict=True):
        for tile, (start, stop) in zip(tiles, pairwise(offset), strict=True):
            if start == stop:
                tile[:] = 0
                continue
            shape = simplejpeg.decode_jpeg(region_bytes[start:stop], "RGB", buffer=tile, strict=True).shape
            if shape != tile.shape:
                raise ValueError(f"pixels/streams: a tile has the shape {shape}")


class SlideReader:
    """Reads the tiles from their slide file. Raises InputError if it is missing or has changed."""

    def __init__(
        self,
        folder: Path,
        params: TilingParams,
        info: SlideInfo,
        origin: Int32[np.ndarray, "region 2"],
        mask: Bool[np.ndarray, "region slot"],
    ):
        self._params, self._info, self._origin, self._mask = params, info, origin, mask
        self._store = folder.parent
        self._checksum: np.ndarray = open_array(folder / "checksum").read().result()

    def read(self, chosen: Int[np.ndarray, " region"], out: UInt8[np.ndarray, "region slot y x 3"]) -> None:
        """Like `LosslessReader.read`."""
        try:
            given = self._info.mpp[0] if self._info.mpp_source == "given" else None
            slide = _open_slide(self._info.path, given, self._info.content_hash)
            list(_threads().map(self._read_region, [slide] * len(chosen), chosen.tolist(), out))
        except SlideError as error:
            raise InputError(f"{self._store}: keeps no pixels, and its slide cannot be read: {error}") from error
        except _ChangedError as error:
            raise InputError(
                f"{self._store}: keeps no pixels, and its slide {self._info.path} has changed since it was tiled "
                f"({error}); put the old file back, or run crcjax tile again"
            ) from error

    def _read_region(self, slide: Slide, region: int, out: np.ndarray) -> None:
        x, y = self._origin[region].tolist()
        tiles = region_tiles(slide, self._params, slide_scale(self._info, self._params), x, y)
        out[~self._mask[region]] = 0
        for slot in np.flatnonzero(self._mask[region]):
            out[slot] = tiles[slot]
            if zlib.crc32(out[slot]) != self._checksum[region, slot]:
                raise _ChangedError(f"other pixels at ({x}, {y})")


class _ChangedError(Exception):
    pass


@lru_cache(_OPEN_SLIDES)
def _open_slide(path: str, mpp: float | None, content_hash: str) -> Slide:
    # A slide that leaves the cache is closed when its last reader releases it.
    slide = open_slide(path, mpp)
    if slide.info.content_hash != content_hash:
        slide.close()
        raise _ChangedError("another content hash")
    return slide


@cache
def _threads() -> ThreadPoolExecutor:
    """The threads that decode for all readers of this process."""
    return ThreadPoolExecutor(usable_cores(), "pixels")


PixelReader = LosslessReader | JpegReader | SlideReader | NoPixels


def pixel_reader(
    mode: str,
    folder: Path,
    params: TilingParams,
    info: SlideInfo,
    origin: Int32[np.ndarray, "region 2"],
    mask: Bool[np.ndarray, "region slot"],
) -> PixelReader:
    """Returns a reader of `folder`, for any number of threads. Raises ValueError if its files are damaged."""
    if mode == NO_PIXELS:
        return NoPixels(folder)
    if mode == "none":
        return SlideReader(folder, params, info, origin, mask)
    return JpegReader(folder, params) if mode == "jpeg" else LosslessReader(folder, params)
