"""Dynamic loss scaling for mixed precision in float16 (Micikevicius et al. 2018)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from crcjax.models.mil import Params
from crcjax.runs.train_state import LossScale

_INITIAL_SCALE = 2.0**15
_FINITE_STEPS_TO_DOUBLE = 2000


def initial_loss_scale(dtype: str) -> LossScale | None:
    """The loss scale before the first step, for config.model.dtype; None for all types except float16."""
    if dtype != "float16":
        return None
    return LossScale(jnp.float32(_INITIAL_SCALE), jnp.zeros((), jnp.int32))


def scale_loss(loss: Array, loss_scale: LossScale | None) -> Array:
    """Multiplies the loss by the scale, so that small gradients do not underflow to zero."""
    return loss * loss_scale.scale if loss_scale else loss


def unscale_gradients(gradients: Params, loss_scale: LossScale | None) -> Params:
    """Divides the gradients of the scaled loss by the scale."""
    return jax.tree.map(lambda value: value / loss_scale.scale, gradients) if loss_scale else gradients


def next_loss_scale(loss_scale: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """The scale for the next step: half (at least 1) after an overflow, double after 2,000 finite steps."""
    doubles = loss_scale.good_steps + 1 >= _FINITE_STEPS_TO_DOUBLE
    grown = loss_scale.scale * jnp.where(doubles, 2.0, 1.0)
    scale = jnp.where(finite, grown, jnp.maximum(loss_scale.scale / 2.0, 1.0))
    return LossScale(scale, jnp.where(finite & ~doubles, loss_scale.good_steps + 1, 0))
