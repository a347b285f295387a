"""Encodes the tiles of a store with a published encoder; decoding, encoding and writing overlap."""

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

# Tiles that a thread decodes at a time.
_TILES_PER_READ = 64
# Tiles per device of the program whose memory is measured.
_PROBE_TILES = 4
# The largest batch per device. A larger one does not make a CPU faster.
_LARGEST_BATCH = {"cpu": 16}
_LARGEST_BATCH_ELSEWHERE = 256
# The share of the free memory that a batch may take.
_MEMORY_SHARE = 0.8
# The option of crcjax embed that decides each attribute of stored features.
_OPTIONS = {"weights_sha256": "--weights", "mpp": "--mag", "magnifications": "--mag", "dtype": "--dtype"}


@dataclass(frozen=True)
class Embedded:
    """The outcome for one slide: `status` is `embedded`, `already embedded`, or `failed` with a `reason`."""

    slide_id: str
    status: str
    tiles: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class View:
    """The magnifications of a store that an encoder reads, and the µm per px of each after resizing.

    `warning` is a sentence if these resolutions are far from the encoder's training, and empty otherwise.
    """

    magnifications: tuple[str, ...]
    mpp: tuple[float, ...]
    warning: str

    def slots(self, params: TilingParams) -> Bool[np.ndarray, " slot"]:
        """Marks the slots of these magnifications."""
        return params.slots_of(self.magnifications)


def choose_view(params: TilingParams, encoder: PretrainedEncoder, magnifications: Sequence[str] = ()) -> View:
    """Chooses the magnification of a store that is nearest to the encoder's resolution.

    Args:
      params: the tiling of the store.
      encoder: the encoder, with the resolution of its training.
      magnifications: if given, these are chosen instead.

    Raises:
      InputError: the store lacks one of `magnifications`.
    """
    unknown = set(magnifications) - set(params.magnifications)
    if unknown:
        raise InputError(f"--mag {', '.join(unknown)}: the store has {', '.join(params.magnifications)}")
    # An encoder of natural images has no resolution; 20x shows cells well.
    encoder_mpp = encoder.mpp or 0.5

    def resized_mpp(name: str) -> float:
        return mpp_of(name) * params.tile_px / encoder.resize_px

    def octaves_off(name: str) -> float:
        return abs(math.log2(resized_mpp(name) / encoder_mpp))

    chosen = tuple(magnifications) or (min(params.magnifications, key=octaves_off),)
    far = [f"{name} as {resized_mpp(name):.2g}" for name in chosen if octaves_off(name) > 0.5 and encoder.mpp]
    nearest = min(("5x", "10x", "20x", "40x"), key=octaves_off)
    remedy = (
        f"the encoder was trained at {encoder_mpp} µm per px; crcjax tile --mag {nearest} makes tiles nearest to that"
    )
    warning = f"{', '.join(far)} µm per px; {remedy}" if far else ""
    return View(chosen, tuple(resized_mpp(name) for name in chosen), warning)


class Embedder:
    """An encoder with its weights on all devices.

    Args:
      name: the encoder (`crcjax.models.encoders.registry.PRETRAINED`).
      weights: the file of its weights.
      dtype: the type of the computation: "float32", "bfloat16" or "float16".
      tile_px: the side of the tiles.
      batch: tiles per batch over all devices, rounded up to a multiple of the devices. By default it is the largest power
        of two per device whose program, by the compiler's count, fits the free memory.
      largest_slide: the tiles of the largest slide; the default batch does not exceed the power of two above it.

    Raises:
      InputError: the weights do not fit the encoder.
    """

    def __init__(
        self, name: str, weights: Path, dtype: str, tile_px: int, batch: int | None, largest_slide: int = 1 << 20
    ):
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
        self.batch = -(-batch // self._devices) * self._devices if batch else self._fitting_batch(largest_slide)
        self._program = self._compiled(self.batch)

    def encode(self, pixels: UInt8[np.ndarray, "tile y x 3"]) -> Float[Array, "padded feature"]:
        """Starts the encoding of at most `batch` tiles and returns their features, padded to `batch`, without waiting for them."""
        padding = [(0, self.batch - len(pixels)), (0, 0), (0, 0), (0, 0)]
        return self._program(self._state, np.pad(pixels, padding))

    def _compiled(self, batch: int) -> jax.stages.Compiled:
        tiles = jax.ShapeDtypeStruct((batch, self._tile_px, self._tile_px, 3), jnp.uint8)
        # By default, GPUs multiply float32 in a format of fewer bits.
        with jax.default_matmul_precision("highest" if self.dtype == "float32" else "default"):
            return self._forward.lower(self._state, tiles).compile()

    def _fitting_batch(self, largest_slide: int) -> int:
        """Extrapolates the memory of any batch from one program: the weights are constant, the rest grows with the tiles."""
        device = jax.local_devices()[0]
        stats = device.memory_stats() or {}
        free_bytes = stats.get("bytes_limit", psutil.virtual_memory().available // jax.local_device_count())
        memory = self._compiled(_PROBE_TILES * self._devices).memory_analysis()
        if memory is None:
            raise InputError(f"{device.platform}: its compiler does not count memory; give --batch")
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))
        pixel_bytes = self._tile_px**2 * 3
        tile_bytes = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / _PROBE_TILES + pixel_bytes
        fitting = max(1.0, (free_bytes * _MEMORY_SHARE - weight_bytes) / tile_bytes)
        # A batch of more tiles than the largest slide has would be mostly padding.
        largest = min(_LARGEST_BATCH.get(device.platform, _LARGEST_BATCH_ELSEWHERE), -(-largest_slide // self._devices))
        return self._devices * min(1 << int(math.log2(fitting)), 1 << (largest - 1).bit_length())


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
    """Encodes every slide of a store that has no features of this encoder yet, and stores them as float16.

    The features of a slide are written whole or not at all. A slide that cannot be read does not stop the others.

    Args:
      store: the folder of crcjax tile.
      name: the encoder, under whose name the features are stored.
      weights: the file of its weights.
      batch: tiles per batch; by default, as many as fit the free memory (see `Embedder`).
      magnifications: the magnifications to encode; by default, the one nearest to the encoder's resolution.
      dtype: the type of the computation; by default bfloat16, on CPUs float32.
      threads: threads that decode tiles; by default, one per usable core.
      on_start: called with the view, the number of slides and the batch before the first slide.
      on_slide: called with the outcome of each slide.

    Returns:
      One outcome per slide of the store.

    Raises:
      InputError: the store, the encoder or the weights are not usable, or the store has features of this name that were
        made with other weights or settings.
      OutputError: the store cannot be written.
    """
    encoder = pretrained_encoder(name)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    slides = tiled_slides(store)
    if not slides:
        raise InputError(f"{store}: holds no tiled slides; run crcjax tile --out {store}")
    stores = {slide_id: readable(store, slide_id) for slide_id in slides}
    readable_stores = [opened for opened in stores.values() if isinstance(opened, TileStore)]
    if not readable_stores:
        raise InputError(f"{store}: none of its slides can be read; the first: {stores[slides[0]]}")
    params = readable_stores[0].params
    view = choose_view(params, encoder, magnifications)
    slots = view.slots(params)
    largest_slide = max(int(opened.mask[:, slots].sum()) for opened in readable_stores)
    embedder = Embedder(name, weights, dtype, params.tile_px, batch, largest_slide)
    attributes = {
        "encoder": name,
        "weights_sha256": embedder.weights_sha256,
        "mpp": list(view.mpp),
        "magnifications": list(view.magnifications),
        "dtype": dtype,
    }
    is_embedded = {opened.slide_id: _is_embedded(store, opened.slide_id, attributes) for opened in readable_stores}
    on_start(view, len(slides), embedder.batch)
    outcomes = []
    for slide_id, opened in stores.items():
        outcome = Embedded(slide_id, "already embedded")
        if not isinstance(opened, TileStore):
            outcome = Embedded(slide_id, "failed", reason=str(opened))
        elif not is_embedded[slide_id]:
            outcome = _embed_slide(store, opened, embedder, slots, attributes, threads)
        outcomes.append(outcome)
        on_slide(outcome)
    return outcomes


def _is_embedded(store: Path, slide_id: str, attributes: dict) -> bool:
    """Whether a slide has features with these attributes. Raises InputError if it has features with other attributes."""
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
    start = time.monotonic()
    mask = slide_store.mask & slots
    try:
        slide_store.check_slide()
        features = list(_encoded(embedder, _tiles(slide_store, mask, threads or usable_cores())))
    except InputError as error:
        return Embedded(slide_store.slide_id, "failed", reason=str(error))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).splitlines() or ["out of memory"])[0]
        return Embedded(slide_store.slide_id, "failed", reason=f"{reason}; free memory, or give a smaller --batch")
    values = np.zeros((*mask.shape, embedder.encoder.features), np.float16)
    with np.errstate(over="ignore"):
        values[mask] = np.concatenate(features) if features else 0
    if not np.isfinite(values).all():
        reason = (
            "features must be finite in float16, and are not; check that the weights are undamaged and of this encoder"
        )
        return Embedded(slide_store.slide_id, "failed", reason=reason)
    write_features(store, slide_store.slide_id, embedder.name, values, attributes)
    return Embedded(slide_store.slide_id, "embedded", int(mask.sum()), time.monotonic() - start)


def _tiles(
    store: TileStore, mask: Bool[np.ndarray, "region slot"], threads: int
) -> Iterator[UInt8[np.ndarray, "tile y x 3"]]:
    """Yields the tiles where the mask is True, in its order, a few regions at a time; `threads` decode ahead of the devices."""
    regions_per_read = max(1, _TILES_PER_READ // mask.shape[1])
    regions = np.flatnonzero(mask.any(axis=1))

    def read(start: int) -> UInt8[np.ndarray, "tile y x 3"]:
        chunk = regions[start : start + regions_per_read]
        return store.read_pixels(chunk)[mask[chunk]]

    reads = (partial(read, start) for start in range(0, len(regions), regions_per_read))
    return read_ahead(reads, threads, ahead=2 * threads)


def _encoded(
    embedder: Embedder, chunks: Iterator[UInt8[np.ndarray, "tile y x 3"]]
) -> Iterator[Float[np.ndarray, "tile feature"]]:
    """Yields features batch by batch; while the devices encode one batch, the host assembles the next."""
    in_flight: deque[tuple[Array, int]] = deque()
    queued: list[np.ndarray] = []
    for chunk in chunks:
        queued.append(chunk)
        while sum(map(len, queued)) >= embedder.batch:
            tiles = np.concatenate(queued)
            queued = [tiles[embedder.batch :]]
            in_flight.append((embedder.encode(tiles[: embedder.batch]), embedder.batch))
            if len(in_flight) > 1:
                yield _finished(in_flight)
    remaining = sum(map(len, queued))
    if remaining:
        in_flight.append((embedder.encode(np.concatenate(queued)), remaining))
    while in_flight:
        yield _finished(in_flight)


def _finished(in_flight: deque[tuple[Array, int]]) -> Float[np.ndarray, "tile feature"]:
    """Waits for the first batch in flight and removes its padding."""
    features, count = in_flight.popleft()
    return np.asarray(features)[:count]
