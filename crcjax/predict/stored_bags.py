"""Predictions on stored bags: the slides of one split, while a run trains and after."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float32, Int, Num

from crcjax.data.bags import label_of, open_features, open_stores
from crcjax.data.case_bags import CaseStore, by_unit
from crcjax.data.cohort import Cohort
from crcjax.models.mil import Params, Prediction
from crcjax.predict.feature_density import Summaries, summary
from crcjax.predict.forward import Forward
from crcjax.slides.store.tile_store import TileStore


class Evaluation:
    """The slides of one split, all of their regions, by slide or by case; `bag_of` is the number of each slide's bag.

    Each process predicts its share of them.
    """

    def __init__(
        self,
        store: str,
        cohort: Cohort,
        forward: Forward,
        encoder: str,
        unit: str,
        magnifications: Collection[str] = (),
    ):
        self.slides = slides = open_stores(store, cohort, not forward.stored, magnifications) if cohort.rows else []
        self.bag_of = [cohort.cases.index(row.case_id) for row in cohort.rows] if unit == "case" else range(len(slides))
        self._classes = len(cohort.classes)
        of_slides = open_features(slides, encoder, magnifications) if forward.stored and slides else []
        cohort, self.stores, features = by_unit(unit, cohort, slides, of_slides)
        self._cohort = cohort
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
            probs[index] = self.prediction(params, index).probs[0]
        if jax.process_count() > 1:
            probs = multihost_utils.process_allgather(probs).sum(axis=0)  # each row is of one process, zero elsewhere
        labels, called = self.labels, probs.argmax(axis=1)
        return {
            "loss": float(-np.log(np.maximum(probs[np.arange(len(probs)), labels], 1e-12)).mean()),
            "balanced_accuracy": _balanced_accuracy(labels, called),
        }

    def prediction(self, params: Params, index: int) -> Prediction:
        """What the model says of one slide or case, in the order of the cohort. Raises InputError if it is damaged."""
        return self._forward.pool(params, *self.bag(params, index))

    def summaries(self, params: Params, each: Callable[[], None] = lambda: None) -> Summaries:
        """What the density of every slide or case is of. `params` and `each` are as in `metrics`."""
        found = np.zeros((len(self.stores), 2, params["norm"]["bias"].size), np.float32)
        for index in range(jax.process_index(), len(self.stores), jax.process_count()):
            each()
            found[index] = summary(*self.bag(params, index)[:2])
        if jax.process_count() > 1:
            found = multihost_utils.process_allgather(found).sum(axis=0)
        return found.astype(np.float64)

    @property
    def labels(self) -> Int[np.ndarray, " bag"]:
        """The class of every slide or case."""
        return np.array([label_of(row, self._cohort.classes) for row in self._cohort.rows])

    def bag(
        self, params: Params, index: int
    ) -> tuple[
        Float32[np.ndarray, "region slot feature"], Bool[np.ndarray, "region slot"], Float32[np.ndarray, "region 2"]
    ]:
        """The features, mask and positions of one slide or case, as `Forward.pool` takes them. Raises InputError if it is damaged."""
        store, read, stain = self.stores[index], self._readers[index], self._stains[index]
        features = self._forward.features(params, self._chunks(len(store.mask), read), stain)
        return features, store.mask, _position(store)

    def _chunks(
        self, regions: int, read: Callable[[Sequence[int]], np.ndarray]
    ) -> Iterator[Num[np.ndarray, "region slot *tile"]]:
        for start in range(0, regions, self._forward.chunk):
            yield read(range(regions)[start : start + self._forward.chunk])


def _position(store: TileStore | CaseStore) -> Float32[np.ndarray, "region 2"]:
    return (store.origin / store.region_px).astype(np.float32)


def _balanced_accuracy(labels: Int[np.ndarray, " bag"], predicted: Int[np.ndarray, " bag"]) -> float:
    """The mean recall of the classes that have a bag; the others are left out without a warning."""
    return float(np.mean([np.mean(predicted[labels == label] == label) for label in np.unique(labels)]))
