"""Probabilities for a population with other shares of the classes than the training.

A model trained with balanced classes or weights overstates rare classes. Correct that before calibration is judged.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from crcjax.errors import InputError
from crcjax.validation.bootstrap import Resamples, Weights, number_patients
from crcjax.validation.estimate import Estimate, undetermined
from crcjax.validation.influence import count_clusters

_ITERATIONS, _TOLERANCE = 1000, 1e-7


def adjust_prevalence(
    probs: Float[np.ndarray, "unit class"],
    trained: Float[np.ndarray, " class"],
    population: Float[np.ndarray, " class"],
) -> Float[np.ndarray, "unit class"]:
    """The probabilities in a population with other prevalences (Saerens, Latinne and Decaestecker 2002, equation 2.4).

    Args:
      probs: the model's probabilities.
      trained: the share of each class in the training, as the loss weighed it; above 0.
      population: the share of each class in the population.

    Raises:
      InputError: the shares do not sum to 1, or a trained one is not above 0.
    """
    _check(trained, population)
    scaled = probs * (population / trained)
    return scaled / scaled.sum(axis=1, keepdims=True)


def estimate_prevalence(
    probs: Float[np.ndarray, "unit class"],
    trained: Float[np.ndarray, " class"],
    seed: int,
    cluster: Int[np.ndarray, " unit"] | None = None,
    *,
    replicates: int = 1000,
) -> list[Estimate]:
    """The share of each class in a population whose labels are unknown, by expectation and maximisation (Saerens et al. 2002).

    It assumes that the model is calibrated for `trained`, and that slides of a class look alike in both populations.
    """
    _check(trained, trained)
    n, classes = probs.shape
    if n == 0:
        return [undetermined("bootstrap", 0, "no cases", count_clusters(cluster))] * classes
    resamples = Resamples.sample(number_patients(cluster, probs), seed, replicates)

    def shares(weights: Weights) -> Float[np.ndarray, "class replicate"]:
        units = weights[resamples.patient]
        share = np.repeat(trained[:, None], units.shape[1], axis=1)
        for _ in range(_ITERATIONS):
            ratio = share / trained[:, None]
            responsibility = units / np.maximum(probs @ ratio, 1e-300)
            updated = ratio * (probs.T @ responsibility) / units.sum(axis=0)
            change = np.abs(updated - share).max()
            share = updated
            if not change > _TOLERANCE:
                break
        return share

    return [
        replace(resamples.estimate(values), n_clusters=count_clusters(cluster)) for values in resamples.evaluate(shares)
    ]


def _check(trained: np.ndarray, population: np.ndarray) -> None:
    for name, shares in (("trained", trained), ("population", population)):
        if abs(shares.sum() - 1) > 1e-6 or (shares < 0).any() or (name == "trained" and not (shares > 0).all()):
            raise InputError(f"the {name} shares of the classes must be above 0 and sum to 1, got {shares.tolist()}")
