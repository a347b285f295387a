"""The optimiser and its learning rate schedule, from optax, by the names in config.optimizer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict

# The one-cycle schedule starts at the highest rate divided by this, as in optax and torch (Smith and Topin 2018).
_ONE_CYCLE_START = 25.0


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate schedule of `config` (config.optimizer) for a run of `steps` optimiser steps.

    The schedules cosine, linear and constant start with a linear warm-up from zero over `warmup_steps`.
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
      frozen: whether the parameter at a path is frozen; a frozen parameter has no optimiser state.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), _update_rule(config, steps))
    if frozen is None:
        return optimizer

    def labels(params: optax.Params) -> optax.Params:
        def label(path: tuple, value: object) -> str:
            return "kept" if frozen(tuple(str(key.key) for key in path)) else "trained"

        return jax.tree_util.tree_map_with_path(label, params)

    # Checkpoints contain these labels, "kept" for frozen parameters: new names would make old runs unreadable.
    return optax.partition({"trained": optimizer, "kept": optax.set_to_zero()}, labels)


def _update_rule(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """The update rule. Weight decay is decoupled in adamw, lamb and lion, and added to the gradient in adam and sgd."""
    rate, decay = learning_rate(config, steps), config.weight_decay
    betas = {"b1": config.beta1, "b2": config.beta2}
    if config.name == "adamw":
        return optax.adamw(rate, **betas, weight_decay=decay, mask=_is_decayed)
    if config.name == "lamb":
        return optax.lamb(rate, **betas, weight_decay=decay, mask=_is_decayed)
    if config.name == "lion":
        return optax.lion(rate, **betas, weight_decay=decay, mask=_is_decayed)
    rule = optax.adam(rate, **betas) if config.name == "adam" else optax.sgd(rate, momentum=config.beta1)
    return optax.chain(optax.add_decayed_weights(decay, _is_decayed), rule)


def _is_decayed(params: optax.Params) -> optax.Params:
    """True for matrices and kernels, False for biases and scales."""
    return jax.tree.map(lambda value: value.ndim > 1, params)
