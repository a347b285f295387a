"""Training batches: reads stores with Grain and places batches on the devices ahead of the step."""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from grain import DatasetIterator
from grain.experimental import ThreadPrefetchIterDataset
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32, Int8
from ml_collections import ConfigDict

from crcjax.data.bags import Bag, StoredSlides, bag_spec, open_slides, read_bag, slide_stains
from crcjax.data.case_bags import CaseFeatures, CaseStore, by_unit
from crcjax.data.cohort import Cohort
from crcjax.data.hard_mining import MemoryFolder
from crcjax.data.sampler import Sampler, sampler_of
from crcjax.data.sampling import slide_weights
from crcjax.data.tile_labels import bag_labels
from crcjax.errors import InputError
from crcjax.slides.jobs.worker_pool import NO_MAIN_GUARD, NO_MAIN_GUARD_STATUS
from crcjax.slides.stain.methods import StainEstimate
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.slides.store.features import FeatureReader
from crcjax.slides.store.tile_store import TileStore

# A block of a batch: a range of its bags, and a range of their regions.
Block = tuple[range, range]


def train_batches(
    cohort: Cohort,
    config: ConfigDict,
    mesh: Mesh,
    start_step: int,
    normaliser: StainNormaliser | None = None,
    memory_folder: MemoryFolder | None = None,
) -> Batches:
    """Opens the stores of a cohort, and returns the batches from `start_step` to config.train.steps."""
    return open_feed(training_slides(cohort, config), config, mesh, normaliser).batches(start_step, memory_folder)


def training_slides(cohort: Cohort, config: ConfigDict) -> StoredSlides:
    """Opens the slides of a cohort for training by `config` (the whole config)."""
    data = config.data
    return open_slides(data.store, cohort, data.magnifications, config.model.encoder if data.features else None)


def open_feed(slides: StoredSlides, config: ConfigDict, mesh: Mesh, normaliser: StainNormaliser | None = None) -> Feed:
    """The source of the training batches, divided over the mesh: bags over `data`, their regions over `bag`.

    A batch depends on the seed, the step and the published mining memory alone. A resumed run therefore reads the same
    batches as an uninterrupted one, with any number of reader processes. Each process reads only the blocks of its devices.

    Raises:
      InputError: here or while reading, for an empty split, a damaged or missing store, or a batch that cannot be divided
        evenly over the devices.
    """
    cohort, data = slides.cohort, config.data
    if not cohort.rows:
        raise InputError("the cohort has no training slides; give it a split column with train, or lower the fractions")
    for field, axis in (("batch_size", "data"), ("regions_per_bag", "bag")):
        if data[field] % mesh.shape[axis]:
            raise InputError(
                f"config.data.{field} must be a multiple of the {mesh.shape[axis]} devices along {axis}, got {data[field]}"
            )
    cohort, stores, features = by_unit(data.unit, cohort, slides.stores, slides.features)
    # The slides of a case have several stains.
    stains = slide_stains(slides.stores, config, normaliser) if data.unit == "slide" else []
    sampler = sampler_of(cohort, config, None)
    shape = data.batch_size, data.regions_per_bag
    reader = _Reader(
        stores,
        features,
        [jax.tree.map(np.asarray, stain) for stain in stains],
        bag_labels(stores, config.tasks),
        sampler,
        slide_weights(sampler.labels, config.train.class_balance),
        shape,
        local_blocks(mesh, shape),
    )
    return Feed(reader, mesh, data, config.train.steps)


@dataclass(frozen=True)
class Feed:
    """The training batches of all steps; `config` is config.data."""

    reader: _Reader
    mesh: Mesh
    config: ConfigDict
    steps: int

    def batches(
        self, start_step: int, memory_folder: MemoryFolder | None = None, passed_over: Collection[int] = ()
    ) -> Batches:
        """The batches from a step on. Reading starts with the first request.

        The bags of the steps in `passed_over` (counted from 1) have the weight 0, so that these steps are left out.
        """
        config = self.config
        sampler = replace(self.reader.sampler, memory_folder=memory_folder)
        reader = replace(self.reader, sampler=sampler, passed_over=frozenset(passed_over))
        options = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=config.prefetch)
        blocks = grain.MapDataset.range(start_step, self.steps).map(reader).to_iter_dataset(options)
        if config.workers:
            # Grain reads its flags from absl's global registry, which crcjax does not use.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            blocks = blocks.mp_prefetch(
                grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=config.prefetch)
            )
        batches = blocks.map(self._place)
        return Batches(iter(ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.device_prefetch)))

    def shapes(self) -> Bag:
        """The shapes, types and shardings of a batch, for compiling the step without reading tiles."""
        reader = self.reader
        bags, regions = reader.shape
        params = reader.stores[0].params
        instances = (bags, regions, params.slots)
        tile = (reader.features[0].width,) if reader.features else (params.tile_px, params.tile_px, 3)

        def abstract(shape: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        bag = Bag(
            tiles=abstract((*instances, *tile), reader.features[0].dtype if reader.features else np.uint8),
            mask=abstract(instances, np.bool_),
            position=abstract((bags, regions, 2), np.float32),
            label=abstract((bags,), np.int32),
            weight=abstract((bags,), np.float32),
            region=abstract((bags, regions), np.int32),
            slide=abstract((bags,), np.int32),
            stain=jax.tree.map(lambda leaf: abstract((bags, *leaf.shape), leaf.dtype), reader.stains[0])
            if reader.stains
            else None,
            tile_labels=abstract((*instances, 2), np.int8) if reader.tile_labels else None,
        )
        return jax.tree_util.tree_map_with_path(
            lambda path, field: field.update(sharding=NamedSharding(self.mesh, bag_spec(path))), bag
        )

    def _place(self, blocks: list[Bag]) -> Bag:
        """The global batch on the devices, from the blocks that this process read."""
        batch_shape, ranges_of_blocks = self.reader.shape, self.reader.blocks

        def place(path: tuple[jax.tree_util.GetAttrKey, ...], *leaves: np.ndarray) -> jax.Array:
            spec = bag_spec(path)
            axes = len(spec)
            leaf_by_bounds = {
                tuple((range_.start, range_.stop) for range_ in ranges[:axes]): leaf
                for ranges, leaf in zip(ranges_of_blocks, leaves, strict=True)
            }

            def leaf_at(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                bounds = (along.indices(size)[:2] for along, size in zip(index, batch_shape[:axes], strict=False))
                return leaf_by_bounds[tuple(bounds)]

            shape = (*batch_shape[:axes], *leaves[0].shape[axes:])
            return jax.make_array_from_callback(shape, NamedSharding(self.mesh, spec), leaf_at, dtype=leaves[0].dtype)

        return jax.tree_util.tree_map_with_path(place, *blocks)


class Batches:
    """An iterator over batches on the devices, read ahead of the step. Close it after use.

    `waited_s` is the time in seconds during which no step ran because the next batch was not ready.
    """

    def __init__(self, bags: DatasetIterator[Bag]):
        self._bags = bags
        self._running: jax.Array | None = None
        self._running_ended: Future[float] | None = None
        # Records when the running step ends, while the main thread waits for the next batch.
        self._watcher = ThreadPoolExecutor(1, "step-end")
        self.waited_s = 0.0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Bag:
        start = time.perf_counter()
        idle = self._running is None or self._running.is_ready()  # type: ignore[attr-defined]  # every array has it
        try:
            bag = next(self._bags)
        except RuntimeError as error:
            if re.search(rf"exit code {NO_MAIN_GUARD_STATUS}\b", str(error)):
                raise InputError(NO_MAIN_GUARD) from None
            raise
        if idle:
            self.waited_s += time.perf_counter() - start
        elif self._running_ended and self._running_ended.done():
            self.waited_s += max(0.0, time.perf_counter() - max(start, self._running_ended.result()))
        return bag

    def follow(self, result: jax.Array) -> None:
        """Registers the latest step by one of its results, and waits for the step before it.

        So one step runs and one is queued. A longer queue would only fill the devices' memory with batches.
        """
        if self._running is not None:
            self._running.block_until_ready()
        self._running = result
        self._running_ended = self._watcher.submit(_end_of, result)

    def close(self) -> None:
        """Ends the threads and processes that read ahead."""
        self._watcher.shutdown(wait=False)
        self._bags.close()


def _end_of(result: Any) -> float:
    """Waits until a result is ready, or its computation failed, and returns the time."""
    # The main thread meets the same error when it uses the result.
    with suppress(jax.errors.JaxRuntimeError):
        result.block_until_ready()
    return time.perf_counter()


def local_blocks(mesh: Mesh, shape: tuple[int, int]) -> list[Block]:
    """The blocks of a batch of `shape` (bags, regions) on the devices of this process, without repetition."""
    indices = NamedSharding(mesh, PartitionSpec("data", "bag")).addressable_devices_indices_map(shape).values()
    block_bounds = {(index[0].indices(shape[0])[:2], index[1].indices(shape[1])[:2]) for index in indices if index}
    return [(range(*bags), range(*regions)) for bags, regions in sorted(block_bounds)]


@dataclass(frozen=True)
class _Reader:
    """Reads this process's blocks of a step's batch; each reader process has a copy.

    `shape` is (bags, regions) of the whole batch. Lists have an entry per training slide; features, stains and tile_labels
    are empty where training does not use them. The bags of the steps in `passed_over` have no weight.
    """

    stores: list[TileStore | CaseStore]
    features: list[FeatureReader | CaseFeatures]
    stains: list[StainEstimate]
    tile_labels: list[Int8[np.ndarray, "_ slot 2"]]
    sampler: Sampler
    weights: Float32[np.ndarray, " slide"]
    shape: tuple[int, int]
    blocks: list[Block]
    passed_over: frozenset[int] = frozenset()

    def __call__(self, step: int) -> list[Bag]:
        slides = self.sampler.slides(step)
        local_bags = sorted({bag for bags, _ in self.blocks for bag in bags})
        regions_of_bag = {
            bag: self.sampler.regions(step, bag, int(slides[bag]), self.stores[slides[bag]]) for bag in local_bags
        }
        blocks = []
        for bags, places in self.blocks:
            regions = [regions_of_bag[bag][places.start : places.stop] for bag in bags]
            block = self._read_block(slides[bags.start : bags.stop], regions, len(places))
            if step + 1 in self.passed_over:
                block = replace(block, weight=np.zeros_like(block.weight))
            blocks.append(block)
        return blocks

    def _read_block(self, slides: np.ndarray, regions: list[np.ndarray], padded_regions: int) -> Bag:
        stains = [self.stains[slide] for slide in slides] if self.stains else []
        # A batch has one estimate, whose arrays have an axis of bags.
        stain = jax.tree.map(lambda *leaves: np.stack(leaves), *stains) if stains else None
        features = [self.features[slide] for slide in slides] if self.features else []
        stores = [self.stores[slide] for slide in slides]
        tile_labels = [self.tile_labels[slide] for slide in slides] if self.tile_labels else []
        bag = read_bag(stores, regions, self.sampler.labels[slides], padded_regions, stain, features, tile_labels)
        return replace(bag, weight=self.weights[slides], slide=slides.astype(np.int32))
