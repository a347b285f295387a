"""The model on whole slides of a split, while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Float32, Num
from sklearn.metrics import balanced_accuracy_score

from crcjax.data.bags import label_of, open_features, open_stores
from crcjax.data.cohort import Cohort
from crcjax.models.mil import Params, Prediction
from crcjax.slides.store import TileStore
from crcjax.train.step import Forward


class Evaluation:
    """The slides of one split, all of their regions, by slide; each process has its share of the slides."""

    def __init__(self, store: str, cohort: Cohort, forward: Forward, encoder: str):
        self._labels = [label_of(row, cohort.classes) for row in cohort.rows]
        self._classes = len(cohort.classes)
        mine = Cohort(cohort.rows[jax.process_index() :: jax.process_count()], cohort.classes)
        self.stores = open_stores(store, mine, pixels=not forward.stored) if mine.rows else []
        self._forward = forward
        features = open_features(self.stores, encoder) if forward.stored and self.stores else []
        self._readers = [reader.read for reader in features] or [store.read_pixels for store in self.stores]
        self._stains = [forward.normaliser.of_store(store) if forward.normaliser else None for store in self.stores]

    def metrics(self, params: Params) -> dict[str, float] | None:
        """`loss` (nats) and `balanced_accuracy` over the slides, the same in every process; None for an empty split.

        The parameters may lie on any mesh; every process must call.
        """
        if not self._labels:
            return None
        probs = np.zeros((len(self._labels), self._classes), np.float32)
        for place, found in enumerate(self.predictions(self._forward.place(params))):
            probs[place * jax.process_count() + jax.process_index()] = found.probs[0]
        if jax.process_count() > 1:
            probs = np.asarray(process_allgather(probs)).sum(axis=0)  # each slide is one process's, zero in the others
        called = probs.argmax(axis=1)
        return {
            "loss": float(-np.log(np.maximum(probs[np.arange(len(probs)), self._labels], 1e-12)).mean()),
            "balanced_accuracy": float(balanced_accuracy_score(self._labels, called)),
        }

    def predictions(self, params: Params) -> Iterator[Prediction]:
        """What the model says of each of this process's slides, in the cohort's order."""
        for store, read, stain in zip(self.stores, self._readers, self._stains, strict=True):
            chunks = self._chunks(len(store.mask), read)
            yield self._forward.bag(params, chunks, store.mask, _position(store), stain)

    def _chunks(
        self, regions: int, read: Callable[[Sequence[int]], np.ndarray]
    ) -> Iterator[Num[np.ndarray, "region slot *tile"]]:
        for start in range(0, regions, self._forward.chunk):
            yield read(range(regions)[start : start + self._forward.chunk])


def _position(store: TileStore) -> Float32[np.ndarray, "region 2"]:
    return (store.origin / store.region_px).astype(np.float32)
