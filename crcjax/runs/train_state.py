"""What a training checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import optax

from crcjax.data.hard_mining import Mining
from crcjax.models.mil import Params

# Where a number stands on the devices, an abstract state has its shape, a layout its sharding, and jax its placeholders.
Scalar = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossScale:
    """What float16's loss is multiplied by, so that small gradients are not zero, and the good steps since it changed."""

    scale: Scalar
    good_steps: Scalar


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds: everything that the next step depends on, besides the config.

    `scaling` is None except for float16; `mining` is None without hard mining.
    """

    step: Scalar
    params: Params
    moments: optax.OptState
    scaling: LossScale | Any = None
    mining: Mining | Any = None
