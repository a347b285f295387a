"""The model on whole slides of a split, while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float32, Num
from sklearn.metrics import balanced_accuracy_score

from crcjax.data.bags import label_of, open_features, open_stores
from crcjax.data.cohort import Cohort
from crcjax.models.mil import Params, Prediction
from crcjax.slides.store import TileStore
from crcjax.train.step import Forward


class Evaluation:
    """The slides of one split, all of their regions, by slide; each process predicts its share of them."""

    def __init__(self, store: str, cohort: Cohort, forward: Forward, encoder: str):
        self.stores = open_stores(store, cohort, pixels=not forward.stored) if cohort.rows else []
        self._classes = len(cohort.classes)
        self._labels = [label_of(row, cohort.classes) for row in cohort.rows]
        self._forward = forward
        features = open_features(self.stores, encoder) if forward.stored and self.stores else []
        self._readers = [reader.read for reader in features] or [store.read_pixels for store in self.stores]
        self._stains = [forward.normaliser.of_store(store) if forward.normaliser else None for store in self.stores]

    def metrics(self, params: Params, each: Callable[[], None] = lambda: None) -> dict[str, float] | None:
        """`loss` (nats) and `balanced_accuracy` over the slides; None for an empty split.

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
        """What the model says of each slide, in the cohort's order."""
        return (self._prediction(params, index) for index in range(len(self.stores)))

    def _prediction(self, params: Params, index: int) -> Prediction:
        store, read, stain = self.stores[index], self._readers[index], self._stains[index]
        return self._forward.bag(params, self._chunks(len(store.mask), read), store.mask, _position(store), stain)

    def _chunks(
        self, regions: int, read: Callable[[Sequence[int]], np.ndarray]
    ) -> Iterator[Num[np.ndarray, "region slot *tile"]]:
        for start in range(0, regions, self._forward.chunk):
            yield read(range(regions)[start : start + self._forward.chunk])


def _position(store: TileStore) -> Float32[np.ndarray, "region 2"]:
    return (store.origin / store.region_px).astype(np.float32)
