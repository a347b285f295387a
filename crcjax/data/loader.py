"""Training batches: Grain from stores to the devices, ahead of the step."""

from __future__ import annotations

import time
from collections.abc import Callable
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

from crcjax.data.bags import WITH_REGIONS, Bag, open_features, open_stores, read_bag, slide_stains
from crcjax.data.case_bags import CaseFeatures, CaseStore, by_unit
from crcjax.data.cohort import Cohort
from crcjax.data.hard_mining import Board
from crcjax.data.sampler import Sampler, sampler_of
from crcjax.data.sampling import slide_weights
from crcjax.data.tile_labels import bag_labels
from crcjax.errors import InputError
from crcjax.slides.stain.methods import Estimate
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.slides.store.features import FeatureReader
from crcjax.slides.store.tile_store import TileStore

Block = tuple[range, range]  # places of a batch: its bags, and their regions


def train_batches(
    cohort: Cohort,
    config: ConfigDict,
    mesh: Mesh,
    start_step: int,
    normaliser: StainNormaliser | None = None,
    board: Board | None = None,
) -> Batches:
    """The bags of every step from `start_step` to config.train.steps, of a new feed (`open_feed`)."""
    return open_feed(cohort, config, mesh, normaliser).batches(start_step, board)


def open_feed(cohort: Cohort, config: ConfigDict, mesh: Mesh, normaliser: StainNormaliser | None = None) -> Feed:
    """What training reads: every step's bags on the mesh, slides over `data`, regions over `bag`.

    What a step sees depends on seed, step and what is laid on the `board` alone, so a resumed run reads what it would have
    read, whatever the workers.
    Each process reads only what its devices hold. Raises InputError, here or later: an empty split, slides that are not
    tiled, stores that are damaged or gone, bags that the devices do not divide.
    """
    if not cohort.rows:
        raise InputError("the cohort has no training slides; give it a split column with train, or lower the fractions")
    data = config.data
    for field, axis in (("batch_size", "data"), ("regions_per_bag", "bag")):
        if data[field] % mesh.shape[axis]:
            raise InputError(
                f"config.data.{field} {data[field]} is no multiple of the {mesh.shape[axis]} devices along {axis}; set it so"
            )
    slides = open_stores(data.store, cohort, not data.features, data.magnifications)
    of_slides = open_features(slides, config.model.encoder, data.magnifications) if data.features else []
    cohort, stores, features = by_unit(data.unit, cohort, slides, of_slides)
    stains = slide_stains(slides, config, normaliser) if data.unit == "slide" else []  # a case has several
    sampler = sampler_of(cohort, config, None)
    shape = data.batch_size, data.regions_per_bag
    blocks = local_blocks(mesh, shape)
    reader = _Reader(
        stores,
        features,
        [jax.tree.map(np.asarray, stain) for stain in stains],
        bag_labels(stores, config.tasks),
        sampler,
        slide_weights(sampler.labels, config.train.class_balance),
        shape,
        blocks,
    )
    return Feed(reader, mesh, data, config.train.steps)


@dataclass(frozen=True)
class Feed:
    """The training bags of all steps; `config` is config.data."""

    reader: _Reader
    mesh: Mesh
    config: ConfigDict
    steps: int

    def batches(self, start_step: int, board: Board | None = None) -> Batches:
        """The bags from a step on. Nothing is read before the first is asked for."""
        config = self.config
        reader = replace(self.reader, sampler=replace(self.reader.sampler, board=board))
        options = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=config.prefetch)
        read = grain.MapDataset.range(start_step, self.steps).map(reader).to_iter_dataset(options)
        if config.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own there; ours are parsed elsewhere
            read = read.mp_prefetch(
                grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=config.prefetch)
            )
        placed = read.map(lambda parts: self._whole(parts, jax.make_array_from_callback))
        return Batches(iter(ThreadPrefetchIterDataset(placed, prefetch_buffer_size=config.device_prefetch)))

    def shapes(self) -> Bag:
        """Shapes and layout of a step's bags, to compile for; one step's are read for it, and none put on a device."""

        def abstract(shape: tuple[int, ...], sharding: NamedSharding, held: Callable, dtype: np.dtype) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return self._whole(self.reader(0), abstract)

    def _whole(self, parts: list[Bag], make: Callable[..., Any]) -> Bag:
        """The global bag, made by `make`, whose blocks of this process are `parts`."""
        shape, blocks = self.reader.shape, self.reader.blocks

        def whole(path: tuple[jax.tree_util.GetAttrKey, ...], *leaves: np.ndarray) -> Any:
            axes = 2 if path[0].name in WITH_REGIONS else 1
            sharding = NamedSharding(self.mesh, PartitionSpec(*("data", "bag")[:axes]))
            where = {
                tuple((places.start, places.stop) for places in block[:axes]): leaf
                for block, leaf in zip(blocks, leaves, strict=True)
            }

            def held(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                return where[tuple(part.indices(size)[:2] for part, size in zip(index, shape[:axes], strict=False))]

            return make((*shape[:axes], *leaves[0].shape[axes:]), sharding, held, dtype=leaves[0].dtype)

        return jax.tree_util.tree_map_with_path(whole, *parts)


class Batches:
    """Bags on the devices, made ready ahead of the step; an iterator, to be closed.

    `waited_s` are the seconds in which a step could have run but for its bags.
    """

    def __init__(self, bags: DatasetIterator[Bag]):
        self._bags = bags
        self._running: jax.Array | None = None
        self.waited_s = 0.0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Bag:
        start = time.perf_counter()
        bag = next(self._bags)
        if self._running is None or self._running.is_ready():  # type: ignore[attr-defined]  # of every array that is
            self.waited_s += time.perf_counter() - start
        return bag

    def follow(self, result: jax.Array) -> None:
        """Tells of the step that was started last by one of its results, and waits for the step before it.

        One step runs and one is queued: more would only hold their bags in the devices' memory.
        """
        if self._running is not None:
            self._running.block_until_ready()
        self._running = result

    def close(self) -> None:
        """Ends the threads and workers that read ahead."""
        self._bags.close()


def local_blocks(mesh: Mesh, shape: tuple[int, int]) -> list[Block]:
    """The places of a batch of `shape` (bags, regions) that the devices of this process hold, each once."""
    indices = NamedSharding(mesh, PartitionSpec("data", "bag")).addressable_devices_indices_map(shape).values()
    held = {(index[0].indices(shape[0])[:2], index[1].indices(shape[1])[:2]) for index in indices if index}
    return [(range(*bags), range(*regions)) for bags, regions in sorted(held)]


@dataclass(frozen=True)
class _Reader:
    """Reads what this process holds of a step's bags; each worker has a copy of it."""

    stores: list[TileStore | CaseStore]
    features: list[FeatureReader | CaseFeatures]
    stains: list[Estimate]
    tile_labels: list[Int8[np.ndarray, "_ slot 2"]]
    sampler: Sampler
    weights: Float32[np.ndarray, " slide"]
    shape: tuple[int, int]  # bags, regions
    blocks: list[Block]

    def __call__(self, step: int) -> list[Bag]:
        slides = self.sampler.slides(step)
        chosen = {
            bag: self.sampler.regions(step, bag, int(slides[bag]), self.stores[slides[bag]])
            for bag in sorted({bag for held, _ in self.blocks for bag in held})
        }
        return [
            self._block(
                slides[bags.start : bags.stop], [chosen[bag][places.start : places.stop] for bag in bags], places
            )
            for bags, places in self.blocks
        ]

    def _block(self, slides: np.ndarray, chosen: list[np.ndarray], places: range) -> Bag:
        stains = [self.stains[slide] for slide in slides] if self.stains else []
        # Their leaves are stacked, since a batch is one estimate with a leading axis.
        stain = jax.tree.map(lambda *leaves: np.stack(leaves), *stains) if stains else None
        features = [self.features[slide] for slide in slides] if self.features else []
        stores = [self.stores[slide] for slide in slides]
        told = [self.tile_labels[slide] for slide in slides] if self.tile_labels else []
        bag = read_bag(stores, chosen, self.sampler.labels[slides], len(places), stain, features, told)
        return replace(bag, weight=self.weights[slides], slide=slides.astype(np.int32))
