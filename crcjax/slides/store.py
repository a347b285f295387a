"""One slide's tiles on disk: a zarr v3 group that appears under its name only when it is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Float32, Int32, UInt8

import crcjax
from crcjax.errors import InputError, OutputError
from crcjax.slides.quality import QUALITY_NAMES
from crcjax.slides.reader import SlideInfo
from crcjax.slides.tiling import RegionTiles, TilePlan, TilingParams

FORMAT_VERSION = 1
_SHARD_TILES = 128  # tiles a shard: whole shards are written at once, single tiles are read


def shard_regions(params: TilingParams) -> int:
    """Regions a shard, the unit in which regions are decoded and written."""
    return max(1, _SHARD_TILES // params.slots)


class TileStore:
    """A finished slide in a store. Arrays but the pixels are read on opening."""

    def __init__(self, path: Path, attributes: dict):
        self.path = path
        self.slide_id = path.stem
        self.attributes = attributes
        self.info = SlideInfo.from_json(attributes["slide"])
        self.params = TilingParams.from_json(attributes["tiling"])
        self.region_px: float = attributes["region_px"]
        self.origin: Int32[np.ndarray, "region 2"] = self._read("origin")
        self.mask: Bool[np.ndarray, "region slot"] = self._read("mask")
        self.quality: Float32[np.ndarray, "region slot score"] = self._read("quality")
        self._pixels: dict[str, ts.TensorStore] = {}

    @property
    def has_pixels(self) -> bool:
        """False for a store made with --no-pixels."""
        return bool(self.attributes["pixels"])

    def read_pixels(self, indices: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "region slot y x 3"]:
        """The tiles of some regions, masked slots zero. Raises InputError if the store has none or is damaged."""
        if not self.has_pixels:
            raise InputError(f"{self.path}: has no pixels; run crcjax tile without --no-pixels")
        if not self._pixels:
            self._pixels = {name: self._open(f"pixels/{name}") for name in self.params.magnifications}
        chosen = np.asarray(indices, np.int64)
        futures = [self._pixels[name][chosen].read() for name in self.params.magnifications]
        return np.concatenate([self._result(future) for future in futures], axis=1)

    def _read(self, name: str) -> np.ndarray:
        return self._result(self._open(name).read())

    def _open(self, name: str) -> ts.TensorStore:
        spec = {"driver": "zarr3", "kvstore": _kvstore(self.path / name), "fill_missing_data_reads": False}
        return self._result(ts.open(spec, open=True, read=True))

    def _result(self, future: ts.Future) -> Any:
        try:
            return future.result()
        except ValueError as error:
            raise InputError(
                f"{self.path}: damaged ({_first_line(error)}); delete it and run crcjax tile again"
            ) from error


class StoreWriter:
    """Writes one slide under a partial name; `commit` gives it its own. Leaving without it removes what was written.

    Raises OutputError where the disk is full or may not be written.
    """

    def __init__(self, store: Path, slide_id: str, info: SlideInfo, plan: TilePlan, pixels: bool):
        self._final = store / f"{slide_id}.zarr"
        self._partial = store / ".partial" / f"{slide_id}.{os.getpid()}"
        self._plan = plan
        self._mask = plan.mask.copy()
        self._quality = np.zeros((*plan.mask.shape, len(QUALITY_NAMES)), np.float32)
        self._info = info
        self._written: list[ts.WriteFutures] = []
        self._pixels: list[ts.TensorStore] = []
        self._with_pixels = pixels
        self._life = ExitStack()

    def __enter__(self) -> StoreWriter:
        params, regions = self._plan.params, len(self._plan.origin)
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._partial.parent):
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir()
                self._life.enter_context(_locked(self._partial))
            if self._with_pixels:
                tile = (params.tile_px, params.tile_px, 3)
                for name, factor in zip(params.magnifications, params.factors, strict=True):
                    shape = (regions, factor**2, *tile)
                    shard = (shard_regions(params), factor**2, *tile)
                    chunk = (1, 1, *tile)
                    self._pixels.append(_create(self._partial / "pixels" / name, shape, shard, chunk, "uint8"))
        except (OSError, ValueError) as error:
            self._fail(error)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for future in self._written:  # a write that is still under way would make the folder again
            with suppress(ValueError):
                future.result()
        self._life.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, start: int, tiles: RegionTiles) -> None:
        """Regions from `start` on, a whole shard (`shard_regions`) but for the last."""
        stop = start + len(tiles.mask)
        self._mask[start:stop] = tiles.mask
        self._quality[start:stop] = tiles.quality
        first = 0
        for array, factor in zip(self._pixels, self._plan.params.factors, strict=False):
            part = tiles.pixels[:, first : first + factor**2]
            # The caller makes new arrays for every shard, so TensorStore may read this one while it compresses.
            self._written.append(array[start:stop].write(part, can_reference_source_data_indefinitely=True))
            first += factor**2
        while len(self._written) > 2 * max(1, len(self._pixels)):
            self._finish(self._written.pop(0))

    def commit(self) -> None:
        """Makes the slide appear in the store, whole, replacing an older one of that name."""
        for future in self._written:
            self._finish(future)
        origin, regions = self._plan.origin, len(self._plan.origin)
        try:
            for name, values in {"origin": origin, "mask": self._mask, "quality": self._quality}.items():
                array = _create(self._partial / name, values.shape, values.shape, values.shape, str(values.dtype))
                array.write(values).result()
            failed = self._plan.mask & ~self._mask
            glass = failed & (self._quality[..., 0] < self._plan.params.min_stained)
            attributes = {
                "format_version": FORMAT_VERSION,
                "code_version": crcjax.__version__,
                "slide": self._info.to_json(),
                "tiling": self._plan.params.to_json(),
                "region_px": self._plan.region_px,
                "regions": regions,
                "rejected": {
                    "glass": self._plan.rejected["glass"] + int(glass.sum()),
                    "blurred": int((failed & ~glass).sum()),
                },
                "quality": list(QUALITY_NAMES),
                "white": list(self._plan.tissue.white),
                "pixels": bool(self._pixels),
            }
            if self._pixels:
                _write_group(self._partial / "pixels", {})
            _write_group(self._partial, attributes)
            _sync(self._partial)
            with _locked(self._partial.parent):  # for another run may publish the same slide
                shutil.rmtree(self._final, ignore_errors=True)
                self._partial.rename(self._final)
        except (OSError, ValueError) as error:
            self._fail(error)

    def _finish(self, future: ts.WriteFutures) -> None:
        try:
            future.result()
        except ValueError as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # TensorStore tells the system's reason within a sentence of its own.
        reasons = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS))
        reason = next((known for known in reasons if known in str(error)), _first_line(error))
        raise OutputError(
            f"{self._final.parent}: cannot be written ({reason}); free space or choose another --out"
        ) from error


def open_store(store: str | Path, slide_id: str) -> TileStore:
    """One slide of a store. Raises InputError if it is absent, damaged, or of a format this version does not read."""
    path = Path(store) / f"{slide_id}.zarr"
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    except FileNotFoundError:
        raise InputError(f"{path}: not in the store; run crcjax tile for this slide") from None
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged ({_first_line(error)}); delete it and run crcjax tile again") from error
    if attributes.get("format_version") != FORMAT_VERSION:
        found = attributes.get("format_version")
        raise InputError(f"{path}: has store format {found}, this crcjax reads {FORMAT_VERSION}; tile the slide again")
    try:
        return TileStore(path, attributes)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged (zarr.json: {error}); delete it and run crcjax tile again") from error


def tiled_slides(store: str | Path) -> list[str]:
    """The ids of the slides in a store, sorted."""
    return sorted(path.parent.stem for path in Path(store).glob("*.zarr/zarr.json"))


def remove_partials(store: Path) -> None:
    """Removes what writers that no longer live have left. Raises OutputError if the store cannot be written."""
    try:
        partials = store / ".partial"
        partials.mkdir(parents=True, exist_ok=True)
        with _locked(partials):
            for partial in partials.iterdir():
                with suppress(BlockingIOError), _locked(partial, fcntl.LOCK_NB):
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{store}: cannot be written ({error.strerror}); choose another --out") from error


@contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """Holds a folder's lock, which the system frees when its holder dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)


def _kvstore(path: Path) -> dict:
    return {"driver": "file", "path": f"{path}/"}


def _create(path: Path, shape: tuple, shard: tuple, chunk: tuple, dtype: str) -> ts.TensorStore:
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    packed = [checked[0], {"name": "zstd", "configuration": {"level": 1}}, checked[1]]
    sharding = {"chunk_shape": chunk, "codecs": packed, "index_codecs": checked, "index_location": "end"}
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
        # A shard of black tiles must exist, or it could not be told from a lost one.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        "metadata": {
            "shape": shape,
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }
    return ts.open(spec, create=True).result()


def _write_group(path: Path, attributes: dict) -> None:
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (path / "zarr.json").write_text(json.dumps(document, indent=1, sort_keys=True))


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].split(" [")[0]
