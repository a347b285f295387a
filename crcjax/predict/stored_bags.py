"""Evaluates a model on the stored slides of one split, during training and for prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float32, Int, Num

from crcjax.data.bags import StoredSlides, label_of
from crcjax.data.case_bags import CaseStore, by_unit
from crcjax.models.mil import Params
from crcjax.models.prediction import Prediction
from crcjax.predict.ensemble import EncodedBag
from crcjax.predict.evaluation_metrics import validation_metrics
from crcjax.predict.feature_density import Summaries, summary
from crcjax.predict.forward import Forward
from crcjax.slides.jobs.read_ahead import read_ahead
from crcjax.slides.store.tile_store import TileStore


class Evaluation:
    """Predicts all regions of the slides of one split; each process predicts its share of the bags.

    Args:
      slides: the slides.
      forward: the model; it decides whether pixels or stored features are read.
      unit: "slide" for a bag per slide, "case" for a bag per case (config.data.unit).

    Attributes:
      bag_of: the index of each slide's bag.
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
        """Computes `loss` (nats) and `balanced_accuracy` over the bags; None for an empty split.

        Args:
          params: the parameters, on the devices of this process.
          each: called before every bag.
        """
        if not self.stores:
            return None
        probs = np.zeros((len(self.stores), self._classes), np.float32)
        for index, bag in self._bags(params, each):
            probs[index] = self._forward.pool(params, *bag).probs[0]
        # One process fills each row; the row is zero in the other processes.
        collection = jax.device_get(validation_metrics(*jax.device_put((sum_over_processes(probs), self.labels))))
        return {name: float(value) for name, value in collection.compute().items()}

    def prediction(self, params: Params, index: int) -> Prediction:
        """Predicts bag number `index`. Raises InputError if its stored data are damaged."""
        return self._forward.pool(params, *self.bag(params, index))

    def summaries(self, params: Params, each: Callable[[], None] = lambda: None) -> Summaries:
        """Summarises every bag for the feature density. `params` and `each` are as in `metrics`."""
        summary_array = np.zeros((len(self.stores), 2, params["norm"]["bias"].size), np.float32)
        for index, bag in self._bags(params, each):
            summary_array[index] = summary(*bag[:2])
        return sum_over_processes(summary_array).astype(np.float64)

    @property
    def labels(self) -> Int[np.ndarray, " bag"]:
        """The class index of every bag."""
        return np.array([label_of(row, self._cohort.classes) for row in self._cohort.rows], np.int32)

    def bag(self, params: Params, index: int) -> EncodedBag:
        """Reads and encodes bag number `index`. Raises InputError if its stored data are damaged."""
        with closing(read_ahead(self._reads(index))) as chunks:
            return self._encoded(params, index, chunks)

    def _bags(self, params: Params, each: Callable[[], None]) -> Iterator[tuple[int, EncodedBag]]:
        """Yields the encoded bags of this process's share; the next chunks are read while the device encodes one."""
        indices = range(jax.process_index(), len(self.stores), jax.process_count())
        with closing(read_ahead(read for index in indices for read in self._reads(index))) as chunks:
            for index in indices:
                each()
                yield index, self._encoded(params, index, islice(chunks, len(list(self._reads(index)))))

    def _encoded(self, params: Params, index: int, chunks: Iterable[np.ndarray]) -> EncodedBag:
        store = self.stores[index]
        return self._forward.features(params, chunks, self._stains[index]), store.mask, _position(store)

    def _reads(self, index: int) -> Iterator[Callable[[], Num[np.ndarray, "region slot *tile"]]]:
        """Yields one read function per chunk of regions of a bag."""
        regions, chunk = range(len(self.stores[index].mask)), self._forward.chunk
        for start in range(0, len(regions), chunk):
            yield partial(self._readers[index], regions[start : start + chunk])


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """The sum of the arrays of all processes, which call it together."""
    if jax.process_count() == 1:
        return values
    # process_allgather converts to device arrays and back implicitly.
    with jax.transfer_guard("allow"):
        return multihost_utils.process_allgather(values).sum(axis=0)


def _position(store: TileStore | CaseStore) -> Float32[np.ndarray, "region 2"]:
    return (store.origin / store.region_px).astype(np.float32)
