"""The model on whole slides of a split, while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float32, Num
from sklearn.metrics import balanced_accuracy_score

from crcjax.data.bags import label_of, open_features, open_stores
from crcjax.data.cases import CaseStore, by_unit
from crcjax.data.cohort import Cohort
from crcjax.models.mil import Params, Prediction
from crcjax.slides.store import TileStore
from crcjax.train.step import Forward


class Evaluation:
    """The slides of one split, all of their regions, by slide or by case; `bag_of` is the number of each slide's bag.

    Each process predicts its share of them.
    """

    def __init__(self, store: str, cohort: Cohort, forward: Forward, encoder: str, unit: str):
        self.slides = slides = open_stores(store, cohort, pixels=not forward.stored) if cohort.rows else []
        self.bag_of = [cohort.cases.index(row.case_id) for row in cohort.rows] if unit == "case" else range(len(slides))
        self._classes = len(cohort.classes)
        of_slides = open_features(slides, encoder) if forward.stored and slides else []
        cohort, self.stores, features = by_unit(unit, cohort, slides, of_slides)
        self._labels = [label_of(row, cohort.classes) for row in cohort.rows]
        self._forward = forward
        self._readers = [reader.read for reader in features] or [store.read_pixels for store in self.stores]
        normaliser = forward.normaliser
        self._stains = [normaliser.of_store(store) for store in slides] if normaliser else [None] * len(self.stores)

    def metrics(self, params: Params, each: Callable[[], None] = lambda: None) -> dict[str, float] | None:
        """`loss` (nats) and `balanced_accuracy` over the slides or cases; None for an empty split.

        `params` are on the devices of this process. `each` is called before every slide.
        """
        if not self.stores:
            return None
        probs = np.zeros((len(self.stores), self._classes), np.float32)
        for index in range(jax.process_index(), len(self.stores), jax.process_count()):
            each()
            probs[index] = self._prediction(params, index).probs[0]
        if jax.process_count() > 1:
            probs = multihost_utils.process_allgather(probs).sum(axis=0)  # each row is of one process, zero elsewhere
        called = probs.argmax(axis=1)
        return {
            "loss": float(-np.log(np.maximum(probs[np.arange(len(probs)), self._labels], 1e-12)).mean()),
            "balanced_accuracy": float(balanced_accuracy_score(self._labels, called)),
        }

    def predictions(self, params: Params) -> Iterator[Prediction]:
        """What the model says of each slide or case, in the order of the cohort."""
        return (self._prediction(params, index) for index in range(len(self.stores)))

    def _prediction(self, params: Params, index: int) -> Prediction:
        store, read, stain = self.stores[index], self._readers[index], self._stains[index]
        return self._forward.bag(params, self._chunks(len(store.mask), read), store.mask, _position(store), stain)

    def _chunks(
        self, regions: int, read: Callable[[Sequence[int]], np.ndarray]
    ) -> Iterator[Num[np.ndarray, "region slot *tile"]]:
        for start in range(0, regions, self._forward.chunk):
            yield read(range(regions)[start : start + self._forward.chunk])


def _position(store: TileStore | CaseStore) -> Float32[np.ndarray, "region 2"]:
    return (store.origin / store.region_px).astype(np.float32)
