"""Gradient accumulation: computes the gradients of a batch one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from crcjax.models.mil import Params, every


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outputs:
    """The outputs of a loss function besides the loss.

    Attributes:
      summed: arrays that are summed over the micro-batches.
      per_bag: arrays with a leading axis of bags, which are concatenated in the order of the batch.
    """

    summed: PyTree[Array]
    per_bag: PyTree[Array]


LossFunction = Callable[[Params, Any], tuple[Array, Outputs]]


def accumulate_gradients(
    loss_fn: LossFunction, params: Params, inputs: PyTree[Array], micro_batches: int
) -> tuple[Params, Outputs]:
    """Computes the gradients of a loss that is a sum over bags, and the loss function's outputs for the whole batch.

    Args:
      loss_fn: maps parameters and the inputs of a micro-batch to the micro-batch's part of the loss, and to `Outputs`.
      params: the parameters.
      inputs: arrays with a leading axis of bags.
      micro_batches: the number of micro-batches; more take less memory. Micro-batch i consists of every `micro_batches`-th
        bag from bag i on, so that no bag moves to another device.
    """
    gradient_fn = jax.grad(loss_fn, has_aux=True)
    if micro_batches == 1:
        return gradient_fn(params, inputs)

    def add_micro_batch(gradients: Params, number: Int[Array, ""]) -> tuple[Params, Outputs]:
        micro_batch = jax.tree.map(lambda value: every(value, number, micro_batches, axis=0), inputs)
        micro_gradients, outputs = gradient_fn(params, micro_batch)
        return jax.tree.map(jnp.add, gradients, micro_gradients), outputs

    zeros = jax.tree.map(jnp.zeros_like, params)
    gradients, outputs = jax.lax.scan(add_micro_batch, zeros, jnp.arange(micro_batches))
    summed = jax.tree.map(lambda value: value.sum(axis=0), outputs.summed)
    per_bag = jax.tree.map(lambda value: jnp.moveaxis(value, 0, 1).reshape(-1, *value.shape[2:]), outputs.per_bag)
    return gradients, Outputs(summed, per_bag)
