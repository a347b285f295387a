"""The optimiser and its learning rate schedule: optax transformations by the names in config.optimizer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict

_ONE_CYCLE_START = 25.0  # Smith and Topin 2018, as optax and torch have it: the cycle begins at the highest rate / 25


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Returns the learning rate by step of `config` (config.optimizer) for a run of `steps` optimiser steps.

    cosine, linear and constant begin with a linear warm-up from zero over `warmup_steps`.
    """
    peak, warmup, end = config.learning_rate, config.warmup_steps, config.learning_rate * config.final_fraction
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end)
    if config.schedule == "one_cycle":
        final = 1.0 / (_ONE_CYCLE_START * config.final_fraction)
        return optax.cosine_onecycle_schedule(steps, peak, warmup / steps, _ONE_CYCLE_START, final)
    if config.schedule == "constant":
        return optax.warmup_constant_schedule(0.0, peak, warmup)
    decay = optax.linear_schedule(peak, end, steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def build_optimizer(
    config: ConfigDict, steps: int, frozen: Callable[[tuple[str, ...]], bool] | None = None
) -> optax.GradientTransformation:
    """Builds the optimiser of `config` (config.optimizer), with gradients clipped by their global norm.

    Args:
      config: config.optimizer, already checked (`check_config`).
      steps: optimiser steps of the run.
      frozen: whether training leaves the parameter of a path as it is; it then has no optimiser state.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), _update_rule(config, steps))
    if frozen is None:
        return optimizer

    def labels(params: optax.Params) -> optax.Params:
        def label(path: tuple, value: object) -> str:
            return "kept" if frozen(tuple(str(part.key) for part in path)) else "trained"

        return jax.tree_util.tree_map_with_path(label, params)

    # Checkpoints hold these labels.
    return optax.partition({"trained": optimizer, "kept": optax.set_to_zero()}, labels)


def _update_rule(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Weight decay is decoupled in adamw, lamb and lion, and added to the gradient in adam and sgd."""
    rate, decay = learning_rate(config, steps), config.weight_decay
    betas = {"b1": config.beta1, "b2": config.beta2}
    if config.name == "adamw":
        return optax.adamw(rate, **betas, weight_decay=decay, mask=_matrices)
    if config.name == "lamb":
        return optax.lamb(rate, **betas, weight_decay=decay, mask=_matrices)
    if config.name == "lion":
        return optax.lion(rate, **betas, weight_decay=decay, mask=_matrices)
    rule = optax.adam(rate, **betas) if config.name == "adam" else optax.sgd(rate, momentum=config.beta1)
    return optax.chain(optax.add_decayed_weights(decay, _matrices), rule)


def _matrices(params: optax.Params) -> optax.Params:
    """Matrices and kernels are decayed; biases and scales are not."""
    return jax.tree.map(lambda value: value.ndim > 1, params)
