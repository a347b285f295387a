"""Training metrics: clu collections that are accumulated on the devices between two reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from clu import metrics
from jaxtyping import Array


class IntervalMetrics:
    """The metrics of all steps since the last report; adding a step's does not wait for the step.

    A metric is the mean over the interval's steps, except for the settings that training itself adapts: of `loss_scale`
    and `NAME_weight` it is the last step's value. Metrics may have a leading axis, of ensemble members.
    """

    def __init__(self) -> None:
        self._collection: metrics.Collection | None = None

    def add(self, step_metrics: Mapping[str, Array]) -> None:
        """Adds one step's metrics, which stay on the devices."""
        collect, merge = _functions(tuple(step_metrics), next(iter(step_metrics.values())).ndim)
        collection = collect(step_metrics)
        self._collection = collection if self._collection is None else merge(self._collection, collection)

    def compute(self) -> dict[str, np.ndarray]:
        """The interval's metrics, on the host. The next interval begins."""
        if self._collection is None:
            return {}
        # Computed metric by metric: Collection.compute refuses the leading axis of ensemble members.
        on_host, self._collection = jax.device_get(self._collection), None
        return {name: np.asarray(getattr(on_host, name).compute()) for name in type(on_host).__annotations__}


@lru_cache
def _functions(names: tuple[str, ...], leading_axes: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The jitted functions that make a collection of one step's metrics, and that merge two collections."""
    kinds = {
        name: metrics.LastValue if name == "loss_scale" or name.endswith("_weight") else metrics.Average
        for name in names
    }
    collection = metrics.Collection.create(**{name: kind.from_output(name) for name, kind in kinds.items()})

    def collect(step_metrics: Mapping[str, Array]) -> metrics.Collection:
        return collection.single_from_model_output(**step_metrics)

    for _ in range(leading_axes):
        collect = jax.vmap(collect)
    return jax.jit(collect), jax.jit(lambda one, other: one.merge(other))
