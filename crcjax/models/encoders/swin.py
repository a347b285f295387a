"""Swin transformers; modules have the names of timm, so that its checkpoints fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from crcjax.models.encoders.convnets import BatchNorm, convolution
from crcjax.models.encoders.vit import MLP, layer_norm, linear_layer, self_attention

# Tokens along the side of a window.
WINDOW = 7
_EPSILON = 1e-5


class Swin(nnx.Module):
    """The Swin transformer (Liu 2021); with `conv_stem`, the encoder of CTransPath (Wang 2022).

    With four stages, the sides of images must be multiples of 224 px, so that windows fill every stage. Features are the
    mean of the last stage.
    """

    def __init__(
        self,
        *,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        conv_stem: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.patch_embed = (_ConvStem if conv_stem else _PatchEmbed)(width, **kind)
        widths = [width * 2**stage for stage in range(len(depths))]
        self.layers = nnx.List(
            [
                _Stage(wide, depth, head, stage > 0, **kind)
                for stage, (wide, depth, head) in enumerate(zip(widths, depths, heads, strict=True))
            ]
        )
        self.norm = layer_norm(widths[-1], epsilon=_EPSILON, rngs=rngs)

    def __call__(self, images: Float[Array, "tile y x 3"]) -> Float[Array, "tile feature"]:
        """Encodes normalised images. Raises ValueError if windows do not fill them."""
        unit = 4 * WINDOW * 2 ** (len(self.layers) - 1)
        if images.shape[1] % unit or images.shape[2] % unit:
            raise ValueError(
                f"sides of images must be multiples of {unit} px, got {images.shape[2]} x {images.shape[1]}"
            )
        maps = self.patch_embed(images)
        for stage in self.layers:
            maps = stage(maps)
        return self.norm(maps).mean(axis=(1, 2))


class _PatchEmbed(nnx.Module):
    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = nnx.Conv(3, width, (4, 4), strides=(4, 4), padding="VALID", dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, epsilon=_EPSILON, rngs=rngs)

    def __call__(self, images: Float[Array, "tile y x 3"]) -> Float[Array, "tile row column feature"]:
        return self.norm(self.proj(images))


class _ConvStem(nnx.Module):
    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        thin = width // 8
        # The missing numbers are activations, which torch counts too.
        layers = {
            "0": convolution(3, thin, 3, 2, **kind),
            "1": BatchNorm(thin, rngs=rngs),
            "3": convolution(thin, 2 * thin, 3, 2, **kind),
            "4": BatchNorm(2 * thin, rngs=rngs),
            "6": nnx.Conv(2 * thin, width, (1, 1), **kind),
        }
        self.proj = nnx.Dict(layers)
        self.norm = layer_norm(width, epsilon=_EPSILON, rngs=rngs)

    def __call__(self, images: Float[Array, "tile y x 3"]) -> Float[Array, "tile row column feature"]:
        for convolve, norm in (("0", "1"), ("3", "4")):
            images = jax.nn.relu(self.proj[norm](self.proj[convolve](images)))
        return self.norm(self.proj["6"](images))


class _Stage(nnx.Module):
    def __init__(self, width: int, depth: int, heads: int, merges: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.downsample = _PatchMerging(width, **kind) if merges else None
        self.blocks = nnx.List([_Block(width, heads, index % 2 * (WINDOW // 2), **kind) for index in range(depth)])

    def __call__(self, maps: Float[Array, "tile row column feature"]) -> Float[Array, "tile _ _ _"]:
        if self.downsample is not None:
            maps = self.downsample(maps)
        for block in self.blocks:
            maps = block(maps)
        return maps


class _PatchMerging(nnx.Module):
    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = layer_norm(2 * width, epsilon=_EPSILON, rngs=rngs)
        self.reduction = linear_layer(2 * width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, maps: Float[Array, "tile row column feature"]) -> Float[Array, "tile _ _ _"]:
        tiles, rows, columns, width = maps.shape
        fours = maps.reshape(tiles, rows // 2, 2, columns // 2, 2, width).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(fours.reshape(tiles, rows // 2, columns // 2, 4 * width)))


class _Block(nnx.Module):
    def __init__(self, width: int, heads: int, shift: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.shift = shift
        self.norm1 = layer_norm(width, epsilon=_EPSILON, rngs=rngs)
        self.attn = _WindowAttention(width, heads, **kind)
        self.norm2 = layer_norm(width, epsilon=_EPSILON, rngs=rngs)
        self.mlp = MLP(width, 4 * width, **kind)

    def __call__(self, maps: Float[Array, "tile row column feature"]) -> Float[Array, "tile row column feature"]:
        _, rows, columns, _ = maps.shape
        # A single window has no neighbours.
        shift = self.shift if min(rows, columns) > WINDOW else 0
        windows = jnp.roll(self.norm1(maps), (-shift, -shift), (1, 2))
        windows = self.attn(windows, _neighbours(rows, columns, shift) if shift else None)
        maps = maps + jnp.roll(windows, (shift, shift), (1, 2))
        return maps + self.mlp(self.norm2(maps))


class _WindowAttention(nnx.Module):
    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = linear_layer(width, 3 * width, narrow=True, dtype=dtype, rngs=rngs)
        self.proj = linear_layer(width, width, dtype=dtype, rngs=rngs)
        self.relative_position_bias_table = nnx.Param(jnp.zeros(((2 * WINDOW - 1) ** 2, heads)))

    def __call__(
        self, maps: Float[Array, "tile row column feature"], visible: Bool[np.ndarray, "window token token"] | None
    ) -> Float[Array, "tile row column feature"]:
        tiles, rows, columns, width = maps.shape
        split = (tiles, rows // WINDOW, WINDOW, columns // WINDOW, WINDOW, width)
        windows = maps.reshape(split).transpose(0, 1, 3, 2, 4, 5).reshape(-1, WINDOW**2, width)
        bias = self.relative_position_bias_table[...][_relative_index()].transpose(2, 0, 1)[None]
        if visible is not None:
            bias = jnp.tile(jnp.where(visible[:, None], bias, -jnp.inf), (tiles, 1, 1, 1))
        attended = self_attention(self.qkv(windows), self.heads, bias)
        joined = self.proj(attended).reshape(tiles, rows // WINDOW, columns // WINDOW, WINDOW, WINDOW, width)
        return joined.transpose(0, 1, 3, 2, 4, 5).reshape(maps.shape)


def _relative_index() -> Int[np.ndarray, "token token"]:
    """The row of the position bias table for each pair of tokens of a window (Liu 2021, section 3.2)."""
    row, column = np.divmod(np.arange(WINDOW**2), WINDOW)
    largest_offset = WINDOW - 1
    return (row[:, None] - row + largest_offset) * (2 * WINDOW - 1) + column[:, None] - column + largest_offset


def _neighbours(rows: int, columns: int, shift: int) -> Bool[np.ndarray, "window token token"]:
    """Marks the pairs of tokens of each shifted window that were neighbours before the roll joined opposite sides."""

    def section(length: int) -> Int[np.ndarray, " _"]:
        return np.repeat([0, 1, 2], [length - WINDOW, WINDOW - shift, shift])

    sections = 3 * section(rows)[:, None] + section(columns)
    split = sections.reshape(rows // WINDOW, WINDOW, columns // WINDOW, WINDOW).transpose(0, 2, 1, 3)
    windows = split.reshape(-1, WINDOW**2)
    return windows[:, :, None] == windows[:, None]
