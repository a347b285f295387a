"""Convolutional tile encoders, ConvNeXt and ResNet; modules have the names of timm, so that its checkpoints fit."""

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
    """ConvNeXt (Liu 2022), by default ConvNeXt-T. Features are the normalised mean of the last stage."""

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
        input_widths = (None, *widths[:-1])
        self.stages = nnx.List(
            [
                _NextStage(inputs, width, depth, **kind)
                for inputs, width, depth in zip(input_widths, widths, depths, strict=True)
            ]
        )
        self.head = nnx.Dict({"norm": layer_norm(widths[-1], rngs=rngs)})

    def __call__(self, images: Float[Array, "tile y x 3"]) -> Float[Array, "tile feature"]:
        """Encodes normalised images, whose sides must be multiples of 32 px."""
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
        for layer in (*self.downsample, *self.blocks):
            maps = layer(maps)
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
    """ResNet (He 2016) of bottleneck blocks whose middle convolution has the stride; by default ResNet-50.

    Features are the mean of the last stage. `depths` lists the blocks of each stage; fewer entries omit the later stages.
    Three stages are the encoder of CLAM (Lu 2021), with 1,024 features.
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
        """Encodes normalised images."""
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
        for layer in self.downsample:
            residual = layer(residual)
        maps = jax.nn.relu(self.bn1(self.conv1(maps)))
        maps = jax.nn.relu(self.bn2(self.conv2(maps)))
        return jax.nn.relu(residual + self.bn3(self.conv3(maps)))


@dataclass(frozen=True)
class Batch:
    """The tiles whose statistics BatchNorm uses.

    Attributes:
      valid: the valid tiles of this device.
      count: the number of valid tiles of all devices.
      axes: the mesh axes over which the encoder is mapped; statistics are summed over them.
    """

    valid: Bool[Array, " tile"]
    count: Float32[Array, ""]
    axes: tuple[str, ...]

    def mean(self, maps: Float32[Array, "tile row column feature"]) -> Float32[Array, " feature"]:
        """The mean over all pixels of the maps of all valid tiles."""
        summed = jnp.where(self.valid[:, None, None, None], maps, 0.0).sum(axis=(0, 1, 2))
        return jax.lax.psum(summed, self.axes) / jnp.maximum(self.pixels(maps), 1.0)

    def pixels(self, maps: Float32[Array, "tile row column feature"]) -> Float32[Array, ""]:
        """The number of these pixels."""
        return self.count * (maps.shape[1] * maps.shape[2])


class BatchNorm(nnx.BatchNorm):
    """BatchNorm in float32 that uses its running statistics, or the statistics of `batch` if that is set.

    With a batch, its mean and variance replace the stored ones after the call; the stored variance is unbiased, as in torch's
    running average.
    """

    batch: Batch | None = None

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, use_running_average=True, dtype=jnp.float32, rngs=rngs)

    def __call__(  # type: ignore[override]
        self, maps: Float[Array, "tile row column feature"]
    ) -> Float32[Array, "tile row column feature"]:
        """Normalises maps."""
        if self.batch is None:
            return super().__call__(maps)
        maps = maps.astype(jnp.float32)
        # nnx.BatchNorm averages the means of the devices without regard to their numbers of valid tiles, and computes the
        # variance from the mean of squares, which loses digits where features vary little.
        self.mean[...] = mean = self.batch.mean(maps)
        self.var[...] = var = self.batch.mean(jnp.square(maps - mean))
        normalised, pixels = super().__call__(maps), self.batch.pixels(maps)
        self.var[...] = var * pixels / jnp.maximum(pixels - 1.0, 1.0)
        return normalised


def use_batch_statistics(module: nnx.Module, batch: Batch) -> None:
    """Makes all BatchNorm layers of a module use the statistics of a batch."""
    for _, submodule in nnx.iter_modules(module):
        if isinstance(submodule, BatchNorm):
            submodule.batch = batch


def convolution(inputs: int, outputs: int, side: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    """A square convolution without bias that pads all sides equally, as torch does; "SAME" with a stride pads only the end."""
    padding = ((side // 2, side // 2),) * 2
    return nnx.Conv(
        inputs, outputs, (side, side), strides=(stride, stride), padding=padding, use_bias=False, dtype=dtype, rngs=rngs
    )
