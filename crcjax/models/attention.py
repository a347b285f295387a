"""Attention scores for pooling, and self-attention between instances with rotary position embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.backend import get_backend
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from crcjax.models.linear import Linear

Remat = Callable[..., Any]
# Rematerialisation policies of config.model.remat, applied to each block of a loop, where prevent_cse is not needed.
REMAT: dict[str, Remat] = {
    "full": partial(jax.checkpoint, prevent_cse=False),
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False),
    "none": lambda block_fn: block_fn,
}


class AttentionScores(nnx.Module):
    """Attention scores before the softmax, one per branch and instance (Ilse et al. 2018, equation 8; 9 if `gated`).

    The last layer has no bias, since the softmax would cancel it.
    """

    def __init__(self, features: int, hidden: int, branches: int, *, gated: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        # One matrix product computes content and gate, so that the features, the largest operand, are read once.
        self.gated = gated
        self.hidden = Linear(features, 2 * hidden if gated else hidden, dtype=dtype, rngs=rngs)
        self.score = Linear(hidden, branches, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "*bag instance feature"]) -> Float32[Array, "*bag instance branch"]:
        hidden = self.hidden(features)
        if self.gated:
            content, gate = jnp.split(hidden, 2, axis=-1)
            return self.score(jnp.tanh(content) * jax.nn.sigmoid(gate)).astype(jnp.float32)
        return self.score(jnp.tanh(hidden)).astype(jnp.float32)


def masked_softmax(
    scores: Float32[Array, "*bag instance branch"], mask: Bool[Array, "*bag instance"]
) -> Float32[Array, "*bag instance branch"]:
    """Softmax over unmasked instances; a bag without any gets zeros, not NaN."""
    unmasked = mask[..., None]
    weights = jnp.where(unmasked, jax.nn.softmax(jnp.where(unmasked, scores, jnp.finfo(jnp.float32).min), axis=-2), 0.0)
    return weights / jnp.maximum(weights.sum(axis=-2, keepdims=True), jnp.finfo(jnp.float32).tiny)


def rotary(
    values: Float[Array, "*bag instance head channel"], position: Float32[Array, "*bag instance 2"], longest: float
) -> Float[Array, "*bag instance head channel"]:
    """Rotary position embedding (Su et al. 2021, equation 34): products of two values depend on relative positions only.

    Half of the channels encode x, the other half y.

    Args:
      values: queries or keys; the channels must be a multiple of 4.
      position: (x, y) of each instance.
      longest: wavelengths range from 2 pi to 2 pi `longest` units of `position`.
    """
    pairs = values.shape[-1] // 4
    frequency = longest ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angle = (position[..., None] * frequency).reshape(*position.shape[:-1], 1, 2 * pairs)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(values.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.astype(values.dtype)


def attend(
    query: Float[Array, "batch query head channel"],
    key: Float[Array, "batch head instance channel"],
    value: Float[Array, "batch head instance channel"],
    mask: Bool[Array, "batch instance"],
) -> Float[Array, "batch query head channel"]:
    """Softmax attention of the queries over unmasked instances."""
    scores = jnp.einsum("bqhc,bhkc->bhqk", query, key).astype(jnp.float32) * query.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhqk,bhkc->bqhc", jax.nn.softmax(scores).astype(value.dtype), value)


def attention_kernel(dtype: DTypeLike, channels: int) -> Literal["cudnn", "xla"] | None:
    """The implementation of jax.nn.dot_product_attention that stores no scores in memory; None if this device has none.

    cuDNN has one for NVIDIA GPUs of compute capability 8 or more, 16-bit types and up to 128 channels per head.
    """
    if "cuda" not in get_backend().platform_version or jnp.dtype(dtype).itemsize != 2 or channels % 8 or channels > 128:
        return None
    return "cudnn" if float(jax.local_devices()[0].compute_capability) >= 8 else None


def attend_on_chip(
    query: Float[Array, "batch instance head channel"],
    key: Float[Array, "batch instance head channel"],
    value: Float[Array, "batch instance head channel"],
    count: Int[Array, " batch"],
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "batch instance head channel"]:
    """Softmax attention of all instances over the first `count` (at least one) by an `attention_kernel`."""
    instances = query.shape[1]
    # cuDNN's gradient needs an even number of instances.
    padding = ((0, 0), (0, -instances % 8), (0, 0), (0, 0))
    query, key, value = (jnp.pad(array, padding) for array in (query, key, value))
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=jnp.full_like(count, query.shape[1]),
        key_value_seq_lengths=jnp.maximum(count, 1),
        implementation=implementation,
    )[:, :instances]


def in_blocks(
    block_fn: Callable[..., tuple[Shaped[Array, "batch row ..."], ...]],
    largest: int,
    *arrays: Shaped[Array, "batch instance ..."],
    remat: Remat = REMAT["full"],
) -> tuple[Shaped[Array, "batch instance ..."], ...]:
    """Applies a function to blocks of instances, one block after the other, and joins the results.

    With several blocks, the backward pass recomputes everything except the results and the values that `remat` saves.

    Args:
      block_fn: maps the same block of every array to results with the same leading axes.
      largest: the largest number of instances in a block.
      arrays: the instances of every bag.
      remat: the rematerialisation policy.
    """
    count = arrays[0].shape[1]
    if count <= largest:
        return block_fn(*arrays)
    rematerialised_fn = remat(block_fn)
    blocks = tuple(split_blocks(array, largest) for array in arrays)
    results = jax.lax.map(lambda block: rematerialised_fn(*block), blocks)
    return tuple(join_blocks(result, count) for result in results)


def split_blocks(values: Shaped[Array, "batch instance ..."], largest: int) -> Shaped[Array, "block batch row ..."]:
    """Splits the instances into blocks of equal size, at most `largest`, padded with zeros."""
    batch, count = values.shape[:2]
    blocks = -(-count // largest)
    size = -(-count // blocks)
    padded = jnp.pad(values, ((0, 0), (0, blocks * size - count), *[(0, 0)] * (values.ndim - 2)))
    # Every block takes instances from the entire bag, so that all devices that share the bag work on every block.
    return jnp.moveaxis(padded.reshape(batch, size, blocks, *values.shape[2:]), 2, 0)


def join_blocks(blocks: Shaped[Array, "block batch row ..."], count: int) -> Shaped[Array, "batch instance ..."]:
    """The inverse of `split_blocks` for `count` instances."""
    by_instance = jnp.moveaxis(blocks, 0, 2)
    return by_instance.reshape(by_instance.shape[0], -1, *by_instance.shape[3:])[:, :count]
