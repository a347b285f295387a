"""The training state, which checkpoints save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import optax

from crcjax.data.hard_mining import Mining
from crcjax.models.mil import Params

# An array; in an abstract state its shape, in a layout its sharding, and in JAX's transformations a placeholder.
Scalar = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossScale:
    """The loss scale of float16: the factor of the loss, and the finite steps since the factor last changed."""

    scale: Scalar
    good_steps: Scalar


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that the next step depends on, besides the config. Checkpoints contain the names of the fields.

    Attributes:
      step: finished steps.
      params: the parameters.
      moments: the optimiser state.
      scaling: the loss scale; None except for float16.
      mining: the memories of hard mining; None without it.
    """

    step: Scalar
    params: Params
    moments: optax.OptState
    scaling: LossScale | Any = None
    mining: Mining | Any = None
