"""The model on the slides of a split, while it trains."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from crcjax.data.augment import Augmentation
from crcjax.data.bags import Bag, StoredSlides, read_bag, slide_stains
from crcjax.data.case_bags import by_unit
from crcjax.data.corruptions import sample_artefacts
from crcjax.data.tile_labels import bag_labels
from crcjax.models.mil import MILModel, Params
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.train.auxiliary_tasks import Tasks, confusion
from crcjax.train.encode_step import encode_drawn


class TaskEvaluation:
    """Metrics of the auxiliary tasks on `config.data.regions_per_bag` evenly spaced regions of each slide of one split.

    Artefacts are simulated, the same at every evaluation; tiles are else as they are. Each process has its share of slides.
    """

    def __init__(
        self,
        tasks: Tasks,
        model: MILModel,
        config: ConfigDict,
        slides: StoredSlides,
        normaliser: StainNormaliser | None,
    ):
        data, stored = config.data, config.data.features
        _, self._stores, self._features = by_unit(data.unit, slides.cohort, slides.stores, slides.features)
        self._stains = slide_stains(slides.stores, config, normaliser) if data.unit == "slide" else []
        self._labels = bag_labels(self._stores, config.tasks)
        self._regions, self._tasks = data.regions_per_bag, tasks
        graph = nnx.graphdef(model)

        @jax.jit
        def counts(params: Params, bag: Bag, index: Int[Array, ""]) -> dict[str, Array]:
            key = jax.random.key(index)  # the same at every evaluation
            share = config.augment.artefacts if "artefact" in tasks.weights else 0.0
            augmentation = Augmentation(artefacts=sample_artefacts(key, bag.mask.shape, share) if share else None)
            model, tiles = nnx.merge(graph, params), jnp.asarray(bag.tiles)
            encoded = (
                model.encode_stored(tiles)
                if stored
                else encode_drawn(model, tiles, bag.stain, augmentation, normaliser)
            )
            predicted, confusions = model.tasks(encoded), {}
            for name, (target, valid) in tasks.targets(bag, augmentation).items():
                if name == "stain":
                    squares = [jnp.square(predicted[name] - target), jnp.square(target), jnp.ones_like(target)]
                    confusions[name] = jnp.stack([(square * valid[..., None]).sum() for square in squares])
                else:
                    confusions[name] = confusion(predicted[name], target, valid)
            return confusions

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
            counts = jax.device_get(self._counts(params, *jax.device_put((self._bag(index), np.int32(index)))))
            sums = {name: sums[name] + counts[name] for name in sums}
        if jax.process_count() > 1:
            sums = {name: multihost_utils.process_allgather(value).sum(axis=0) for name, value in sums.items()}
        metrics: dict[str, float] = {}
        for name, counts in sums.items():
            if name == "stain" and counts[2]:
                metrics |= {"stain_error": counts[0] / counts[2], "stain_constant": counts[1] / counts[2]}
            elif name != "stain" and counts.any():
                known = counts[counts.sum(axis=1) > 0].sum(axis=1)
                right = counts.diagonal()[counts.sum(axis=1) > 0]
                metrics |= {f"{name}_balanced_accuracy": (right / known).mean(), f"{name}_constant": 1.0 / len(known)}
        return {name: float(value) for name, value in metrics.items()}

    def _bag(self, index: int) -> Bag:
        store = self._stores[index]
        count = len(store.mask)
        chosen = np.unique(np.linspace(0, count - 1, min(count, self._regions)).round().astype(int))
        stain = jax.tree.map(lambda leaf: np.asarray(leaf)[None], self._stains[index]) if self._stains else None
        features, labels = self._features[index : index + 1], self._labels[index : index + 1]
        return read_bag([store], [chosen], np.zeros(1, np.int32), self._regions, stain, features, labels)
