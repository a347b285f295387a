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

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

import crcjax
from crcjax.errors import InputError, OutputError
from crcjax.slides.arrays import create_array, first_line, open_array, write_group
from crcjax.slides.pixels import PixelReader, PixelWriter, check_mode, pixel_reader, pixel_writer
from crcjax.slides.quality import QUALITY_NAMES
from crcjax.slides.reader import Slide, SlideInfo
from crcjax.slides.tiling import RegionTiles, TilePlan, TilingParams

FORMAT_VERSION = 1


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
        self._pixels: PixelReader | None = None

    @property
    def pixels(self) -> str:
        """How it keeps them, one of slides.pixels.MODES."""
        return self.attributes["pixels"]

    def read_pixels(self, indices: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "region slot y x 3"]:
        """The tiles of some regions, masked slots zero; any number of threads may read.

        Raises InputError if the store is damaged, or keeps no pixels and its slide is not there as it was.
        """
        with self._checked():
            if self._pixels is None:
                folder = self.path / "pixels"
                self._pixels = pixel_reader(self.pixels, folder, self.params, self.info, self.origin, self.mask)
            return self._pixels.read(np.asarray(indices, np.int64))

    def _read(self, name: str) -> np.ndarray:
        with self._checked():
            return open_array(self.path / name).read().result()

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise InputError(
                f"{self.path}: damaged ({first_line(error)}); delete it and run crcjax tile again"
            ) from error


class StoreWriter:
    """Writes one slide under a partial name; `commit` gives it its own. Leaving without it removes what was written.

    `pixels` is one of slides.pixels.MODES; `threads` encode them where that is to be done. Raises OutputError where the
    disk is full or may not be written, InputError for another mode.
    """

    def __init__(self, store: Path, slide_id: str, slide: Slide, plan: TilePlan, pixels: str, threads: int = 1):
        check_mode(pixels)
        self._final = store / f"{slide_id}.zarr"
        self._partial = store / ".partial" / f"{slide_id}.{os.getpid()}"
        self._plan = plan
        self._mask = plan.mask.copy()
        self._quality = np.zeros((*plan.mask.shape, len(QUALITY_NAMES)), np.float32)
        self._slide, self._mode, self._threads = slide, pixels, threads
        self._pixels: PixelWriter | None = None
        self._life = ExitStack()

    def __enter__(self) -> StoreWriter:
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._partial.parent):
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir()
                self._life.enter_context(_locked(self._partial))
            folder = self._partial / "pixels"
            self._pixels = pixel_writer(self._mode, folder, self._plan, self._slide, self._threads)
        except (OSError, ValueError) as error:
            self._fail(error)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pixels:
            self._pixels.close()  # a write that is still under way would make the folder again
        self._life.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, start: int, tiles: RegionTiles) -> None:
        """Regions from `start` on, in order, a whole shard (slides.pixels.shard_regions) but for the last."""
        stop = start + len(tiles.mask)
        self._mask[start:stop] = tiles.mask
        self._quality[start:stop] = tiles.quality
        assert self._pixels is not None
        try:
            self._pixels.write(start, tiles)
        except ValueError as error:
            self._fail(error)

    def commit(self) -> None:
        """Makes the slide appear in the store, whole, replacing an older one of that name."""
        assert self._pixels is not None
        origin, regions = self._plan.origin, len(self._plan.origin)
        try:
            about_pixels = self._pixels.finish()
            for name, values in {"origin": origin, "mask": self._mask, "quality": self._quality}.items():
                create_array(self._partial / name, str(values.dtype), values.shape).write(values).result()
            failed = self._plan.mask & ~self._mask
            glass = failed & (self._quality[..., 0] < self._plan.params.min_stained)
            attributes = {
                "format_version": FORMAT_VERSION,
                "code_version": crcjax.__version__,
                "slide": self._slide.info.to_json() | {"path": os.path.abspath(self._slide.info.path)},
                "tiling": self._plan.params.to_json(),
                "region_px": self._plan.region_px,
                "regions": regions,
                "rejected": {
                    "glass": self._plan.rejected["glass"] + int(glass.sum()),
                    "blurred": int((failed & ~glass).sum()),
                },
                "quality": list(QUALITY_NAMES),
                "white": list(self._plan.tissue.white),
                "pixels": self._mode,
                **about_pixels,
            }
            write_group(self._partial / "pixels", {})
            write_group(self._partial, attributes)
            _sync(self._partial)
            with _locked(self._partial.parent):  # for another run may publish the same slide
                shutil.rmtree(self._final, ignore_errors=True)
                self._partial.rename(self._final)
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # TensorStore tells the system's reason within a sentence of its own.
        reasons = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS))
        reason = next((known for known in reasons if known in str(error)), first_line(error))
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
        raise InputError(f"{path}: damaged ({first_line(error)}); delete it and run crcjax tile again") from error
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


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
