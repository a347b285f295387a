"""Predictions on stored bags: the slides of one split, while a run trains and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float32, Int, Num

from crcjax.data.bags import StoredSlides, label_of
from crcjax.data.case_bags import CaseStore, by_unit
from crcjax.models.mil import Params, Prediction
from crcjax.predict.evaluation_metrics import validation_metrics
from crcjax.predict.feature_density import Summaries, summary
from crcjax.predict.forward import Forward
from crcjax.slides.jobs.read_ahead import read_ahead
from crcjax.slides.store.tile_store import TileStore

# The features, mask and positions of one bag.
PooledBag = tuple[
    Float32[np.ndarray, "region slot feature"], Bool[np.ndarray, "region slot"], Float32[np.ndarray, "region 2"]
]


class Evaluation:
    """The slides of one split, all of their regions, by slide or by case; `bag_of` is the number of each slide's bag.

    Each process predicts its share of them.
    """

    def __init__(
        self,
        slides: StoredSlides,
        forward: Forward,
        unit: str,
    ):
        cohort = slides.cohort
        self.slides = slides.stores
        self.bag_of = (
            [cohort.cases.index(row.case_id) for row in cohort.rows] if unit == "case" else range(len(self.slides))
        )
        self._classes = len(cohort.classes)
        cohort, self.stores, features = by_unit(unit, cohort, slides.stores, slides.features)
        self._cohort = cohort
        self._forward = forward
        self._readers = [reader.read for reader in features] or [store.read_pixels for store in self.stores]
        normaliser = forward.normaliser
        self._stains = (
            [normaliser.of_store(store) for store in self.slides] if normaliser else [None] * len(self.stores)
        )

    def metrics(self, params: Params, each: Callable[[], None] = lambda: None) -> dict[str, float] | None:
        """`loss` (nats) and `balanced_accuracy` over the slides or cases; None for an empty split.

        `params` are on the devices of this process. `each` is called before every slide.
        """
        if not self.stores:
            return None
        probs = np.zeros((len(self.stores), self._classes), np.float32)
        for index, bag in self._bags(params, each):
            probs[index] = self._forward.pool(params, *bag).probs[0]
        # Each row is of one process, and zero in the others.
        collection = jax.device_get(validation_metrics(*jax.device_put((sum_over_processes(probs), self.labels))))
        return {name: float(value) for name, value in collection.compute().items()}

    def prediction(self, params: Params, index: int) -> Prediction:
        """What the model says of one slide or case, in the order of the cohort. Raises InputError if it is damaged."""
        return self._forward.pool(params, *self.bag(params, index))

    def summaries(self, params: Params, each: Callable[[], None] = lambda: None) -> Summaries:
        """What the density of every slide or case is of. `params` and `each` are as in `metrics`."""
        summary_array = np.zeros((len(self.stores), 2, params["norm"]["bias"].size), np.float32)
        for index, bag in self._bags(params, each):
            summary_array[index] = summary(*bag[:2])
        return sum_over_processes(summary_array).astype(np.float64)

    @property
    def labels(self) -> Int[np.ndarray, " bag"]:
        """The class of every slide or case."""
        return np.array([label_of(row, self._cohort.classes) for row in self._cohort.rows], np.int32)

    def bag(self, params: Params, index: int) -> PooledBag:
        """The features, mask and positions of one slide or case, as `Forward.pool` takes them. Raises InputError if it is damaged."""
        with closing(read_ahead(self._reads(index))) as chunks:
            return self._encoded(params, index, chunks)

    def _bags(self, params: Params, each: Callable[[], None]) -> Iterator[tuple[int, PooledBag]]:
        """This process's share of the bags, encoded; the next chunks are read while the device encodes one."""
        indices = range(jax.process_index(), len(self.stores), jax.process_count())
        with closing(read_ahead(read for index in indices for read in self._reads(index))) as chunks:
            for index in indices:
                each()
                yield index, self._encoded(params, index, islice(chunks, len(list(self._reads(index)))))

    def _encoded(self, params: Params, index: int, chunks: Iterable[np.ndarray]) -> PooledBag:
        store = self.stores[index]
        return self._forward.features(params, chunks, self._stains[index]), store.mask, _position(store)

    def _reads(self, index: int) -> Iterator[Callable[[], Num[np.ndarray, "region slot *tile"]]]:
        """The reading of one bag, in chunks of regions."""
        regions, chunk = range(len(self.stores[index].mask)), self._forward.chunk
        for start in range(0, len(regions), chunk):
            yield partial(self._readers[index], regions[start : start + chunk])


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """The sum of the arrays of all processes, which call it together."""
    if jax.process_count() == 1:
        return values
    with jax.transfer_guard("allow"):  # JAX converts to device arrays and back implicitly
        return multihost_utils.process_allgather(values).sum(axis=0)


def _position(store: TileStore | CaseStore) -> Float32[np.ndarray, "region 2"]:
    return (store.origin / store.region_px).astype(np.float32)
