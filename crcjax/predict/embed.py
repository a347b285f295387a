"""Features of stores' tiles by a published encoder: decoding, computing and writing at the same time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from crcjax.errors import InputError
from crcjax.models.encoders.registry import PretrainedEncoder, pretrained_encoder
from crcjax.models.mil import DTYPES
from crcjax.parallel.compilation_cache import use_compilation_cache
from crcjax.parallel.mesh import device_mesh, over_data, replicated
from crcjax.runs.pretrained_weights import load_encoder
from crcjax.slides.jobs.read_ahead import read_ahead
from crcjax.slides.jobs.usable_cores import usable_cores
from crcjax.slides.store.features import feature_attributes, write_features
from crcjax.slides.store.tile_store import TileStore, readable, tiled_slides
from crcjax.slides.tiling.plan import TilingParams, mpp_of

_READ_TOGETHER = 64  # tiles that a thread decodes at a time
_PROBED = 4  # tiles a device of the program whose memory is measured
_MOST = {"cpu": 16}  # tiles a device and batch: more keep a CPU no busier
_MOST_ELSEWHERE = 256
_MEMORY_USED = 0.8  # of what is free
# The option of crcjax embed that decides each attribute of stored features.
_OPTIONS = {"weights_sha256": "--weights", "mpp": "--mag", "magnifications": "--mag", "dtype": "--dtype"}


@dataclass(frozen=True)
class Embedded:
    """What became of a slide: `embedded`, `already embedded` or `failed`, for a `reason`."""

    slide_id: str
    status: str
    tiles: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class View:
    """How an encoder sees a store's tiles: at which magnifications, and at how many µm per px once they are resized.

    `warning` says in words if that is far from what the encoder was trained on, else it is empty.
    """

    magnifications: tuple[str, ...]
    mpp: tuple[float, ...]
    warning: str

    def slots(self, params: TilingParams) -> Bool[np.ndarray, " slot"]:
        """The slots of those magnifications."""
        return params.slots_of(self.magnifications)


def choose_view(params: TilingParams, encoder: PretrainedEncoder, magnifications: Sequence[str] = ()) -> View:
    """Of a store's magnifications the one nearest to the encoder's resolution, or those named. Raises InputError."""
    unknown = set(magnifications) - set(params.magnifications)
    if unknown:
        raise InputError(f"--mag {', '.join(unknown)}: the store has {', '.join(params.magnifications)}")
    wanted = encoder.mpp or 0.5  # natural images have none: cells are seen well at 20x

    def resized_mpp(name: str) -> float:
        return mpp_of(name) * params.tile_px / encoder.resize_px

    seen_mpp = {name: resized_mpp(name) for name in params.magnifications}
    off = {name: abs(math.log2(mpp / wanted)) for name, mpp in seen_mpp.items()}
    chosen = tuple(magnifications) or (min(seen_mpp, key=lambda name: off[name]),)
    far = [f"{name} as {seen_mpp[name]:.2g}" for name in chosen if off[name] > 0.5 and encoder.mpp]
    near = min(("5x", "10x", "20x", "40x"), key=lambda name: abs(math.log2(resized_mpp(name) / wanted)))
    remedy = f"the encoder was trained at {wanted} µm per px: crcjax tile --mag {near} would suit it"
    return View(
        chosen, tuple(seen_mpp[name] for name in chosen), f"{', '.join(far)} µm per px; {remedy}" if far else ""
    )


class Embedder:
    """An encoder with its weights on all devices.

    `batch` is the number of tiles over all devices, rounded up to their multiple; by default the largest power of two
    whose program fits the free memory, as its compiler counts it. Raises InputError for weights that do not fit.
    """

    def __init__(self, name: str, weights: Path, dtype: str, tile_px: int, batch: int | None, most: int = 1 << 20):
        self.name, self.dtype = name, dtype
        use_compilation_cache()
        self.encoder = pretrained_encoder(name)
        module, self.weights_sha256 = load_encoder(name, weights, DTYPES[dtype])
        mesh = device_mesh()
        self._devices = mesh.size
        graph, state = nnx.split(module)
        self._state = jax.device_put(state, replicated(mesh))
        self._tile_px = tile_px
        self._forward = jax.jit(
            lambda state, pixels: nnx.merge(graph, state)(self.encoder.prepare(pixels)).astype(jnp.float32),
            in_shardings=(replicated(mesh), over_data(mesh)),
            out_shardings=over_data(mesh),
        )
        self.batch = -(-batch // self._devices) * self._devices if batch else self._fitting_batch(most)
        self._program = self._compiled(self.batch)

    def encode(self, pixels: UInt8[np.ndarray, "tile y x 3"]) -> Float[Array, "padded feature"]:
        """Features of at most `batch` tiles, padded to it; not waited for."""
        padding = [(0, self.batch - len(pixels)), (0, 0), (0, 0), (0, 0)]
        return self._program(self._state, np.pad(pixels, padding))

    def _compiled(self, batch: int) -> jax.stages.Compiled:
        tiles = jax.ShapeDtypeStruct((batch, self._tile_px, self._tile_px, 3), jnp.uint8)
        # By default GPUs multiply float32 in a shorter format, which is not what was asked for.
        with jax.default_matmul_precision("highest" if self.dtype == "float32" else "default"):
            return self._forward.lower(self._state, tiles).compile()

    def _fitting_batch(self, most: int) -> int:
        """The program's weights stay and the rest grows with the tiles: one measured program tells of all."""
        device = jax.local_devices()[0]
        stats = device.memory_stats() or {}
        free = stats.get("bytes_limit", psutil.virtual_memory().available // jax.local_device_count())
        memory = self._compiled(_PROBED * self._devices).memory_analysis()
        if memory is None:
            raise InputError(f"{device.platform}: its compiler does not count memory; give --batch")
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))
        per_tile = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / _PROBED + self._tile_px**2 * 3
        fitting = max(1.0, (free * _MEMORY_USED - weights) / per_tile)
        # More than the largest slide has would be padding.
        most = min(_MOST.get(device.platform, _MOST_ELSEWHERE), -(-most // self._devices))
        return self._devices * min(1 << int(math.log2(fitting)), 1 << (most - 1).bit_length())


def embed_store(
    store: Path,
    name: str,
    weights: Path,
    *,
    batch: int | None = None,
    magnifications: Sequence[str] = (),
    dtype: str | None = None,
    threads: int | None = None,
    on_start: Callable[[View, int, int], None] = lambda view, slides, batch: None,
    on_slide: Callable[[Embedded], None] = lambda outcome: None,
) -> list[Embedded]:
    """Writes features/NAME for every slide of a store that has none; one slide is written whole or not at all.

    Computes in `dtype`, by default bfloat16, on CPUs float32; features are kept in float16. `on_start` receives the
    view, the number of slides and the batch. A slide that cannot be read is `failed`. Raises InputError for a store, an encoder
    or weights that are not usable, and if features of that name were made in another way; OutputError if the store cannot
    be written.
    """
    encoder = pretrained_encoder(name)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    slides = tiled_slides(store)
    if not slides:
        raise InputError(f"{store}: holds no tiled slides; run crcjax tile --out {store}")
    stores = {slide_id: readable(store, slide_id) for slide_id in slides}
    opened = [one for one in stores.values() if isinstance(one, TileStore)]
    if not opened:
        raise InputError(f"{store}: none of its slides can be read; the first: {stores[slides[0]]}")
    params = opened[0].params
    view = choose_view(params, encoder, magnifications)
    slots = view.slots(params)
    most = max(int(one.mask[:, slots].sum()) for one in opened)
    embedder = Embedder(name, weights, dtype, params.tile_px, batch, most)
    attributes = {
        "encoder": name,
        "weights_sha256": embedder.weights_sha256,
        "mpp": list(view.mpp),
        "magnifications": list(view.magnifications),
        "dtype": dtype,
    }
    done = {one.slide_id: _is_done(store, one.slide_id, attributes) for one in opened}
    on_start(view, len(slides), embedder.batch)
    outcomes = []
    for slide_id, one in stores.items():
        outcome = Embedded(slide_id, "already embedded")
        if not isinstance(one, TileStore):
            outcome = Embedded(slide_id, "failed", reason=str(one))
        elif not done[slide_id]:
            outcome = _embed_slide(store, one, embedder, slots, attributes, threads)
        outcomes.append(outcome)
        on_slide(outcome)
    return outcomes


def _is_done(store: Path, slide_id: str, attributes: dict) -> bool:
    stored = feature_attributes(store, slide_id, attributes["encoder"])
    if stored is None:
        return False
    for name, value in attributes.items():
        if stored.get(name) != value:
            folder = store / f"{slide_id}.zarr" / "features" / attributes["encoder"]
            to_keep = f"give the {_OPTIONS.get(name, '--encoder')} that they were made with"
            if "imported" in stored:
                to_keep = "train on them"
            raise InputError(
                f"{folder}: its features have the {name} {stored.get(name)}, and this command would compute {value}; "
                f"{to_keep} to keep them, or delete the folder to replace them"
            )
    return True


def _embed_slide(
    store: Path,
    slide_store: TileStore,
    embedder: Embedder,
    slots: Bool[np.ndarray, " slot"],
    attributes: dict,
    threads: int | None,
) -> Embedded:
    begun = time.monotonic()
    mask = slide_store.mask & slots
    try:
        slide_store.check_slide()
        parts = list(_encoded(embedder, _tiles(slide_store, mask, threads or usable_cores())))
    except InputError as error:
        return Embedded(slide_store.slide_id, "failed", reason=str(error))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).splitlines() or ["out of memory"])[0]
        return Embedded(slide_store.slide_id, "failed", reason=f"{reason}; free memory, or give a smaller --batch")
    values = np.zeros((*mask.shape, embedder.encoder.features), np.float16)
    with np.errstate(over="ignore"):
        values[mask] = np.concatenate(parts) if parts else 0
    if not np.isfinite(values).all():
        reason = "features beyond float16's range or not finite; the weights are damaged, or another encoder's"
        return Embedded(slide_store.slide_id, "failed", reason=reason)
    write_features(store, slide_store.slide_id, embedder.name, values, attributes)
    return Embedded(slide_store.slide_id, "embedded", int(mask.sum()), time.monotonic() - begun)


def _tiles(
    store: TileStore, mask: Bool[np.ndarray, "region slot"], threads: int
) -> Iterator[UInt8[np.ndarray, "tile y x 3"]]:
    """The tiles where the mask is True, in its order, some regions at a time, decoded by threads ahead of the devices."""
    together = max(1, _READ_TOGETHER // mask.shape[1])
    regions = np.flatnonzero(mask.any(axis=1))

    def read(start: int) -> UInt8[np.ndarray, "tile y x 3"]:
        chunk = regions[start : start + together]
        return store.read_pixels(chunk)[mask[chunk]]

    reads = (partial(read, start) for start in range(0, len(regions), together))
    return read_ahead(reads, threads, ahead=2 * threads)


def _encoded(
    embedder: Embedder, parts: Iterator[UInt8[np.ndarray, "tile y x 3"]]
) -> Iterator[Float[np.ndarray, "tile feature"]]:
    """Features batch by batch; while the devices compute one, the next is put together."""
    running: deque[tuple[Array, int]] = deque()
    waiting: list[np.ndarray] = []
    for part in parts:
        waiting.append(part)
        while sum(map(len, waiting)) >= embedder.batch:
            tiles = np.concatenate(waiting)
            waiting = [tiles[embedder.batch :]]
            running.append((embedder.encode(tiles[: embedder.batch]), embedder.batch))
            if len(running) > 1:
                yield _taken(running)
    rest = sum(map(len, waiting))
    if rest:
        running.append((embedder.encode(np.concatenate(waiting)), rest))
    while running:
        yield _taken(running)


def _taken(running: deque[tuple[Array, int]]) -> Float[np.ndarray, "tile feature"]:
    features, count = running.popleft()
    return np.asarray(features)[:count]
