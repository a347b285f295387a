"""One slide's tiles on disk: a zarr v3 group that appears under its name only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

import crcjax
from crcjax.errors import BusyError, InputError, writing
from crcjax.slides.store.locks import slide_lock
from crcjax.slides.store.tile_pixels import (
    IMPORTED_ALONE,
    NO_PIXELS,
    PixelReader,
    PixelWriter,
    check_mode,
    pixel_reader,
    pixel_writer,
)
from crcjax.slides.store.zarr_arrays import create_array, open_array, store_path, unreadable, write_group
from crcjax.slides.tiling.plan import TilePlan, TilingParams
from crcjax.slides.tiling.qc_result import QCResult
from crcjax.slides.tiling.quality_control import KEPT, QUALITY_NAMES, REASONS, slide_verdict
from crcjax.slides.tiling.read import Pack, RegionTiles
from crcjax.slides.wsi.slide import Slide, SlideInfo

FORMAT_VERSION = 1
THUMBNAIL_PX = 1024
_SYNCED_TOGETHER = 16
_REMEDY = "delete its zarr.json and run crcjax tile again, which replaces its tiles"


class TileStore:
    """A finished slide in a store. All arrays except the pixels are read on opening."""

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
        self.reason: UInt8[np.ndarray, "region slot"] = self._read("reason")
        self._tiled = self.mask  # the tiles that can be read
        self._pixels: PixelReader | None = None

    def see(self, magnifications: Collection[str]) -> None:
        """Masks the slots of all other magnifications; no slot if none is given. Raises InputError if the store lacks one."""
        if lacking := [name for name in magnifications if name not in self.params.magnifications]:
            has = ", ".join(self.params.magnifications)
            raise InputError(
                f"{self.path}: has {has}, and config.data.magnifications {', '.join(lacking)}; name of those"
            )
        self.mask = self._tiled & self.params.slots_of(magnifications)

    def thumbnail(self) -> tuple[UInt8[np.ndarray, "y x 3"], Bool[np.ndarray, "y x"]]:
        """A picture of the slide, its longer side at most THUMBNAIL_PX, and its tissue mask."""
        return self._read("thumbnail"), self._read("tissue_mask")

    @property
    def qc(self) -> QCResult:
        """The slide's QC result."""
        return QCResult.from_json(self.attributes["verdict"])

    @property
    def pixels(self) -> str:
        """How the pixels are stored: one of tile_pixels.MODES, or NO_PIXELS."""
        return self.attributes["pixels"]

    def read_pixels(
        self, indices: Sequence[int] | np.ndarray, out: UInt8[np.ndarray, "region slot y x 3"] | None = None
    ) -> UInt8[np.ndarray, "region slot y x 3"]:
        """Reads the tiles of these regions, into `out` if it is given; masked slots are zero. Any number of threads may read.

        Raises InputError if the store is damaged, or if it keeps no pixels and its slide is missing or has changed.
        """
        with self._checked():
            if self._pixels is None:
                folder = self.path / "pixels"
                self._pixels = pixel_reader(self.pixels, folder, self.params, self.info, self.origin, self._tiled)
            if out is None:
                out = np.empty((len(indices), self.params.slots, *(self.params.tile_px,) * 2, 3), np.uint8)
            self._pixels.read(np.asarray(indices, np.int64), out)
            return out

    def check_slide(self) -> None:
        """Raises InputError if the pixels are to be read from a slide that is missing, before a long run starts."""
        if self.pixels == NO_PIXELS:
            raise InputError(f"{self.path}: {IMPORTED_ALONE}")
        if self.pixels == "none" and not os.path.exists(self.info.path):
            raise InputError(
                f"{self.path}: keeps no pixels, and its slide {self.info.path} is not there; put it back, or run crcjax "
                "tile on it where it is now"
            )

    def _read(self, name: str) -> np.ndarray:
        with self._checked():
            return open_array(self.path / name).read().result()

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise unreadable(self.path, error, _REMEDY) from error


class StoreWriter:
    """Writes one slide under a partial name; `commit` renames it. Leaving the block without `commit` removes the files.

    `pixels` is one of tile_pixels.MODES. For a slide that is not available, given by its SlideInfo, `pixels` is NO_PIXELS and
    the plan is written without pixels or scores. `locked` says that the caller has the `slide_lock`; otherwise the writer
    takes it. Raises BusyError if another process writes the slide, OutputError if the disk is full or cannot be written,
    InputError for an unknown mode.
    """

    def __init__(
        self,
        store: Path,
        slide_id: str,
        slide: Slide | SlideInfo,
        plan: TilePlan,
        pixels: str,
        *,
        locked: bool = False,
    ):
        if isinstance(slide, Slide):
            check_mode(pixels)
        store = store_path(store)
        self._final = store / f"{slide_id}.zarr"
        self._partial = store / ".partial" / self._final.name
        self._lock = nullcontext() if locked else slide_lock(store, slide_id)
        self._plan = plan
        self._mask = plan.mask.copy()
        self._quality = np.zeros((*plan.mask.shape, len(QUALITY_NAMES)), np.float32)
        self._reason = np.zeros(plan.mask.shape, np.uint8)
        self._slide, self._mode = slide, pixels
        self._info = slide.info if isinstance(slide, Slide) else slide
        self._pixels: PixelWriter | None = None
        self._life = ExitStack()

    def __enter__(self) -> StoreWriter:
        self._life.enter_context(self._lock)
        try:
            with self._writing():
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir(parents=True)
                folder = self._partial / "pixels"
                self._pixels = pixel_writer(self._mode, folder, self._plan, self._slide)
        except BaseException:
            self._life.close()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pixels:
            self._pixels.close()  # a pending write would recreate the folder
        shutil.rmtree(self._partial, ignore_errors=True)
        self._life.close()

    @property
    def pack(self) -> Pack | None:
        """The conversion that `read_regions` applies to each tile, in the thread that reads it."""
        assert self._pixels is not None
        return self._pixels.pack

    def write(self, start: int, tiles: RegionTiles) -> None:
        """Writes regions read with `pack`, from `start` on, in order: a whole shard (tile_pixels.shard_regions), except the last."""
        stop = start + len(tiles.mask)
        self._mask[start:stop] = tiles.mask
        self._quality[start:stop] = tiles.quality
        self._reason[start:stop] = tiles.reason
        assert self._pixels is not None
        with self._writing():
            self._pixels.write(start, tiles)

    def keep(self, files: Mapping[str, str]) -> None:
        """Writes small text files, by their paths within the slide's folder."""
        with self._writing():
            for name, text in files.items():
                path = self._partial / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)

    def commit(self, about: Mapping[str, object] | None = None) -> dict:
        """Publishes the slide in the store, replacing an older one; returns its attributes, which `about` overrides."""
        assert self._pixels is not None
        plan, regions = self._plan, len(self._plan.origin)
        arrays = {"origin": plan.origin, "mask": self._mask, "quality": self._quality, "reason": self._reason}
        arrays |= _small_pictures(plan)
        with self._writing():
            about_pixels = self._pixels.finish()
            for name, values in arrays.items():
                create_array(self._partial / name, str(values.dtype), values.shape).write(values).result()
            attributes = {
                "format_version": FORMAT_VERSION,
                "code_version": crcjax.__version__,
                "slide": self._info.to_json(),
                "tiling": plan.params.to_json(),
                "region_px": plan.region_px,
                "regions": regions,
                "rejected": _rejected(plan, np.where(self._mask, np.uint8(KEPT), self._reason)),
                "areas": plan.areas_id,
                "quality": list(QUALITY_NAMES),
                "verdict": slide_verdict(self._quality, self._reason, plan.params.quality, plan.params.keep_all),
                "white": list(plan.tissue.white),
                "pixels": self._mode,
                **about_pixels,
                **(about or {}),
            }
            if self._mode != NO_PIXELS:
                write_group(self._partial / "pixels", {})
            write_group(self._partial, attributes)
            _sync(self._partial)
            shutil.rmtree(self._final, ignore_errors=True)
            self._partial.rename(self._final)
        return attributes

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self._final.parent, catch=(OSError, ValueError))


def _small_pictures(plan: TilePlan) -> dict[str, np.ndarray]:
    shrink = min(1.0, THUMBNAIL_PX / max(plan.tissue_mask.shape))
    height, width = (max(1, round(side * shrink)) for side in plan.tissue_mask.shape)
    picture = cv2.resize(plan.thumbnail, (width, height), interpolation=cv2.INTER_AREA)
    mask = cv2.resize(plan.tissue_mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return {"thumbnail": picture, "tissue_mask": mask.astype(bool)}


def _rejected(plan: TilePlan, reason: np.ndarray) -> dict[str, int]:
    """Counts the slide's tiles that were not kept, by reason: those that the plan left out and those that failed quality control."""
    failed = Counter(REASONS[code] for code in reason[plan.mask].tolist())
    return dict(Counter(plan.rejected) + failed - Counter({"kept": failed["kept"]}))


def open_store(store: str | Path, slide_id: str) -> TileStore:
    """Opens one slide of a store. Raises InputError if it is missing, damaged, or of a format that this version does not read."""
    path = store_path(store) / f"{slide_id}.zarr"
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    except FileNotFoundError:
        raise InputError(f"{path}: not in the store; run crcjax tile for this slide") from None
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(path, error, "run crcjax tile again, which replaces its tiles") from error
    if attributes.get("format_version") != FORMAT_VERSION:
        version = attributes.get("format_version")
        raise InputError(
            f"{path}: has store format {version}, this crcjax reads {FORMAT_VERSION}; tile the slide again"
        )
    try:
        return TileStore(path, attributes)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: damaged (zarr.json: {error}); run crcjax tile again, which replaces its tiles"
        ) from error


def readable(store: str | Path, slide_id: str) -> TileStore | InputError:
    """Like `open_store`, but returns the error: one damaged slide must not prevent the use of the others."""
    try:
        return open_store(store, slide_id)
    except InputError as error:
        return error


def tiled_slides(store: str | Path) -> list[str]:
    """The ids of the slides in a store, sorted."""
    return sorted(path.parent.stem for path in store_path(store).glob("*.zarr/zarr.json"))


def remove_partials(store: Path) -> None:
    """Removes the partial files of writers that have died. Raises OutputError if the store cannot be written."""
    store = store_path(store)
    with writing(store):
        partials = store / ".partial"
        partials.mkdir(parents=True, exist_ok=True)
        for slide_id in {partial.stem for partial in partials.iterdir()}:
            with suppress(BusyError), slide_lock(store, slide_id):
                shutil.rmtree(partials / f"{slide_id}.zarr", ignore_errors=True)


def _sync(folder: Path) -> None:
    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # In parallel: the file system writes its journal once for all files that wait at the same time.
    with ThreadPoolExecutor(_SYNCED_TOGETHER) as pool:
        list(pool.map(sync, [*folder.rglob("*"), folder]))
