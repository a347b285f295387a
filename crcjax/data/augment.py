"""Augmentation on the device: drawn once for a bag, applied to as many of its regions at a time as fit."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Key, Num
from ml_collections import ConfigDict


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Augmentation:
    """What was drawn: for each tile whether it is mirrored in x, in y, and transposed; for each bag a gain per channel."""

    turns: Bool[Array, "batch region slot 3"]
    gain: Float32[Array, "batch 3"] | None


def draw_augmentation(key: Key[Array, ""], shape: tuple[int, int, int], config: ConfigDict) -> Augmentation:
    """The draw for bags of `shape` (batch, region, slot); `config` is config.augment.

    The gain of the optical density is exp(N(0, stain^2)), one draw for all channels times one for each.
    """
    turn, stain = jax.random.split(key)
    turns = jax.random.bernoulli(turn, 0.5 if config.flips else 0.0, (*shape, 3))
    if not config.stain:
        return Augmentation(turns, None)
    draw = jax.random.normal(stain, (shape[0], 4)) * config.stain
    return Augmentation(turns, jnp.exp(draw[:, :1] + draw[:, 1:]))


def augment(
    pixels: Num[Array, "batch region slot y x 3"], drawn: Augmentation, first: Int[Array, ""] | int = 0
) -> Num[Array, "batch region slot y x 3"]:
    """Pixels as another scanner, another cut, might have given them; `first` is the bag's region that they begin at."""
    turns = jax.lax.dynamic_slice_in_dim(drawn.turns, first, pixels.shape[1], axis=1)[:, :, :, None, None, None]
    pixels = jnp.where(turns[..., 0], pixels[..., ::-1, :], pixels)
    pixels = jnp.where(turns[..., 1], pixels[..., ::-1, :, :], pixels)
    pixels = jnp.where(turns[..., 2], jnp.swapaxes(pixels, -2, -3), pixels)
    if drawn.gain is None:
        return pixels
    transmitted = (pixels.astype(jnp.float32) + 1.0) / 256.0
    return 256.0 * transmitted ** drawn.gain[:, None, None, None, None, :] - 1.0
