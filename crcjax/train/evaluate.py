"""The model on the slides of a split, while it trains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float32, Int, Key, Num
from ml_collections import ConfigDict
from sklearn.metrics import balanced_accuracy_score

from crcjax.data.augment import Augmentation
from crcjax.data.bags import Bag, label_of, open_features, open_stores, read_bag, slide_stains
from crcjax.data.case_bags import CaseStore, by_unit
from crcjax.data.cohort import Cohort
from crcjax.data.corruptions import draw_artefacts
from crcjax.data.tile_labels import bag_labels
from crcjax.models.mil import MILModel, Params, Prediction
from crcjax.predict.feature_density import Summaries, summary
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.slides.store.tile_store import TileStore
from crcjax.train.auxiliary_tasks import Tasks, confusion
from crcjax.train.encode_step import encode_drawn
from crcjax.train.step import Forward


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
            "balanced_accuracy": float(balanced_accuracy_score(labels, called)),
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


class TaskEvaluation:
    """How well tasks are told of `config.data.regions` regions of each slide of one split, evenly over it.

    Artefacts are simulated, the same at every evaluation; tiles are else as they are. Each process has its share of slides.
    """

    def __init__(
        self, tasks: Tasks, model: MILModel, config: ConfigDict, cohort: Cohort, normaliser: StainNormaliser | None
    ):
        data, stored = config.data, config.data.features
        slides = open_stores(data.store, cohort, not stored, data.magnifications) if cohort.rows else []
        features = open_features(slides, config.model.encoder, data.magnifications) if stored and slides else []
        _, self._stores, self._features = by_unit(data.unit, cohort, slides, features)
        self._stains = slide_stains(slides, config, normaliser) if data.unit == "slide" else []
        self._labels = bag_labels(self._stores, config.tasks)
        self._regions, self._tasks = data.regions, tasks
        graph = nnx.graphdef(model)

        @jax.jit
        def counts(params: Params, bag: Bag, key: Key[Array, ""]) -> dict[str, Array]:
            share = config.augment.artefacts if "artefact" in tasks.weights else 0.0
            drawn = Augmentation(artefacts=draw_artefacts(key, bag.mask.shape, share) if share else None)
            model, tiles = nnx.merge(graph, params), jnp.asarray(bag.tiles)
            encoded = model.encode_stored(tiles) if stored else encode_drawn(model, tiles, bag.stain, drawn, normaliser)
            told, found = model.tasks(encoded), {}
            for name, (target, valid) in tasks.targets(bag, drawn).items():
                if name == "stain":
                    squares = [jnp.square(told[name] - target), jnp.square(target), jnp.ones_like(target)]
                    found[name] = jnp.stack([(square * valid[..., None]).sum() for square in squares])
                else:
                    found[name] = confusion(told[name], target, valid)
            return found

        self._counts = counts

    def metrics(self, params: Params, each: Callable[[], None] = lambda: None) -> dict[str, float]:
        """By task, if any instance is known: `NAME_balanced_accuracy`, or of stain `stain_error` (mean squared, standardised).

        `NAME_constant` is what the best constant, of stain the mean of the training slides, would have. `params` are on
        the devices of this process. `each` is called before every slide.
        """
        sizes = {name: (3,) if name == "stain" else (size, size) for name, size in self._tasks.outputs.items()}
        sums = {name: np.zeros(size) for name, size in sizes.items()}
        for index in range(jax.process_index(), len(self._stores), jax.process_count()):
            each()
            found = jax.device_get(self._counts(params, self._bag(index), jax.random.key(index)))
            sums = {name: sums[name] + found[name] for name in sums}
        if jax.process_count() > 1:
            sums = {name: multihost_utils.process_allgather(value).sum(axis=0) for name, value in sums.items()}
        metrics: dict[str, float] = {}
        for name, found in sums.items():
            if name == "stain" and found[2]:
                metrics |= {"stain_error": found[0] / found[2], "stain_constant": found[1] / found[2]}
            elif name != "stain" and found.any():
                known = found[found.sum(axis=1) > 0].sum(axis=1)
                right = found.diagonal()[found.sum(axis=1) > 0]
                metrics |= {f"{name}_balanced_accuracy": (right / known).mean(), f"{name}_constant": 1.0 / len(known)}
        return {name: float(value) for name, value in metrics.items()}

    def _bag(self, index: int) -> Bag:
        store = self._stores[index]
        count = len(store.mask)
        chosen = np.unique(np.linspace(0, count - 1, min(count, self._regions)).round().astype(int))
        stain = jax.tree.map(lambda leaf: np.asarray(leaf)[None], self._stains[index]) if self._stains else None
        features, labels = self._features[index : index + 1], self._labels[index : index + 1]
        return read_bag([store], [chosen], np.zeros(1, np.int32), self._regions, stain, features, labels)


def _position(store: TileStore | CaseStore) -> Float32[np.ndarray, "region 2"]:
    return (store.origin / store.region_px).astype(np.float32)
