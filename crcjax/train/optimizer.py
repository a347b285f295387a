"""AdamW with warm-up, cosine decay and clipping."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear from zero to the peak, then a cosine to `final_fraction` of it at `steps`. Raises InputError."""
    peak = config.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, steps, peak * config.final_fraction)


def build_optimizer(
    config: ConfigDict, steps: int, kept: Callable[[tuple[str, ...]], bool] | None = None
) -> optax.GradientTransformation:
    """The optimiser of `config` (config.optimizer); weight decay on matrices only.

    Parameters of whose path `kept` is true stay as they are, and take no memory for moments.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda value: value.ndim > 1, params),
        ),
    )
    if kept is None:
        return optimizer

    def labels(params: optax.Params) -> optax.Params:
        def label(path: tuple, value: object) -> str:
            return "kept" if kept(tuple(str(part.key) for part in path)) else "trained"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition({"trained": optimizer, "kept": optax.set_to_zero()}, labels)
