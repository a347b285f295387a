"""Convolutional tile encoders, ConvNeXt and ResNet, with the parts' names of timm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32

from crcjax.models.encoders.vit import MLP, layer_norm


class ConvNeXt(nnx.Module):
    """ConvNeXt (Liu 2022); by default its tiny shape. Features are the normed mean of the last stage."""

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        stem = nnx.Conv(3, widths[0], (4, 4), strides=(4, 4), padding="VALID", **kind)
        self.stem = nnx.List([stem, layer_norm(widths[0], rngs=rngs)])
        before = (None, *widths[:-1])
        self.stages = nnx.List(
            [
                _NextStage(inputs, width, depth, **kind)
                for inputs, width, depth in zip(before, widths, depths, strict=True)
            ]
        )
        self.head = nnx.Dict({"norm": layer_norm(widths[-1], rngs=rngs)})

    def __call__(self, images: Float[Array, "tile y x 3"]) -> Float[Array, "tile feature"]:
        """Features of normalised images, whose sides are multiples of 32 px."""
        maps = self.stem[1](self.stem[0](images))
        for stage in self.stages:
            maps = stage(maps)
        return self.head["norm"](maps.mean(axis=(1, 2)))


class _NextStage(nnx.Module):
    def __init__(self, inputs: int | None, width: int, depth: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        halve = [] if inputs is None else [layer_norm(inputs, rngs=rngs), _halving(inputs, width, **kind)]
        self.downsample = nnx.List(halve)
        self.blocks = nnx.List([_NextBlock(width, **kind) for _ in range(depth)])

    def __call__(self, maps: Float[Array, "tile row column feature"]) -> Float[Array, "tile _ _ _"]:
        for part in (*self.downsample, *self.blocks):
            maps = part(maps)
        return maps


def _halving(inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (2, 2), strides=(2, 2), padding="VALID", dtype=dtype, rngs=rngs)


class _NextBlock(nnx.Module):
    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.conv_dw = nnx.Conv(width, width, (7, 7), padding=((3, 3), (3, 3)), feature_group_count=width, **kind)
        self.norm = layer_norm(width, rngs=rngs)
        self.mlp = MLP(width, 4 * width, **kind)
        self.gamma = nnx.Param(jnp.full(width, 1e-6))

    def __call__(self, maps: Float[Array, "tile row column feature"]) -> Float[Array, "tile row column feature"]:
        return maps + self.gamma[...] * self.mlp(self.norm(self.conv_dw(maps)))


class ResNet(nnx.Module):
    """ResNet (He 2016) of bottlenecks that halve in their middle; by default ResNet-50. Features are the last stage's mean.

    With fewer `depths` the later stages are left out: three are the encoder of CLAM (Lu 2021), 1,024 features.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.conv1 = convolution(3, width, 7, 2, **kind)
        self.bn1 = BatchNorm(width, rngs=rngs)
        self.stages, inputs = len(depths), width
        for stage, depth in enumerate(depths):
            thin = width * 2**stage
            strides = [2 if stage and not block else 1 for block in range(depth)]
            widths = [inputs, *[4 * thin] * (depth - 1)]
            blocks = [_Bottleneck(wide, thin, stride, **kind) for wide, stride in zip(widths, strides, strict=True)]
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
            inputs = 4 * thin

    def __call__(self, images: Float[Array, "tile y x 3"]) -> Float[Array, "tile feature"]:
        """Features of normalised images."""
        maps = jax.nn.relu(self.bn1(self.conv1(images)))
        maps = nnx.max_pool(maps, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in range(self.stages):
            for block in getattr(self, f"layer{stage + 1}"):
                maps = block(maps)
        return maps.mean(axis=(1, 2))


class _Bottleneck(nnx.Module):
    def __init__(self, inputs: int, width: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.conv1, self.bn1 = convolution(inputs, width, 1, 1, **kind), BatchNorm(width, rngs=rngs)
        self.conv2, self.bn2 = convolution(width, width, 3, stride, **kind), BatchNorm(width, rngs=rngs)
        self.conv3, self.bn3 = convolution(width, 4 * width, 1, 1, **kind), BatchNorm(4 * width, rngs=rngs)
        changes = stride > 1 or inputs != 4 * width
        project = [convolution(inputs, 4 * width, 1, stride, **kind), BatchNorm(4 * width, rngs=rngs)]
        self.downsample = nnx.List(project if changes else [])

    def __call__(self, maps: Float[Array, "tile row column feature"]) -> Float[Array, "tile _ _ _"]:
        residual = maps
        for part in self.downsample:
            residual = part(residual)
        maps = jax.nn.relu(self.bn1(self.conv1(maps)))
        maps = jax.nn.relu(self.bn2(self.conv2(maps)))
        return jax.nn.relu(residual + self.bn3(self.conv3(maps)))


@dataclass(frozen=True)
class Batch:
    """What batch norms take their statistics of: the valid tiles, `count` on all devices.

    `axes` are those of the mesh along which the tiles are mapped, not divided by the partitioner.
    """

    valid: Bool[Array, " tile"]
    count: Float32[Array, ""]
    axes: tuple[str, ...]

    def mean(self, maps: Float32[Array, "tile row column feature"]) -> Float32[Array, " feature"]:
        """The mean over all places of the valid tiles."""
        summed = jnp.where(self.valid[:, None, None, None], maps, 0.0).sum(axis=(0, 1, 2))
        return jax.lax.psum(summed, self.axes) / jnp.maximum(self.places(maps), 1.0)

    def places(self, maps: Float32[Array, "tile row column feature"]) -> Float32[Array, ""]:
        """How many those are."""
        return self.count * (maps.shape[1] * maps.shape[2])


class BatchNorm(nnx.BatchNorm):
    """A batch norm, in float32, by the mean and variance that it holds; or of a batch, if it is given one, by the batch's.

    These it holds from then on; the variance without bias, as torch does for its running average.
    """

    batch: Batch | None = None

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, use_running_average=True, dtype=jnp.float32, rngs=rngs)

    def __call__(  # type: ignore[override]
        self, maps: Float[Array, "tile row column feature"]
    ) -> Float32[Array, "tile row column feature"]:
        """Normed maps."""
        if self.batch is None:
            return super().__call__(maps)
        maps = maps.astype(jnp.float32)
        # Not by nnx's own: its mean over devices is of their means, whatever the number of valid tiles of each. And not
        # by the mean of squares, which loses the digits of what varies little.
        self.mean[...] = mean = self.batch.mean(maps)
        self.var[...] = var = self.batch.mean(jnp.square(maps - mean))
        normed, places = super().__call__(maps), self.batch.places(maps)
        self.var[...] = var * places / jnp.maximum(places - 1.0, 1.0)
        return normed


def by_batch(module: nnx.Module, batch: Batch) -> None:
    """Has all batch norms within a module norm by the statistics of a batch."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, BatchNorm):
            part.batch = batch


def convolution(inputs: int, outputs: int, side: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    """A square convolution without biases that pads all sides alike, as torch does; "SAME" pads a strided one at its end."""
    padding = ((side // 2, side // 2),) * 2
    return nnx.Conv(
        inputs, outputs, (side, side), strides=(stride, stride), padding=padding, use_bias=False, dtype=dtype, rngs=rngs
    )
