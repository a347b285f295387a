"""The compact tile encoder, which trains end to end on a laptop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num
from ml_collections import ConfigDict

from crcjax.models.maximum import maximum_along
from crcjax.slides.stain.methods import clipped_optical_density

_WHITE = np.full(3, 255.0, np.float32)


class CompactEncoder(nnx.Module):
    """A small convolutional encoder that trains end to end, also on two CPU cores.

    It merges patches of 4, 2, 2 and 2 px side. Every convolution has a stride equal to the side of its kernel, so that it is
    one matrix product, which XLA runs several times faster on CPUs than overlapping kernels. The features of a tile combine
    the mean and the largest response over its 32 px patches. `tile_px` must be a multiple of 32.
    """

    def __init__(self, config: ConfigDict, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.width
        shapes = [(4, 3, width), (2, width, 2 * width), (2, 2 * width, 4 * width), (2, 4 * width, 4 * width)]
        self.strides = tuple(stride for stride, _, _ in shapes)
        self.merges = nnx.List(
            [nnx.Linear(stride**2 * inputs, outputs, dtype=dtype, rngs=rngs) for stride, inputs, outputs in shapes]
        )
        self.norms = nnx.List([nnx.LayerNorm(outputs, rngs=rngs) for _, _, outputs in shapes])
        self.project = nnx.Linear(8 * width, config.features, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Num[Array, "tile y x 3"]) -> Float[Array, "tile feature"]:
        # Optical density is 0 (white) to about 5.5.
        maps = clipped_optical_density(pixels, _WHITE) - 0.5
        for stride, merge, norm in zip(self.strides, self.merges, self.norms, strict=True):
            # The input is already centred optical density; a norm of the first maps would cost more than all the rest.
            maps = merge(_patches(maps, stride))
            maps = jax.nn.gelu(maps if stride == 4 else norm(maps))
        pixels_of_maps = maps.reshape(maps.shape[0], -1, maps.shape[-1])
        pooled = jnp.concatenate([pixels_of_maps.mean(axis=1), maximum_along(pixels_of_maps, 1)], axis=-1)
        return self.project(pooled)


def _patches(maps: Float[Array, "tile y x channel"], side: int) -> Float[Array, "tile row column value"]:
    """Joins the values of each square patch of `side` pixels."""
    tiles, height, width, channels = maps.shape
    split = maps.reshape(tiles, height // side, side, width // side, side, channels)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(tiles, height // side, width // side, side * side * channels)
