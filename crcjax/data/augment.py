"""Augmentation on the device: pure, jitted with the training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key, Num, UInt8
from ml_collections import ConfigDict


def augment(
    key: Key[Array, ""], pixels: UInt8[Array, "batch region slot y x 3"], config: ConfigDict
) -> Num[Array, "batch region slot y x 3"]:
    """Pixels as another scanner, another cut, might have given them; `config` is config.augment."""
    turn, stain = jax.random.split(key)
    if config.flips:
        pixels = _turn(turn, pixels)
    return jitter_stain(stain, pixels, config.stain) if config.stain else pixels


def _turn(key: Key[Array, ""], pixels: UInt8[Array, "batch region slot y x 3"]) -> Num[Array, ...]:
    """Each tile flipped along either axis and transposed with probability one half."""
    choice = jax.random.bernoulli(key, 0.5, (3, *pixels.shape[:3]))[..., None, None, None]
    pixels = jnp.where(choice[0], pixels[..., ::-1, :, :], pixels)
    pixels = jnp.where(choice[1], pixels[..., ::-1, :], pixels)
    return jnp.where(choice[2], jnp.swapaxes(pixels, -2, -3), pixels)


def jitter_stain(
    key: Key[Array, ""], pixels: Num[Array, "batch region slot y x 3"], deviation: float
) -> Float32[Array, "batch region slot y x 3"]:
    """Each bag's optical density times exp(N(0, deviation²)), one draw for all channels and one for each."""
    draw = jax.random.normal(key, (pixels.shape[0], 4)) * deviation
    gain = jnp.exp(draw[:, :1] + draw[:, 1:])[:, None, None, None, None, :]
    transmitted = (pixels.astype(jnp.float32) + 1.0) / 256.0
    return 256.0 * transmitted**gain - 1.0
