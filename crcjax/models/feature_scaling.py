"""Standardisation of stored features, whose columns may differ in scale, and dropout of whole columns."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Key


class FeatureStatistic(nnx.Variable):
    """A statistic of the training slides' features. It is part of the checkpoint, and training does not change it."""


class Standardiser(nnx.Module):
    """Applies `standardise`, with the statistics of the training slides once they are set.

    Args:
      features: the number of columns.
      limit: the largest standardised value.
    """

    def __init__(self, features: int, limit: float):
        self.mean = FeatureStatistic(jnp.zeros(features))
        self.inverse_deviation = FeatureStatistic(jnp.ones(features))
        self.limit = limit

    def set_statistics(
        self, mean: Float32[np.ndarray, " feature"], inverse_deviation: Float32[np.ndarray, " feature"]
    ) -> None:
        """Sets the result of `column_statistics`."""
        self.mean[...], self.inverse_deviation[...] = jnp.asarray(mean), jnp.asarray(inverse_deviation)

    def __call__(self, features: Float[Array, "*instance feature"]) -> Float32[Array, "*instance feature"]:
        mean, inverse_deviation = jax.lax.stop_gradient((self.mean[...], self.inverse_deviation[...]))
        return standardise(features, mean, inverse_deviation, self.limit)


def column_statistics(
    parts: Iterable[Float[np.ndarray, "_ feature"]],
) -> tuple[Float32[np.ndarray, " feature"], Float32[np.ndarray, " feature"]]:
    """The mean of every column over the rows of all parts, and the inverse of its standard deviation.

    The inverse is 0 for a column that has one value in all rows: divided by a tiny number instead, any other value, and even
    the rounding of the mean, would become the largest feature of all.
    """
    rows, total, squares = 0, np.zeros(()), np.zeros(())
    smallest, largest = np.asarray(np.inf), np.asarray(-np.inf)
    shift = None
    for part in parts:
        if not len(part):
            continue
        values = part.astype(np.float64)
        # Relative to any row, a column of large values with a small deviation loses no digits.
        shift = values[0] if shift is None else shift
        rows += len(values)
        smallest, largest = np.minimum(smallest, values.min(axis=0)), np.maximum(largest, values.max(axis=0))
        total, squares = total + (values - shift).sum(axis=0), squares + ((values - shift) ** 2).sum(axis=0)
    if shift is None:
        raise ValueError("column_statistics needs at least one row")
    mean = total / rows
    deviation = np.sqrt(np.maximum(squares / rows - mean**2, 0.0))
    varies = (largest > smallest) & (deviation > 0)
    inverse_deviation = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)
    return (shift + mean).astype(np.float32), inverse_deviation.astype(np.float32)


def standardise(
    features: Float[Array | np.ndarray, "*instance feature"],
    mean: Float32[Array | np.ndarray, " feature"],
    inverse_deviation: Float32[Array | np.ndarray, " feature"],
    limit: float,
) -> Float32[Array, "*instance feature"]:
    """Features in standard deviations from the mean, clipped to at most `limit` on both sides."""
    return jnp.clip((jnp.asarray(features, jnp.float32) - mean) * inverse_deviation, -limit, limit)


def drop_columns(
    features: Float[Array, "batch *instance feature"], rate: float, key: Key[Array, " batch"]
) -> Float[Array, "batch *instance feature"]:
    """Dropout of columns: sets each, with probability `rate`, to zero in all instances of a bag, and scales up the others.

    Dropped in single instances, a column would average out in some poolings and not in others.
    """
    keep = jax.vmap(partial(jax.random.bernoulli, p=1 - rate, shape=features.shape[-1:]))(key)
    keep = keep.reshape(len(features), *(1,) * (features.ndim - 2), -1)
    return jnp.where(keep, features / (1 - rate), 0)
