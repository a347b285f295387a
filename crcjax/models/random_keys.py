"""The random keys of a run: one for each purpose, all from config.seed, so that no two purposes share random bits."""

from __future__ import annotations

from enum import IntEnum

import jax
from jaxtyping import Array, Int, Key


class Purpose(IntEnum):
    """The purposes of random numbers on the device. The number of a removed purpose is not reused, so that runs stay reproducible."""

    INITIALISATION = 1
    TASK_HEADS = 2
    TRAINING_STEP = 3


def run_key(seed: int | Int[Array, ""], purpose: Purpose) -> Key[Array, ""]:
    """The key of one purpose in the run whose config.seed is `seed`."""
    return jax.random.fold_in(jax.random.key(seed), int(purpose))
