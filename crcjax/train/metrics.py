"""Training metrics as clu metrics: of steps, accumulated on the devices between two reports; and of auxiliary tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jaxtyping import Array, Bool

from crcjax.predict.evaluation_metrics import BalancedAccuracy

# Results of a step that say whether it was left out and why; they are not averaged.
NOT_REPORTED = ("updated", "worst_bag")


class IntervalMetrics:
    """The metrics of all steps since the last report.

    A metric is the mean over these steps without those that were left out (`updated` is 0), except for the settings that
    training adapts: `loss_scale` and `NAME_weight` have the value of the last step. Metrics may have a leading axis of
    ensemble members.
    """

    def __init__(self, memory: Mapping[str, Any] | None = None):
        """Continues an interval from the `memory` of another one; None begins anew."""
        self._collection: metrics.Collection | None = None
        self._memory = dict(memory or {})

    def add(self, step_metrics: Mapping[str, Array]) -> None:
        """Adds the metrics of one step. They stay on the devices, so that this does not wait for the step."""
        collect, merge = _functions(tuple(step_metrics), next(iter(step_metrics.values())).ndim)
        collection = collect(step_metrics)
        if self._memory:
            self._collection, self._memory = _remembered(self._memory, collection), {}
        self._collection = collection if self._collection is None else merge(self._collection, collection)

    def memory(self) -> dict[str, Any]:
        """The sums of the interval as JSON values, from which another object continues with the same bits."""
        if self._collection is None:
            return dict(self._memory)
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(self._collection))
        return {jax.tree_util.keystr(path): np.asarray(leaf).tolist() for path, leaf in leaves}

    def compute(self) -> dict[str, np.ndarray]:
        """Returns the metrics on the host, and starts the next interval. Means over no step are not numbers."""
        if self._collection is None:
            return {}
        # One by one, since Collection.compute refuses the leading axis of ensemble members.
        on_host, self._collection = jax.device_get(self._collection), None
        with np.errstate(invalid="ignore"):
            return {name: np.asarray(getattr(on_host, name).compute()) for name in type(on_host).__annotations__}


@flax.struct.dataclass
class Setting(metrics.LastValue):
    """The value of the last step, whether it was left out or not."""

    @classmethod
    def from_model_output(cls, value: Array, mask: Array | None = None, **_: Any) -> metrics.LastValue:
        """The metric of one step."""
        return super().from_model_output(value)


@flax.struct.dataclass
class ConstantAccuracy(BalancedAccuracy):
    """The balanced accuracy of a constant prediction: 1 divided by the number of classes that have an instance."""

    def compute(self) -> Any:
        return 1.0 / np.count_nonzero(np.asarray(self.confusion).sum(axis=1))


def task_metrics(
    predicted: Mapping[str, Array], targets: Mapping[str, tuple[Array, Bool[Array, "*instance"]]]
) -> metrics.Collection:
    """The validation metrics of the auxiliary tasks on one bag. Collections of several bags are merged.

    Args:
      predicted: the outputs of the heads, by task.
      targets: the targets by task, and whether each instance has one: class indices, or for `stain` the standardised stain
        numbers.

    Returns:
      `NAME_balanced_accuracy`, and `NAME_constant`, the value of the best constant prediction. For `stain`, `stain_error`
      (the mean squared error), and `stain_constant`, the error of the training slides' mean, which is 0 after
      standardisation.
    """
    values: dict[str, metrics.Metric] = {}
    for name, (target, is_labelled) in targets.items():
        if name == "stain":
            error, constant_error = (jnp.square(value).mean(axis=-1) for value in (predicted[name] - target, target))
            values["stain_error"] = metrics.Average.from_model_output(error, mask=is_labelled)
            values["stain_constant"] = metrics.Average.from_model_output(constant_error, mask=is_labelled)
        else:
            counted = predicted[name], target, is_labelled
            values[f"{name}_balanced_accuracy"] = BalancedAccuracy.from_model_output(*counted)
            values[f"{name}_constant"] = ConstantAccuracy.from_model_output(*counted)
    return metrics.Collection.create_collection(**values)


def compute_task_metrics(collection: metrics.Collection) -> dict[str, float]:
    """Computes a collection of `task_metrics`, without the metrics of tasks that no instance has a target for."""
    # Without an instance, a metric consists of zeros.
    has_instances = {
        name: any(np.any(leaf) for leaf in jax.tree.leaves(getattr(collection, name)))
        for name in type(collection).__annotations__
    }
    return {name: float(getattr(collection, name).compute()) for name, has_any in has_instances.items() if has_any}


def _remembered(memory: Mapping[str, Any], like: metrics.Collection) -> metrics.Collection | None:
    """The collection of a `memory`, with the types and the layout of another one; None if it has other metrics."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    if {jax.tree_util.keystr(path) for path, _ in leaves} != set(memory):
        return None
    with jax.transfer_guard("allow"):
        values = [_placed(memory[jax.tree_util.keystr(path)], leaf) for path, leaf in leaves]
    return jax.tree.unflatten(structure, values)


def _placed(value: Any, like: Array) -> Array:
    on_host = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: on_host[index])


@lru_cache
def _functions(names: tuple[str, ...], leading_axes: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Two jitted functions: one makes a collection from a step's metrics, the other merges two collections."""
    kinds = {
        name: Setting if name == "loss_scale" or name.endswith("_weight") else metrics.Average
        for name in names
        if name not in NOT_REPORTED
    }
    collection = metrics.Collection.create(**{name: kind.from_output(name) for name, kind in kinds.items()})

    def collect(step_metrics: Mapping[str, Array]) -> metrics.Collection:
        # clu applies masks to values with an axis of examples.
        values = {name: step_metrics[name][None] for name in kinds}
        return collection.single_from_model_output(**values, mask=step_metrics["updated"][None] > 0)

    for _ in range(leading_axes):
        collect = jax.vmap(collect)
    return jax.jit(collect), jax.jit(lambda one, other: one.merge(other))
