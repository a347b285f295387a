"""Vision transformers; modules have the names of timm, so that its checkpoints fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from crcjax.models.attention import attend_on_chip, attention_kernel


def layer_norm(width: int, *, epsilon: float = 1e-6, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in float32 that subtracts the mean before it computes the variance, as torch does: E[x²] - E[x]² loses digits."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


def linear_layer(
    inputs: int, outputs: int, *, use_bias: bool = True, narrow: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer that multiplies in `dtype` and sums in float32; its outputs are float32, with `narrow` of `dtype`."""
    kind: dict[str, Any] = {"dtype": dtype, "preferred_element_type": dtype if narrow else jnp.float32, "rngs": rngs}
    return nnx.Linear(inputs, outputs, use_bias=use_bias, **kind)


def product(
    inputs: Float[Array, "*place feature"],
    kernel: Float[Array, "feature output"],
    bias: Float[Array, " output"] | float,
    dtype: DTypeLike,
) -> Float32[Array, "*place output"]:
    """A linear layer as a function: multiplies in `dtype`, sums in float32, and adds the bias."""
    return jnp.matmul(inputs.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32) + bias


class LayerScale(nnx.Module):
    """Scales each output feature of a linear layer (Touvron et al. 2021, CaiT).

    The factors multiply the layer's kernel and bias, so that GPUs fuse the product with the addition to the tokens.
    """

    def __init__(self, width: int):
        self.gamma = nnx.Param(jnp.full(width, 1e-5))

    def __call__(self, layer: nnx.Linear, inputs: Float[Array, "*place feature"]) -> Float32[Array, "*place output"]:
        gamma = self.gamma[...]
        bias = 0.0 if layer.bias is None else layer.bias[...] * gamma
        return product(inputs, layer.kernel[...] * gamma, bias, layer.dtype or jnp.float32)


def _unscaled(layer: nnx.Linear, inputs: Array) -> Array:
    return layer(inputs)


class MLP(nnx.Module):
    """Two linear layers with GELU or SwiGLU (Shazeer 2020) between them; with SwiGLU, `hidden` counts gates and values."""

    def __init__(self, width: int, hidden: int, *, swiglu: bool = False, dtype: DTypeLike, rngs: nnx.Rngs):
        self.swiglu = swiglu
        self.fc1 = linear_layer(width, hidden, narrow=True, dtype=dtype, rngs=rngs)
        self.fc2 = linear_layer(hidden // 2 if swiglu else hidden, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "*token feature"], scale: Callable[..., Array] = _unscaled
    ) -> Float[Array, "*token feature"]:
        hidden = self.fc1(tokens).astype(jnp.float32)
        if self.swiglu:
            gate, value = jnp.split(hidden, 2, axis=-1)
            return scale(self.fc2, jax.nn.silu(gate) * value)
        # jax.nn.gelu uses erfc, which keeps more digits of results near zero. The following sums lose them, and erfc takes
        # GPUs twice as long.
        return scale(self.fc2, hidden * (0.5 + 0.5 * jax.lax.erf(hidden * 0.5**0.5)))


def self_attention(
    qkv: Float[Array, "group token three_features"],
    heads: int,
    bias: Float[Array, "#group head token token"] | None = None,
) -> Float32[Array, "group token feature"]:
    """Softmax attention of each token over its group.

    On CPUs it is twice as fast as jax.nn.dot_product_attention, since heads precede tokens and the division comes last.

    Args:
      qkv: the queries, keys and values of all heads, one after the other.
      heads: the number of heads.
      bias: added to the scores.
    """
    groups, tokens, _ = qkv.shape
    query, key, value = qkv.reshape(groups, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scores = jnp.einsum("ghqc,ghkc->ghqk", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    attended = jnp.einsum("ghqk,ghkc->ghqc", weights.astype(qkv.dtype), value, preferred_element_type=jnp.float32)
    attended = attended / weights.sum(axis=-1, keepdims=True)
    return attended.transpose(0, 2, 1, 3).reshape(groups, tokens, -1)


class _Attention(nnx.Module):
    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads, self.dtype, self.fused = heads, dtype, True
        self.qkv = linear_layer(width, 3 * width, narrow=True, dtype=dtype, rngs=rngs)
        self.proj = linear_layer(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "tile token feature"], scale: Callable[..., Array]
    ) -> Float[Array, "tile token feature"]:
        qkv = self.qkv(tokens)
        tiles, count, width = tokens.shape
        if not (self.fused and (implementation := attention_kernel(self.dtype, width // self.heads))):
            return scale(self.proj, self_attention(qkv, self.heads))
        query, key, value = jnp.moveaxis(qkv.reshape(tiles, count, 3, self.heads, -1), 2, 0)
        attended = attend_on_chip(query, key, value, jnp.full(tiles, count), implementation)
        return scale(self.proj, attended.reshape(tokens.shape))


class _Block(nnx.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        swiglu: bool,
        layer_scale: bool,
        epsilon: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(width, epsilon=epsilon, rngs=rngs)
        self.attn = _Attention(width, heads, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = MLP(width, hidden, swiglu=swiglu, dtype=dtype, rngs=rngs)
        self.ls1, self.ls2 = (LayerScale(width), LayerScale(width)) if layer_scale else (_unscaled, _unscaled)

    def __call__(self, tokens: Float[Array, "tile token feature"]) -> Float[Array, "tile token feature"]:
        tokens = tokens + self.attn(self.norm1(tokens), self.ls1)
        return tokens + self.mlp(self.norm2(tokens), self.ls2)


class _PatchEmbed(nnx.Module):
    def __init__(self, patch_px: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        side = (patch_px, patch_px)
        self.proj = nnx.Conv(3, width, side, strides=side, padding="VALID", dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "tile y x 3"]) -> Float32[Array, "tile row column feature"]:
        # On GPUs a product of patches is ten times as fast as a convolution of three channels.
        weights, bias = self.proj.kernel[...], self.proj.bias
        patch, (tiles, height, width, _) = len(weights), images.shape
        split = images.reshape(tiles, height // patch, patch, width // patch, patch, 3).swapaxes(2, 3)
        pixels, weights = split.reshape(*split.shape[:3], -1), weights.reshape(-1, weights.shape[-1])
        return product(pixels, weights, 0.0 if bias is None else bias[...], self.proj.dtype or jnp.float32)


class ViT(nnx.Module):
    """A vision transformer (Dosovitskiy 2021), optionally with registers (Darcet 2024), LayerScale and SwiGLU.

    Args:
      patch_px: the side of a patch.
      width: the number of features of a token.
      depth: the number of blocks.
      heads: the number of attention heads.
      hidden: the width of the MLP's hidden layer.
      grid: the side, in patches, of the images on which the positions were learned. For another size, positions are
        interpolated as in timm (bicubic, antialiased).
      swiglu: SwiGLU in place of GELU.
      layer_scale: whether blocks have LayerScale.
      class_token: whether there is a class token.
      registers: the number of register tokens.
      embed_prefix: whether class and register tokens have positions.
      pool: the features: "class" for the class token, "mean" for the mean of the patches, normalised afterwards (timm's
        avg), "class_mean" for both, concatenated (Virchow).
      epsilon: of the LayerNorms.
      dtype: the type of the computation.
      rngs: the random keys of the initialisation.
    """

    def __init__(
        self,
        *,
        patch_px: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        grid: int,
        swiglu: bool = False,
        layer_scale: bool = False,
        class_token: bool = True,
        registers: int = 0,
        embed_prefix: bool = True,
        pool: str = "class",
        epsilon: float = 1e-6,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.grid, self.pool, self.patch_px, self.dtype = grid, pool, patch_px, dtype
        self.prefix = class_token + registers
        self.embed_prefix = embed_prefix
        self.patch_embed = _PatchEmbed(patch_px, width, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width))) if class_token else None
        self.reg_token = nnx.Param(jnp.zeros((1, registers, width))) if registers else None
        if pool not in ("class", "mean", "class_mean"):
            raise ValueError(f"pool must be class, mean or class_mean, got {pool!r}")
        places = grid**2 + self.prefix * embed_prefix
        self.pos_embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, places, width)))
        shape: dict[str, Any] = {
            "swiglu": swiglu,
            "layer_scale": layer_scale,
            "epsilon": epsilon,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.blocks = nnx.List([_Block(width, heads, hidden, **shape) for _ in range(depth)])
        norm = layer_norm(width, epsilon=epsilon, rngs=rngs)
        self.norm = norm if pool != "mean" else None
        self.fc_norm = norm if pool == "mean" else None

    def __call__(self, images: Float[Array, "tile y x 3"]) -> Float[Array, "tile feature"]:
        """Encodes normalised images, whose sides must be multiples of `patch_px`. Raises ValueError otherwise."""
        if images.shape[1] % self.patch_px or images.shape[2] % self.patch_px:
            raise ValueError(
                f"sides of images must be multiples of {self.patch_px} px, got {images.shape[2]} x {images.shape[1]}"
            )
        patches = self.patch_embed(images)
        tiles, height, width, _ = patches.shape
        tokens = patches.reshape(tiles, height * width, -1)
        positions = self._positions(height, width)
        tokens = tokens + positions[:, -height * width :]
        if self.prefix:
            prefix_tokens = [token[...] for token in (self.cls_token, self.reg_token) if token is not None]
            prefix = jnp.concatenate(prefix_tokens, axis=1)
            if self.embed_prefix:
                prefix = prefix + positions[:, : self.prefix]
            prefix = jnp.broadcast_to(prefix, (tiles, *prefix.shape[1:]))
            tokens = jnp.concatenate([prefix, tokens], axis=1)
        for block in self.blocks:
            tokens = block(tokens)
        if self.norm is not None:
            tokens = self.norm(tokens)
        first, mean = tokens[:, 0], tokens[:, self.prefix :].mean(axis=1)
        if self.fc_norm is not None:
            return self.fc_norm(mean)
        return first if self.pool == "class" else jnp.concatenate([first, mean], axis=-1)

    def _positions(self, height: int, width: int) -> Float[Array, "1 token feature"]:
        """The position embeddings for an image of `height` x `width` patches."""
        learned = self.pos_embed[...]
        if (height, width) == (self.grid, self.grid):
            return learned
        prefix = self.prefix * self.embed_prefix
        square = learned[:, prefix:].reshape(1, self.grid, self.grid, -1)
        resized = jax.image.resize(square, (1, height, width, square.shape[-1]), "cubic", antialias=True)
        return jnp.concatenate([learned[:, :prefix], resized.reshape(1, height * width, -1)], axis=1)
