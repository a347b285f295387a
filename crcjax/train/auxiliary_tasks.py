"""Auxiliary tasks: heads that predict the tissue, the stain and the artefact of every instance."""

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
# The name of the subtype's loss among the losses.
_SUBTYPE = "loss"
# Lower bound on the standard deviation of a stain number over slides, for slides with equal stains.
_MIN_DEVIATION = 0.01
# Adam moves a parameter by about its learning rate per step. With this gain, weights adapt within some hundred steps.
_GAIN = 10.0
# Bound of a log-variance: weights stay within a factor of 55.
_MAX_LOG_VARIANCE = 4.0

Scalars = dict[str, Float32[Array, ""]]


@dataclass(frozen=True)
class Tasks:
    """The enabled tasks.

    Attributes:
      weights: weight of each task's loss, by name. If learned, the initial weight.
      outputs: size of each task's head, by name.
      learned: whether weights are learned.
      mean, deviation: mean and standard deviation of the training slides' stain numbers, which standardise the targets
        of `stain`.
    """

    weights: dict[str, float]
    outputs: dict[str, int]
    learned: bool
    mean: Float32[np.ndarray, " 8"]
    deviation: Float32[np.ndarray, " 8"]

    def targets(
        self, bag: Bag, augmentation: Augmentation
    ) -> dict[str, tuple[Array, Bool[Array, "batch region slot"]]]:
        """Each task's targets, and the mask of the instances that have one; padding and masked tiles have none."""
        mask = jnp.asarray(bag.mask)
        simulated = jnp.zeros(mask.shape, jnp.int32) if augmentation.artefacts is None else augmentation.artefacts.kind
        no_labels = jnp.zeros((*mask.shape, 2), jnp.int32)
        tissue, annotated = jnp.moveaxis(no_labels if bag.tile_labels is None else jnp.asarray(bag.tile_labels), -1, 0)
        targets: dict[str, tuple[Array, Array]] = {}
        if "tissue" in self.weights:
            targets["tissue"] = tissue, mask & (tissue != UNKNOWN)
        if "stain" in self.weights:
            assert isinstance(bag.stain, StainMatrix)
            numbers = (stain_numbers(bag.stain, augmentation.colour) - self.mean) / self.deviation
            reliable = jnp.asarray(bag.stain.reliable)[:, None, None]
            targets["stain"] = numbers, mask & reliable & (simulated == 0)
        if "artefact" in self.weights:
            # A tile with two artefacts has no target.
            kind = jnp.where(simulated == 0, annotated, jnp.where(annotated == 0, simulated, UNKNOWN))
            targets["artefact"] = kind, mask & (kind != UNKNOWN)
        return targets

    def labelled_instances(self, bag: Bag, augmentation: Augmentation) -> Scalars:
        """The number of instances that have a target, by task."""
        targets = self.targets(bag, augmentation)
        return {name: is_labelled.sum().astype(jnp.float32) for name, (_, is_labelled) in targets.items()}

    def losses(
        self, predicted: Mapping[str, Array], bag: Bag, augmentation: Augmentation, labelled: Scalars
    ) -> Scalars:
        """Each task's part of the batch's mean loss over labelled instances, as `NAME_loss`.

        The loss is the cross-entropy (nats); of `stain`, the mean squared error of the standardised stain numbers.

        Args:
          predicted: the outputs of the heads, for the bags of a micro-batch.
          bag: these bags.
          augmentation: their augmentation.
          labelled: `labelled_instances` of the whole batch.
        """
        task_losses = {}
        for name, (target, is_labelled) in self.targets(bag, augmentation).items():
            if name == "stain":
                losses = jnp.square(predicted[name] - target).mean(axis=-1)
            else:
                # UNKNOWN is negative; any valid class does, since unlabelled instances are masked below.
                classes = jnp.maximum(target, 0).astype(jnp.int32)
                losses = optax.softmax_cross_entropy_with_integer_labels(predicted[name], classes)
            task_losses[f"{name}_loss"] = jnp.where(is_labelled, losses, 0.0).sum() / jnp.maximum(labelled[name], 1.0)
        return task_losses

    def objective(
        self, params: Params, losses: Scalars, labelled: Scalars, batch_fraction: float
    ) -> Float32[Array, ""]:
        """The weighted sum of all losses, which training minimises.

        With learned weights, a loss L with weight w and log-variance s adds exp(-s) w L + s / 2; a squared error adds
        exp(-s) w L / 2 + s / 2 (Kendall, Gal and Cipolla 2018, equations 7 and 10).

        Args:
          params: the model's parameters, with the log-variances.
          losses: the losses of a micro-batch, by `losses`, with the subtype's as `loss`.
          labelled: `labelled_instances` of the whole batch.
          batch_fraction: the fraction of the batch in the micro-batch.
        """
        weights: Mapping[str, Any] = self.weights
        objective = losses[_SUBTYPE]
        if self.learned:
            weights, log_variances = self.learned_weights(params), _log_variances(params)
            # Without a labelled instance in the batch, a task's weight does not change.
            has_labels = jnp.stack([jnp.ones(()), *(labelled[name] > 0 for name in self.weights)])
            objective = (
                weights["subtype_weight"] * objective + batch_fraction * (log_variances * has_labels).sum() / 2.0
            )
            weights = {name: weights[f"{name}_weight"] for name in self.weights}
        return objective + sum(weights[name] * losses[f"{name}_loss"] for name in self.weights)

    def learned_weights(self, params: Params) -> Scalars:
        """The learned factor of each loss, as `NAME_weight`; the subtype's is `subtype_weight`."""
        initial = {"subtype": 1.0, **self.weights}
        # A squared error counts half (see `objective`).
        initial = {name: 0.5 * weight if name == "stain" else weight for name, weight in initial.items()}
        factors = jnp.exp(-_log_variances(params))
        return {f"{name}_weight": weight * factors[i] for i, (name, weight) in enumerate(initial.items())}


def check_tasks(config: ConfigDict) -> None:
    """Raises InputError for a field of config.tasks that is invalid, or contradicts the rest of `config` (the whole config)."""
    tasks = config.tasks
    if tasks.weighting not in WEIGHTINGS:
        raise InputError(
            f"config.tasks.weighting must be one of {', '.join(WEIGHTINGS)}, got {tasks.weighting!r}; try fixed"
        )
    for name in TASKS:
        if not 0 <= tasks[name] < np.inf:
            raise InputError(f"config.tasks.{name} must be at least 0, got {tasks[name]}; try 0.5")
        if name != "tissue" and tasks[name] and config.data.features:
            raise InputError(f"config.tasks.{name} needs pixels, which config.data.features replaces; set one to 0")
    if tasks.stain and config.data.unit == "case":
        raise InputError(
            "config.tasks.stain must be 0 with config.data.unit case: the slides of a case have several stains, and a bag has "
            "one target; set it to 0, or config.data.unit to slide"
        )
    if tasks.stain and config.stain.method != "none":
        raise InputError(
            "config.tasks.stain must be 0 with config.stain.method, which gives all slides one stain; set one to 0 or none"
        )
    if tasks.tissue and not tasks.labels:
        raise InputError("config.tasks.tissue needs labels; name their folder as config.tasks.labels")
    if tasks.tissue and not 1 < len(set(tasks.tissue_classes)) == len(tasks.tissue_classes):
        raise InputError(
            "config.tasks.tissue_classes must be two or more different names of areas in config.tasks.labels, got "
            f"{tuple(tasks.tissue_classes)}"
        )
    if tasks.artefact and not (config.augment.artefacts or tasks.labels):
        raise InputError(
            "config.tasks.artefact needs artefacts; simulate them with config.augment.artefacts, or set config.tasks.labels"
        )


def open_tasks(
    config: ConfigDict, labels: Sequence[Int8[np.ndarray, "_ slot 2"]], stains: Sequence[Any]
) -> Tasks | None:
    """The enabled tasks of `config` (the whole config); None if all are disabled.

    Args:
      config: the whole config, already checked (`check_tasks`).
      labels: the tile labels of each training slide or case, from `bag_labels`.
      stains: the stain estimate of each training slide.

    Raises:
      InputError: the training slides have no labels or stains that a task could be learned from.
    """
    weights = {name: float(config.tasks[name]) for name in TASKS if config.tasks[name]}
    if not weights:
        return None
    classes, folder = tuple(config.tasks.tissue_classes), config.tasks.labels
    tissues, artefacts = (
        set(np.unique(np.concatenate([slide_labels[..., i].ravel() for slide_labels in labels]))) if labels else set()
        for i in (0, 1)
    )
    if "tissue" in weights and (absent := [name for i, name in enumerate(classes) if i not in tissues]):
        raise InputError(
            f"config.tasks.tissue_classes: {folder} has no training tile of class {', '.join(absent)}; correct the "
            "folder or the names, or leave them out"
        )
    if "artefact" in weights and not config.augment.artefacts and not max(artefacts) > 0:
        raise InputError(
            f"config.tasks.artefact: {folder} has no training tile with {', '.join(ARTEFACTS[1:])}; simulate them with "
            "config.augment.artefacts"
        )
    mean, deviation = np.zeros(8, np.float32), np.ones(8, np.float32)
    if "stain" in weights:
        numbers = [np.asarray(stain_numbers(stain)).ravel() for stain in stains if stain.reliable]
        if len(numbers) < 2:
            raise InputError("config.tasks.stain needs two training slides with a reliable stain estimate; set it to 0")
        mean, deviation = np.mean(numbers, axis=0), np.maximum(np.std(numbers, axis=0), _MIN_DEVIATION)
    sizes = {"tissue": len(classes), "stain": len(mean), "artefact": len(ARTEFACTS)}
    outputs = {name: sizes[name] for name in weights}
    return Tasks(weights, outputs, config.tasks.weighting == "learned", mean, deviation)


def add_heads(model: MILModel, tasks: Tasks, seed: int) -> None:
    """Adds the heads of the tasks to a model, with parameters sampled from `seed`."""
    rngs = nnx.Rngs(run_key(seed, Purpose.TASK_HEADS))
    model.tasks = TaskHeads(tasks.outputs, model.norm.num_features, tasks.learned, rngs)


def stain_numbers(stain: StainMatrix, change: ColourChange | None = None) -> Float32[Array, "*place 8"]:
    """The stain of each slide or tile as 8 numbers: two unit vectors in optical density and two concentrations.

    Args:
      stain: the stain estimates.
      change: the colour augmentation. The numbers are then those of the changed tiles: its matrix multiplies the vectors,
        and the change of their length multiplies the concentrations.
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
    """The log-variances of the losses, with a smooth bound: at a hard bound the gradient would be zero."""
    return _MAX_LOG_VARIANCE * jnp.tanh(params["tasks"]["log_variance"] * _GAIN / _MAX_LOG_VARIANCE)
