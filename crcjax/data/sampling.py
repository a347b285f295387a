"""Which slides and regions a training step sees: pure functions of seed and step, so that any step can be made alone."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, Int


def draw_slides(labels: Int[np.ndarray, " slide"], seed: int, step: int, bags: int) -> Int[np.ndarray, " bag"]:
    """Slides of one step's bags: the classes take turns, and each goes through its slides in a new order every round."""
    classes = np.unique(labels)
    drawn = []
    for position in range(step * bags, (step + 1) * bags):
        members = np.flatnonzero(labels == classes[position % len(classes)])
        turn, place = divmod(position // len(classes), len(members))
        order = np.random.default_rng([seed, 10, position % len(classes), turn]).permutation(members)
        drawn.append(order[place])
    return np.array(drawn)


def slide_weights(labels: Int[np.ndarray, " slide"], beta: float) -> Float32[np.ndarray, " slide"]:
    """Weights in the loss of slides that `draw_slides` draws, so that a class counts by its effective number.

    A class of n slides counts as n / ((1 - beta^n) / (1 - beta)) (Cui et al. 2019, equation 2): with beta 1 all alike, as
    drawn, and with beta 0 by their slides, as if nothing were balanced. Their mean over the classes is one.
    """
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if beta == 1.0 or len(classes) == 0:
        return np.ones(len(labels), np.float32)
    weights = counts * (1.0 - beta) / (1.0 - beta**counts)
    return (weights / weights.mean())[inverse].astype(np.float32)


def draw_regions(
    mask: Bool[np.ndarray, "region slot"], seed: int, step: int, bag: int, count: int
) -> Int[np.ndarray, " drawn"]:
    """At most `count` different regions that hold a tile, uniformly, in the order of the store."""
    filled = np.flatnonzero(mask.any(axis=1))
    if len(filled) <= count:
        return filled
    return np.sort(np.random.default_rng([seed, 11, step, bag]).choice(filled, count, replace=False))
