"""The forms of pixels in a store, compared with HDF5 files of the same content; and the size and error of JPEG."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import simplejpeg
from record import record

from crcjax.slides.store.tile_pixels import JPEG_QUALITY, JPEG_SUBSAMPLING, shard_regions
from crcjax.slides.store.tile_store import StoreWriter, open_store
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide
from crcjax.slides.tiling.plan import TilePlan, TilingParams, plan_tiles
from crcjax.slides.tiling.read import Pack, RegionTiles, native_square, read_regions
from crcjax.slides.wsi.slide import Slide, open_slide

SIZE_PX = (10240, 8192)
THREADS = len(os.sched_getaffinity(0))
# Regions of a random reading; a training step samples as many from one slide.
RANDOM_REGIONS = 32
ROUNDS = 3
COMMAND = "python tools/bench_store.py"
Reader = Callable[[np.ndarray], np.ndarray]


def write_store(folder: Path, slide: Slide, plan: TilePlan, tiles: RegionTiles, mode: str) -> Reader:
    """Writes, publishes and syncs a store of crcjax."""
    step = shard_regions(plan.params)
    with StoreWriter(folder, mode, slide, plan, mode) as writer, ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(tiles.mask), step):
            part = replace(tiles, **_chosen(tiles, slice(start, start + step)))
            writer.write(start, _packed(slide, plan, writer.pack, start, part, pool))
        writer.commit()
    return open_store(folder, mode).read_pixels


def _packed(
    slide: Slide, plan: TilePlan, pack: Pack | None, start: int, tiles: RegionTiles, pool: ThreadPoolExecutor
) -> RegionTiles:
    """The tiles, packed as `read_regions` packs them."""
    if pack is None:
        return tiles

    def packed_at(place: tuple[int, int]) -> object:
        square = native_square(slide, plan, *place) if pack.stream else None
        if square and pack.stream and (stream := slide.jpeg_stream(*square)):
            return pack.stream(stream)
        return pack.pixels(tiles.pixels[place[0] - start, place[1]])

    places = [(start + region, slot) for region, slot in np.argwhere(tiles.mask).tolist()]
    return replace(tiles, packed=dict(zip(places, pool.map(packed_at, places), strict=True)))


def write_hdf5(path: Path, tiles: np.ndarray, **compression: object) -> Reader:
    """Writes one chunk per tile, as tile extractors do."""
    with h5py.File(path, "w") as file:
        images = file.create_dataset("imgs", tiles.shape, np.uint8, chunks=(1, *tiles.shape[1:]), **compression)
        for start in range(0, len(tiles), 128):
            images[start : start + 128] = tiles[start : start + 128]
    _sync(path)
    opened = h5py.File(path)["imgs"]

    def read(chosen: np.ndarray) -> np.ndarray:
        if (np.diff(chosen) == 1).all():
            return opened[chosen[0] : chosen[-1] + 1]
        # Thirty times as fast as h5py's own list of indices.
        return np.stack([opened[i] for i in chosen])

    return read


def write_hdf5_jpeg(path: Path, tiles: np.ndarray) -> Reader:
    """Writes one JPEG stream per row, encoded and decoded by as many threads as in crcjax."""
    pool = ThreadPoolExecutor(THREADS)
    with h5py.File(path, "w") as file:
        rows = file.create_dataset("imgs", len(tiles), h5py.vlen_dtype(np.uint8))
        for start in range(0, len(tiles), 128):
            for i, stream in enumerate(pool.map(_encode, tiles[start : start + 128]), start):
                rows[i] = np.frombuffer(stream, np.uint8)
    _sync(path)
    opened = h5py.File(path)["imgs"]

    def read(chosen: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(chosen), *tiles.shape[1:]), np.uint8)
        streams = (opened[i] for i in chosen)
        list(pool.map(lambda stream, out: simplejpeg.decode_jpeg(stream, "RGB", buffer=out), streams, pixels))
        return pixels

    return read


def _encode(tile: np.ndarray, quality: int = JPEG_QUALITY, subsampling: str = JPEG_SUBSAMPLING) -> bytes:
    return simplejpeg.encode_jpeg(tile, quality, "RGB", subsampling)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = paint_slide(folder / "slide.svs", SlideSpec("immune", 0, size_px=SIZE_PX), workers=THREADS)
        with open_slide(path) as slide:
            plan = plan_tiles(slide, TilingParams())
            plans = {"on": plan, "off": replace(plan, origin=plan.origin + np.int32(13))}
            tiles = {grid: read_regions(slide, shifted, 0, len(plan.origin)) for grid, shifted in plans.items()}
            both = tiles["on"].mask[:, 0] & tiles["off"].mask[:, 0]
            plans = {grid: replace(shifted, **_chosen(shifted, both)) for grid, shifted in plans.items()}
            tiles = {grid: replace(read, **_chosen(read, both)) for grid, read in tiles.items()}
            _forms(folder, slide, plans, tiles)
        pictures = {"a synthetic slide": tiles["off"].pixels[:100, 0]} | _real_tiles()
        _qualities(pictures)


def _chosen(regions: TilePlan | RegionTiles, part: slice | np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the chosen regions."""
    names = ("origin", "mask") if isinstance(regions, TilePlan) else ("pixels", "mask", "quality", "reason")
    return {name: getattr(regions, name)[part] for name in names}


def _forms(folder: Path, slide: Slide, plans: dict[str, TilePlan], tiles: dict[str, RegionTiles]) -> None:
    images = np.ascontiguousarray(tiles["off"].pixels[:, 0])

    def ours(mode: str, grid: str) -> Callable[[Path], Reader]:
        return lambda place: write_store(place, slide, plans[grid], tiles[grid], mode)

    forms: dict[str, tuple[str, Callable[[Path], Reader]]] = {
        "HDF5, raw": ("", lambda place: write_hdf5(place / "a", images)),
        "HDF5, lzf": ("", lambda place: write_hdf5(place / "a", images, compression="lzf")),
        "HDF5, gzip 4": ("", lambda place: write_hdf5(place / "a", images, compression="gzip")),
        "HDF5, JPEG": ("", lambda place: write_hdf5_jpeg(place / "a", images)),
        "lossless": ("HDF5, gzip 4", ours("lossless", "off")),
        "jpeg, encoded": ("HDF5, JPEG", ours("jpeg", "off")),
        "jpeg, native JPEG tiles": ("HDF5, JPEG", ours("jpeg", "on")),
        "none: read from the slide, on its grid": ("HDF5, JPEG", ours("none", "on")),
        "none: read from the slide, off its grid": ("HDF5, JPEG", ours("none", "off")),
    }
    rows: dict[str, dict] = {form: {"form": form} for form in forms}
    # One form after the other in each round, so that a busy moment of the machine affects all forms alike.
    for _ in range(ROUNDS):
        for form, (_, write) in forms.items():
            place = folder / "form"
            place.mkdir()
            start = time.monotonic()
            read = write(place)
            seconds = {"write tiles/s": (time.monotonic() - start) / len(images)} | _read_seconds(read, len(images))
            stored = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            rows[form]["bytes/tile"] = stored / len(images)
            for figure, value in seconds.items():
                rows[form][figure] = max(rows[form].get(figure, 0.0), 1 / value)
            shutil.rmtree(place)
    for form, (rival, _) in forms.items():
        ratios = [f"{rows[form][figure] / rows[rival][figure]:.2g}" for figure in seconds] if rival else []
        rows[form]["ratio (write, sequential, random)"] = f"{', '.join(ratios)} of {rival}" * bool(rival)
    small, large = (rows[form]["bytes/tile"] * 500 * 10_000 / 1e9 for form in ("jpeg, encoded", "lossless"))
    about = (
        "Forms of pixels in a store, compared with HDF5 files of the same content.\n\n"
        f"* {len(images)} tiles of 256 px at 20x of a synthetic slide of {SIZE_PX[0]} x {SIZE_PX[1]} px; the best of {ROUNDS} rounds.\n"
        "* Writing begins with pixels in memory and ends with synced files. Reading ends with pixels, from the page cache:"
        f" sequentially 128 tiles at a time, randomly {RANDOM_REGIONS}.\n"
        f"* crcjax and HDF5's JPEG use {THREADS} threads. The stores of crcjax have checksums; the HDF5 files have none.\n"
        f"* `crcjax tile` writes `jpeg` by default. 500 slides of 10,000 tiles take {small:.0f} GB, with `lossless` {large:.0f} GB;"
        " writing is faster; native JPEG tiles lose nothing. `lossless`, and even more so raw HDF5, is read faster, but only as"
        " long as its many bytes come from memory or a fast disk."
    )
    record("store", COMMAND, list(rows.values()), about)


def _read_seconds(read: Reader, count: int) -> dict[str, float]:
    """Seconds per tile."""
    rng = np.random.default_rng(0)
    readings = {
        "sequential tiles/s": [np.arange(i, min(i + 128, count)) for i in range(0, count, 128)],
        "random tiles/s": [rng.choice(count, RANDOM_REGIONS, replace=False) for _ in range(24)],
    }
    read(readings["random tiles/s"][0])
    seconds = {}
    for order, reading in readings.items():
        start = time.monotonic()
        for indices in reading:
            read(indices)
        seconds[order] = (time.monotonic() - start) / sum(map(len, reading))
    return seconds


def _real_tiles() -> dict[str, np.ndarray]:
    """Tiles of the real slides of CRCJAX_REAL_DATA, if it is set."""
    tiles_of = {}
    for path in sorted(Path(os.environ.get("CRCJAX_REAL_DATA", "")).glob("slides/*.svs")):
        with open_slide(path, None if "cmu" in path.name else 0.25) as slide:
            plan = plan_tiles(slide, TilingParams())
            tiles = read_regions(slide, plan, 0, min(len(plan.origin), 300))
        tiles_of[path.stem] = tiles.pixels[tiles.mask]
    return tiles_of


def _qualities(pictures: dict[str, np.ndarray]) -> None:
    rows = []
    for name, tiles in pictures.items():
        for subsampling in ("420", "444"):
            for quality in (80, 85, 90, 95):
                start = time.monotonic()
                streams = [_encode(tile, quality, subsampling) for tile in tiles]
                encoded = time.monotonic()
                decoded = np.stack([simplejpeg.decode_jpeg(stream, "RGB") for stream in streams])
                done = time.monotonic()
                error = tiles.astype(np.float32) - decoded
                rows.append(
                    {
                        "tiles": f"{len(tiles)} of {name}",
                        "subsampling": subsampling,
                        "quality": quality,
                        "bytes/tile": float(np.mean([len(stream) for stream in streams])),
                        "mean absolute error": float(np.abs(error).mean()),
                        "PSNR dB": float(10 * np.log10(255**2 / (error**2).mean())),
                        "encode tiles/s": len(tiles) / (encoded - start),
                        "decode tiles/s": len(tiles) / (done - encoded),
                    }
                )
    about = (
        "Size and error of JPEG by quality and subsampling, and its speed on one thread.\n\n"
        f"Tiles off the slide's JPEG grid are encoded with quality {JPEG_QUALITY} and subsampling {JPEG_SUBSAMPLING}. At the same"
        " size, 4:4:4 has smaller errors than 4:2:0, and colour distinguishes the stains."
    )
    record("jpeg_quality", COMMAND, rows, about)


if __name__ == "__main__":
    main()
