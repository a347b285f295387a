"""Tasks beside the subtype, told of every instance: its tissue, its slide's stain, its artefact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int8
from ml_collections import ConfigDict

from crcjax.data.augment import Augmentation, ColourChange
from crcjax.data.bags import Bag
from crcjax.data.corruptions import ARTEFACTS
from crcjax.data.tile_labels import UNKNOWN
from crcjax.errors import InputError
from crcjax.models.heads import TaskHeads
from crcjax.models.mil import MILModel, Params
from crcjax.models.random_keys import Purpose, run_key
from crcjax.slides.stain.methods import StainMatrix

TASKS = ("tissue", "stain", "artefact")
WEIGHTINGS = ("fixed", "learned")
_SUBTYPE = "loss"  # the name of the subtype's loss among the parts
_LEAST_DEVIATION = 0.01  # of a stain's number over slides, should they all be of one stain
# Adam moves a parameter by about its learning rate a step: ten times that, and weights follow within some hundred steps.
_GAIN = 10.0
_LARGEST = 4.0  # log-variance: weights stay within a factor of 55

Scalars = dict[str, Float32[Array, ""]]


@dataclass(frozen=True)
class Tasks:
    """The tasks that are on, by name: their weights, and the outputs of their heads.

    `mean` and `deviation` of the training slides' stains (see `stain_numbers`) standardise those targets.
    """

    weights: dict[str, float]
    outputs: dict[str, int]
    learned: bool
    mean: Float32[np.ndarray, " 8"]
    deviation: Float32[np.ndarray, " 8"]

    def targets(
        self, bag: Bag, augmentation: Augmentation
    ) -> dict[str, tuple[Array, Bool[Array, "batch region slot"]]]:
        """What each head shall say, and of which instances it is known: none that is padding or masked."""
        mask = jnp.asarray(bag.mask)
        simulated = jnp.zeros(mask.shape, jnp.int32) if augmentation.artefacts is None else augmentation.artefacts.kind
        unlabelled = jnp.zeros((*mask.shape, 2), jnp.int32)
        tissue, given = jnp.moveaxis(unlabelled if bag.tile_labels is None else jnp.asarray(bag.tile_labels), -1, 0)
        targets: dict[str, tuple[Array, Array]] = {}
        if "tissue" in self.weights:
            targets["tissue"] = tissue, mask & (tissue != UNKNOWN)
        if "stain" in self.weights:
            assert isinstance(bag.stain, StainMatrix)
            numbers = (stain_numbers(bag.stain, augmentation.colour) - self.mean) / self.deviation
            reliable = jnp.asarray(bag.stain.reliable)[:, None, None]
            targets["stain"] = numbers, mask & reliable & (simulated == 0)
        if "artefact" in self.weights:
            # Of two artefacts in one tile none is the answer.
            kind = jnp.where(simulated == 0, given, jnp.where(given == 0, simulated, UNKNOWN))
            targets["artefact"] = kind, mask & (kind != UNKNOWN)
        return targets

    def counted(self, bag: Bag, augmentation: Augmentation) -> Scalars:
        """The instances that each task is known of."""
        return {name: valid.sum().astype(jnp.float32) for name, (_, valid) in self.targets(bag, augmentation).items()}

    def losses(self, predicted: Mapping[str, Array], bag: Bag, augmentation: Augmentation, counted: Scalars) -> Scalars:
        """Each task's loss, as NAME_loss: the sum over a bag's instances over `counted` ones, those of the whole batch.

        Cross-entropy (nats); of stain, the mean squared error of its standardised numbers.
        """
        task_losses = {}
        for name, (target, valid) in self.targets(bag, augmentation).items():
            if name == "stain":
                losses = jnp.square(predicted[name] - target).mean(axis=-1)
            else:
                known = jnp.maximum(target, 0).astype(jnp.int32)
                losses = optax.softmax_cross_entropy_with_integer_labels(predicted[name], known)
            task_losses[f"{name}_loss"] = jnp.where(valid, losses, 0.0).sum() / jnp.maximum(counted[name], 1.0)
        return task_losses

    def objective(self, params: Params, parts: Scalars, counted: Scalars, share: float) -> Float32[Array, ""]:
        """What training minimises, of all losses; `share` is that of these bags in the step.

        Learned, a loss L of weight w gives exp(-s) w L + s / 2 of its log-variance s, half the first for a squared error
        (Kendall, Gal and Cipolla 2018, equations 7 and 10).
        """
        weights: Mapping[str, Any] = self.weights
        objective = parts[_SUBTYPE]
        if self.learned:
            weights, spread = self.weights_of(params), _log_variances(params)
            # A task that no instance of the step is known of says nothing of its own weight.
            known = jnp.stack([jnp.ones(()), *(counted[name] > 0 for name in self.weights)])
            objective = weights["subtype_weight"] * objective + share * (spread * known).sum() / 2.0
            weights = {name: weights[f"{name}_weight"] for name in self.weights}
        return objective + sum(weights[name] * parts[f"{name}_loss"] for name in self.weights)

    def weights_of(self, params: Params) -> Scalars:
        """What each loss is multiplied by, where that is learned, as NAME_weight; the subtype's is one of them."""
        start = {"subtype": 1.0, **self.weights}
        of_kind = {name: 0.5 * weight if name == "stain" else weight for name, weight in start.items()}
        factors = jnp.exp(-_log_variances(params))
        return {f"{name}_weight": weight * factors[i] for i, (name, weight) in enumerate(of_kind.items())}


def check_tasks(config: ConfigDict) -> None:
    """Raises InputError, by the field of `config` (the whole one), for tasks that cannot be, or not with the rest of it."""
    tasks = config.tasks
    if tasks.weighting not in WEIGHTINGS:
        raise InputError(f"config.tasks.weighting {tasks.weighting!r}: choose {' or '.join(WEIGHTINGS)}")
    for name in TASKS:
        if not 0 <= tasks[name] < np.inf:
            raise InputError(f"config.tasks.{name} {tasks[name]}: is a weight from 0 up; set it so")
        if name != "tissue" and tasks[name] and config.data.features:
            raise InputError(f"config.tasks.{name} needs pixels, which config.data.features replaces; set one to 0")
    if tasks.stain and config.data.unit == "case":
        raise InputError(
            "config.tasks.stain: the slides of a case have several stains, the step has one a bag; set it to 0, or "
            "config.data.unit to slide"
        )
    if tasks.stain and config.stain.method != "none":
        raise InputError("config.tasks.stain: config.stain.method gives all slides one stain; set one to 0 or none")
    if tasks.tissue and not tasks.labels:
        raise InputError("config.tasks.tissue needs labels; name their folder as config.tasks.labels")
    if tasks.tissue and not 1 < len(set(tasks.tissue_classes)) == len(tasks.tissue_classes):
        raise InputError(
            f"config.tasks.tissue_classes {tuple(tasks.tissue_classes)}: list two or more names of areas in "
            "config.tasks.labels, each once"
        )
    if tasks.artefact and not (config.augment.artefacts or tasks.labels):
        raise InputError(
            "config.tasks.artefact needs some; simulate them with config.augment.artefacts, or name config.tasks.labels"
        )


def open_tasks(
    config: ConfigDict, labels: Sequence[Int8[np.ndarray, "_ slot 2"]], stains: Sequence[Any]
) -> Tasks | None:
    """The tasks of `config` (the whole one), by the labels and stains of the training slides; None if none is on.

    Raises InputError if these lack what a task is learned from.
    """
    weights = {name: float(config.tasks[name]) for name in TASKS if config.tasks[name]}
    if not weights:
        return None
    classes, folder = tuple(config.tasks.tissue_classes), config.tasks.labels
    labels_present = [
        set(np.unique(np.concatenate([of[..., i].ravel() for of in labels]))) if labels else set() for i in (0, 1)
    ]
    if "tissue" in weights and (absent := [name for i, name in enumerate(classes) if i not in labels_present[0]]):
        raise InputError(
            f"config.tasks.tissue_classes: {folder} says of no training tile that it is {', '.join(absent)}; correct the "
            "folder or the names, or leave them out"
        )
    if "artefact" in weights and not config.augment.artefacts and not max(labels_present[1]) > 0:
        raise InputError(
            f"config.tasks.artefact: {folder} has no training tile with {', '.join(ARTEFACTS[1:])}; simulate them with "
            "config.augment.artefacts"
        )
    mean, deviation = np.zeros(8, np.float32), np.ones(8, np.float32)
    if "stain" in weights:
        numbers = [np.asarray(stain_numbers(stain)).ravel() for stain in stains if stain.reliable]
        if len(numbers) < 2:
            raise InputError(
                "config.tasks.stain: fewer than two training slides have stains that can be told; set it to 0"
            )
        mean, deviation = np.mean(numbers, axis=0), np.maximum(np.std(numbers, axis=0), _LEAST_DEVIATION)
    sizes = {"tissue": len(classes), "stain": len(mean), "artefact": len(ARTEFACTS)}
    outputs = {name: sizes[name] for name in weights}
    return Tasks(weights, outputs, config.tasks.weighting == "learned", mean, deviation)


def add_heads(model: MILModel, tasks: Tasks, seed: int) -> None:
    """Gives a model the heads of its tasks, drawn from `seed`."""
    rngs = nnx.Rngs(run_key(seed, Purpose.TASK_HEADS))
    model.tasks = TaskHeads(tasks.outputs, model.norm.num_features, tasks.learned, rngs)


def stain_numbers(stain: StainMatrix, change: ColourChange | None = None) -> Float32[Array, "*place 8"]:
    """The two stains' vectors and concentrations as tiles show them, whose colours were changed.

    A density d becomes d times the change's matrix, and so do the vectors; their lengths go into the concentrations.
    """
    vectors, concentration = jnp.asarray(stain.vectors), jnp.asarray(stain.concentration)
    if change is not None:
        vectors = vectors[:, None, None] @ change.density
        concentration = concentration[:, None, None] * jnp.linalg.norm(vectors, axis=-1)
        vectors = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    elif vectors.ndim > 2:
        vectors, concentration = vectors[:, None, None], concentration[:, None, None]
    return jnp.concatenate([vectors.reshape(*vectors.shape[:-2], 6), concentration], axis=-1)


def _log_variances(params: Params) -> Float32[Array, " loss"]:
    """Bounded softly, so that none is stuck at a bound."""
    return _LARGEST * jnp.tanh(params["tasks"]["log_variance"] * _GAIN / _LARGEST)
