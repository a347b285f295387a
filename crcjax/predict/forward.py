"""Runs the model on whole bags of any length."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Key, Num

from crcjax.models.mil import MILModel, Params
from crcjax.models.prediction import Prediction
from crcjax.parallel.mesh import over_data, replicated
from crcjax.slides.stain.methods import StainEstimate
from crcjax.slides.stain.normalisation import StainNormaliser


class Forward:
    """Runs the model on one bag at a time: it encodes regions in chunks and pools their features padded to a bucket.

    Evaluation during training and prediction use it, each process on the devices attached to it (`local_mesh`). XLA compiles
    one program for the chunks and one for each bucket.

    Args:
      model: the model; its parameters are passed to every call.
      buckets: numbers of regions that bags are padded to; longer bags are padded to a multiple of the largest.
      chunk: regions encoded at a time, rounded up to a multiple of the devices.
      mesh: devices along the axis `data`.
      normaliser: stain normalisation of the tiles, if any.
      stored: whether the tiles are stored features in place of pixels.
    """

    def __init__(
        self,
        model: MILModel,
        buckets: tuple[int, ...],
        chunk: int,
        mesh: Mesh,
        normaliser: StainNormaliser | None = None,
        stored: bool = False,
    ):
        model.set_attributes(fused=True, raise_if_not_found=False)
        graph = nnx.graphdef(model)
        self._devices = mesh.shape["data"]
        self.chunk = -(-chunk // self._devices) * self._devices
        self._buckets = sorted(buckets)
        self.normaliser, self.stored = normaliser, stored
        self._over_data, self._replicated = over_data(mesh), replicated(mesh)

        def encode(params: Params, tiles: Array, stain: StainEstimate | None) -> Array:
            model = nnx.merge(graph, params)
            if stored:
                return model.encode_stored(tiles)
            return model.encode(normaliser.batch(tiles, stain) if normaliser and stain is not None else tiles)

        self._encode = jax.jit(
            encode,
            in_shardings=(replicated(mesh), over_data(mesh), over_data(mesh)),
            out_shardings=replicated(mesh),
        )
        self._pool = jax.jit(lambda params, *bag: nnx.merge(graph, params).pool(*bag))
        # Programs that were compiled ahead, or are being compiled, by name and size.
        self._ahead: dict[tuple[str, int], threading.Event] = {}

    def compile_ahead(
        self, params: Params, regions: int, tile_shape: Sequence[int], features: int, stain: StainEstimate | None = None
    ) -> None:
        """Compiles the programs that encode and pool one bag, unless that was done; other threads may encode meanwhile.

        Args:
          params: the parameters, on the devices.
          regions: those of the bag.
          tile_shape: (slot, *tile) of the bag's pixels.
          features: the number of features of a tile.
          stain: the stain estimate of a slide; required with a normaliser.
        """

        def compile_encoder() -> None:
            like = partial(jax.ShapeDtypeStruct, sharding=self._over_data)
            tiles = like((self.chunk, *tile_shape), np.uint8)
            stains = jax.tree.map(lambda leaf: like((self.chunk, *np.shape(leaf)), np.asarray(leaf).dtype), stain)
            self._encode.lower(params, tiles, stains).compile()

        def compile_pool() -> None:
            bag = (
                np.zeros((regions, tile_shape[0], features), np.float32),
                np.zeros((regions, tile_shape[0]), bool),
                np.zeros((regions, 2), np.float32),
            )
            like = partial(jax.ShapeDtypeStruct, sharding=self._replicated)
            self._pool.lower(params, *(like(array.shape, array.dtype) for array in self.padded(*bag)), None).compile()

        programs = {("encode", self.chunk): compile_encoder, ("pool", self._bucket(regions)): compile_pool}
        for program, compile_program in programs.items():
            # `setdefault` is atomic: one thread compiles, and all others wait for it where they need the program.
            if (compiled := threading.Event()) is self._ahead.setdefault(program, compiled):
                try:
                    compile_program()
                finally:
                    compiled.set()

    def _wait_for(self, name: str, size: int) -> None:
        if compiled := self._ahead.get((name, size)):
            compiled.wait()

    def _bucket(self, regions: int) -> int:
        """The regions that a bag is padded to; above the largest bucket, a multiple of it."""
        largest = self._buckets[-1]
        return next((size for size in self._buckets if size >= regions), -(-regions // largest) * largest)

    def encode(
        self, params: Params, tiles: Num[np.ndarray, "region slot *tile"], stain: StainEstimate | None = None
    ) -> Array:
        """Starts the encoding of at most `chunk` regions and returns their features, padded to `chunk`, without waiting.

        Args:
          params: the parameters, on the devices.
          tiles: pixels, or with `stored`, the features of a published encoder.
          stain: the stain estimate of each region's slide, with the leading axis region; required with a normaliser.
        """

        def padded(array: np.ndarray) -> np.ndarray:
            missing = self.chunk - len(array)
            return np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)], mode="edge") if missing else array

        self._wait_for("encode", self.chunk)
        return self._encode(params, *jax.device_put((padded(tiles), jax.tree.map(padded, stain)), self._over_data))

    def halve(self, chunk: int) -> bool:
        """Makes chunks smaller than `chunk`, which did not fit the memory; False if that is one region a device already."""
        if self.chunk >= chunk > self._devices:
            self.chunk = -(-(self.chunk // 2) // self._devices) * self._devices
        return self.chunk < chunk

    def pool(
        self,
        params: Params,
        features: Float32[np.ndarray, "region slot feature"],
        mask: Bool[np.ndarray, "region slot"],
        position: Float32[np.ndarray, "region 2"],
        key: Key[Array, ""] | None = None,
    ) -> Prediction:
        """Predicts one bag; returns host arrays without padding. With a key, dropout is active."""
        regions = len(mask)
        self._wait_for("pool", self._bucket(regions))
        bag = jax.device_put(self.padded(features, mask, position), self._replicated)
        result = jax.device_get(self._pool(params, *bag, None if key is None else key[None]))
        return replace(
            result,
            region_attention=result.region_attention[:, :regions],
            slot_attention=result.slot_attention[:, :regions],
            class_attention=result.class_attention[:, :regions],
        )

    def padded(
        self,
        features: Float32[np.ndarray, "region slot feature"],
        mask: Bool[np.ndarray, "region slot"],
        position: Float32[np.ndarray, "region 2"],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pads a bag with masked regions to a bucket and adds the batch axis."""
        padding = ((0, self._bucket(len(mask)) - len(mask)), (0, 0))
        return (
            np.pad(features, (*padding, (0, 0)))[None],
            np.pad(mask, padding)[None],
            np.pad(position, padding)[None],
        )

    def bag(
        self,
        params: Params,
        chunks: Iterable[Num[np.ndarray, "_ slot *tile"]],
        mask: Bool[np.ndarray, "region slot"],
        position: Float32[np.ndarray, "region 2"],
        stain: StainEstimate | None = None,
    ) -> Prediction:
        """Predicts one bag from chunks of its regions, each of `chunk` regions; the last may have fewer."""
        return self.pool(params, self.features(params, chunks, stain), mask, position)

    def features(
        self,
        params: Params,
        chunks: Iterable[Num[np.ndarray, "_ slot *tile"]],
        stain: StainEstimate | None = None,
    ) -> Float32[np.ndarray, "region slot feature"]:
        """Encodes one bag from chunks of its regions, each of `chunk` regions; the last may have fewer."""
        encoded = (
            jax.device_get(self.encode(params, tiles, by_region([stain], [len(tiles)])))[: len(tiles)]
            for tiles in chunks
        )
        return np.concatenate(list(encoded))


def by_region(stains: Sequence[StainEstimate | None], counts: Sequence[int]) -> StainEstimate | None:
    """The stain estimate of each region, with the leading axis region.

    Args:
      stains: the estimate of each slide; None without normalisation.
      counts: the number of regions of each slide.
    """
    if stains[0] is None:
        return None
    return jax.tree.map(lambda *leaves: np.repeat(np.stack(leaves), counts, axis=0), *stains)
