"""Validation of the auxiliary tasks while a run trains."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from flax import nnx
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from crcjax.data.augment import Augmentation
from crcjax.data.bags import Bag, StoredSlides, read_bag, slide_stains
from crcjax.data.case_bags import by_unit
from crcjax.data.corruptions import sample_artefacts
from crcjax.data.tile_labels import bag_labels
from crcjax.models.mil import MILModel, Params
from crcjax.predict.stored_bags import sum_over_processes
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.train.auxiliary_tasks import Tasks
from crcjax.train.encode_step import encode_augmented
from crcjax.train.metrics import compute_task_metrics, task_metrics


class TaskEvaluation:
    """Evaluates the auxiliary tasks on the slides of one split.

    Of each slide it takes `config.data.regions_per_bag` evenly spaced regions. Artefacts are simulated, the same at every
    evaluation; nothing else is augmented. Processes divide the slides among themselves.
    """

    def __init__(
        self,
        tasks: Tasks,
        model: MILModel,
        config: ConfigDict,
        slides: StoredSlides,
        normaliser: StainNormaliser | None,
    ):
        data, reads_features = config.data, config.data.features
        _, self._stores, self._features = by_unit(data.unit, slides.cohort, slides.stores, slides.features)
        self._stains = slide_stains(slides.stores, config, normaliser) if data.unit == "slide" else []
        self._labels = bag_labels(self._stores, config.tasks)
        self._regions = data.regions_per_bag
        self._no_bags = jax.device_get(_metrics_of_no_bags(tasks))
        graph = nnx.graphdef(model)

        @jax.jit
        def bag_metrics(params: Params, bag: Bag, index: Int[Array, ""]) -> metrics.Collection:
            # The index is the key, so that every evaluation simulates the same artefacts.
            key = jax.random.key(index)
            probability = config.augment.artefacts if "artefact" in tasks.weights else 0.0
            artefacts = sample_artefacts(key, bag.mask.shape, probability) if probability else None
            augmentation = Augmentation(artefacts=artefacts)
            model, tiles = nnx.merge(graph, params), jnp.asarray(bag.tiles)
            features = (
                model.encode_stored(tiles)
                if reads_features
                else encode_augmented(model, tiles, bag.stain, augmentation, normaliser)
            )
            return task_metrics(model.tasks(features), tasks.targets(bag, augmentation))

        self._bag_metrics = bag_metrics

    def metrics(self, params: Params, on_bag: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The metrics of `task_metrics` by name, without those of tasks that no instance has a target for.

        Args:
          params: the parameters, on the devices of this process.
          on_bag: called before every slide or case.
        """
        collection = self._no_bags
        for index in range(jax.process_index(), len(self._stores), jax.process_count()):
            on_bag()
            bag, index_on_device = jax.device_put((self._bag(index), np.int32(index)))
            collection = collection.merge(jax.device_get(self._bag_metrics(params, bag, index_on_device)))
        return compute_task_metrics(jax.tree.map(lambda value: sum_over_processes(np.asarray(value)), collection))

    def _bag(self, index: int) -> Bag:
        store = self._stores[index]
        count = len(store.mask)
        regions = np.unique(np.linspace(0, count - 1, min(count, self._regions)).round().astype(int))
        stain = jax.tree.map(lambda leaf: np.asarray(leaf)[None], self._stains[index]) if self._stains else None
        features, labels = self._features[index : index + 1], self._labels[index : index + 1]
        return read_bag([store], [regions], np.zeros(1, np.int32), self._regions, stain, features, labels)


def _metrics_of_no_bags(tasks: Tasks) -> metrics.Collection:
    """The metrics before the first bag. A process that has no slides adds these to the other processes' metrics."""
    predicted = {name: jnp.zeros((0, size)) for name, size in tasks.outputs.items()}
    targets = {
        name: (outputs if name == "stain" else jnp.zeros(0, jnp.int32), jnp.zeros(0, bool))
        for name, outputs in predicted.items()
    }
    return task_metrics(predicted, targets)
