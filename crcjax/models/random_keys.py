"""The random keys of a run: one for each purpose, all from config.seed, so that no two purposes share random bits."""

from __future__ import annotations

from enum import IntEnum

import jax
from jaxtyping import Array, Int, Key


class Purpose(IntEnum):
    """What a run needs random numbers for on the device. Numbers are never used again, so that runs stay reproducible."""

    INITIALISATION = 1
    TASK_HEADS = 2
    TRAINING_STEP = 3


def run_key(seed: int | Int[Array, ""], purpose: Purpose) -> Key[Array, ""]:
    """The key of one purpose of the run with config.seed `seed`."""
    return jax.random.fold_in(jax.random.key(seed), int(purpose))
