"""The model on whole slides of a split, while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Num
from sklearn.metrics import balanced_accuracy_score

from crcjax.data.bags import label_of, open_features, open_stores
from crcjax.data.cohort import Cohort
from crcjax.models.mil import Params, Prediction
from crcjax.slides.store import TileStore
from crcjax.train.step import Forward


class Evaluation:
    """The slides of one split, all of their regions, by slide."""

    def __init__(self, store: str, cohort: Cohort, forward: Forward, encoder: str):
        self.stores = open_stores(store, cohort, pixels=not forward.stored) if cohort.rows else []
        self._labels = [label_of(row, cohort.classes) for row in cohort.rows]
        self._forward = forward
        features = open_features(self.stores, encoder) if forward.stored and self.stores else []
        self._readers = [reader.read for reader in features] or [store.read_pixels for store in self.stores]
        self._stains = [forward.normaliser.of_store(store) if forward.normaliser else None for store in self.stores]

    def metrics(self, params: Params) -> dict[str, float] | None:
        """`loss` (nats) and `balanced_accuracy` over the slides; None for an empty split."""
        if not self.stores:
            return None
        probs = np.concatenate([prediction.probs for prediction in self.predictions(params)])
        called = probs.argmax(axis=1)
        return {
            "loss": float(-np.log(np.maximum(probs[np.arange(len(probs)), self._labels], 1e-12)).mean()),
            "balanced_accuracy": float(balanced_accuracy_score(self._labels, called)),
        }

    def predictions(self, params: Params) -> Iterator[Prediction]:
        """What the model says of each slide, in the cohort's order."""
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
