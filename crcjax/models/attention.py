"""Attention: scores that pool instances, and attention between them with positions."""

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
# How what is computed in parts, one after the other, is made ready for the backward pass. A loop keeps them apart.
REMAT: dict[str, Remat] = {
    "full": partial(jax.checkpoint, prevent_cse=False),
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False),
    "none": lambda part: part,
}


class AttentionScores(nnx.Module):
    """A score a branch for every instance (Ilse et al. 2018: equation 8, or 9 if `gated`), before the softmax.

    The last layer has no bias, which the softmax would cancel.
    """

    def __init__(self, features: int, hidden: int, branches: int, *, gated: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        # Content and gate are one product, so that the features, by far the most to read, are read once.
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
    """Softmax over unmasked instances; all zeros, not NaN, for a bag that has none."""
    held = mask[..., None]
    weights = jnp.where(held, jax.nn.softmax(jnp.where(held, scores, jnp.finfo(jnp.float32).min), axis=-2), 0.0)
    return weights / jnp.maximum(weights.sum(axis=-2, keepdims=True), jnp.finfo(jnp.float32).tiny)


def rotary(
    values: Float[Array, "*bag instance head channel"], position: Float32[Array, "*bag instance 2"], longest: float
) -> Float[Array, "*bag instance head channel"]:
    """Values turned by their (x, y), so that products of two depend on where they lie to each other alone.

    Rotary position embedding (Su et al. 2021, equation 34) with half of the channels for x and half for y; wavelengths
    run from 2 pi to 2 pi `longest` units of `position`. The channels are a multiple of 4.
    """
    pairs = values.shape[-1] // 4
    frequency = longest ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angle = (position[..., None] * frequency).reshape(*position.shape[:-1], 1, 2 * pairs)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(values.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(values.dtype)


def attend(
    query: Float[Array, "batch some head channel"],
    key: Float[Array, "batch head instance channel"],
    value: Float[Array, "batch head instance channel"],
    mask: Bool[Array, "batch instance"],
) -> Float[Array, "batch some head channel"]:
    """Softmax attention of some queries over unmasked instances."""
    scores = jnp.einsum("bqhc,bhkc->bhqk", query, key).astype(jnp.float32) * query.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhqk,bhkc->bqhc", jax.nn.softmax(scores).astype(value.dtype), value)


def kernel(dtype: DTypeLike, channels: int) -> Literal["cudnn", "xla"] | None:
    """The implementation of jax.nn.dot_product_attention that keeps the scores on the chip of this device, if one does.

    cuDNN's, on NVIDIA GPUs of compute capability 8 or more, of 16 bits and up to 128 channels a head.
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
    """Softmax attention of all instances over the first `count`, at least one, with a kernel that keeps no scores."""
    instances = query.shape[1]
    # cuDNN's gradient wants an even number of them.
    padding = ((0, 0), (0, -instances % 8), (0, 0), (0, 0))
    query, key, value = (jnp.pad(part, padding) for part in (query, key, value))
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=jnp.full_like(count, query.shape[1]),
        key_value_seq_lengths=jnp.maximum(count, 1),
        implementation=implementation,
    )[:, :instances]


def in_blocks(
    each: Callable[..., tuple[Shaped[Array, "batch some ..."], ...]],
    largest: int,
    *rows: Shaped[Array, "batch instance ..."],
    remat: Remat = REMAT["full"],
) -> tuple[Shaped[Array, "batch instance ..."], ...]:
    """What `each` makes of some instances of every bag, at most `largest` at a time.

    Of several blocks nothing that it computes is kept but what it returns, and what `remat` says: it is made again in the
    backward pass.
    """
    count = rows[0].shape[1]
    if count <= largest:
        return each(*rows)
    one = remat(each)
    found = jax.lax.map(lambda some: one(*some), tuple(_split(part, largest) for part in rows))
    return tuple(_joined(part, count) for part in found)


def _split(part: Shaped[Array, "batch instance ..."], largest: int) -> Shaped[Array, "block batch some ..."]:
    """At most `largest` instances a block, filled up with zeros."""
    batch, count = part.shape[:2]
    blocks = -(-count // largest)
    size = -(-count // blocks)
    padded = jnp.pad(part, ((0, 0), (0, blocks * size - count), *[(0, 0)] * (part.ndim - 2)))
    # Every block takes instances from all over the bag, so that where devices share the bag, each has a part of each.
    return jnp.moveaxis(padded.reshape(batch, size, blocks, *part.shape[2:]), 2, 0)


def _joined(blocks: Shaped[Array, "block batch some ..."], count: int) -> Shaped[Array, "batch instance ..."]:
    """What `_split` split."""
    by_instance = jnp.moveaxis(blocks, 0, 2)
    return by_instance.reshape(by_instance.shape[0], -1, *by_instance.shape[3:])[:, :count]


def attend_in_tiles(
    query: Float[Array, "batch row head channel"],
    key: Float[Array, "batch instance head channel"],
    value: Float[Array, "batch instance head channel"],
    mask: Bool[Array, "batch instance"],
    tile: tuple[int, int],
) -> Float[Array, "batch row head channel"]:
    """`attend`, of at most so many queries and keys at a time, whose scores are made again for the gradient.

    FlashAttention (Dao et al. 2022) in two loops. Kept is what grows with the instances, nothing with their pairs.
    A bag without instances gives zeros. Keys and values come by instance, not by head.
    """
    if query.shape[1] <= tile[0] and key.shape[1] <= tile[1]:
        return attend(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), mask)
    return _tiled(query, key, value, mask, tile)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(query: Array, key: Array, value: Array, mask: Array, tile: tuple[int, int]) -> Array:
    return _tiled_forward(query, key, value, mask, tile)[0]


def _tiled_forward(query: Array, key: Array, value: Array, mask: Array, tile: tuple[int, int]) -> tuple[Array, tuple]:
    """What is seen, and for the gradient what it was made of and each query's logarithm of its sum of weights."""
    queries, keys, values = _by_head(query, tile[0]), _by_head(key, tile[1]), _by_head(value, tile[1])

    def of_rows(rows: Array) -> tuple[Array, Array]:
        def add(state: tuple, columns: tuple) -> tuple[tuple, None]:
            seen, top, total = state
            key, value, held = columns
            scores = _scores(rows, key, held)
            higher = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
            weights, shrunk = jnp.exp(scores - higher), jnp.exp(top - higher)
            seen = seen * shrunk + _product("bhqk,bhkc->bhqc", weights.astype(value.dtype), value)
            return (seen, higher, total * shrunk + weights.sum(axis=-1, keepdims=True)), None

        nothing = jnp.zeros((*rows.shape[:-1], 1), jnp.float32)
        first = jnp.zeros(rows.shape, jnp.float32), nothing + jnp.finfo(jnp.float32).min, nothing
        (seen, top, total), _ = jax.lax.scan(add, first, (keys, values, _split(mask, tile[1])))
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (seen / total).astype(rows.dtype), top + jnp.log(total)

    by_block, log_total = jax.lax.map(of_rows, queries)
    seen = _by_instance(by_block, query.shape[1])
    return seen, (queries, keys, values, mask, seen, log_total)


def _tiled_backward(tile: tuple[int, int], kept: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
    queries, keys, values, mask, seen, log_total = kept
    # Of each query the mean of its weights' gradients, which the softmax takes from them.
    mean = (gradient.astype(jnp.float32) * seen.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    rows = queries, _by_head(gradient, tile[0]), log_total, _by_head(mean, tile[0])
    held, scale = _split(mask, tile[1]), queries.shape[-1] ** -0.5

    def of_columns(block: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """The gradients of a tile of keys and values take its place, so that they need no memory of their own."""
        of_queries, keys, values = state
        key, value = keys[block], values[block]

        def add(state: tuple[Array, Array], row: tuple) -> tuple[tuple[Array, Array], Array]:
            (of_key, of_value), (query, gradient, log_total, mean, of_query) = state, row
            weights = jnp.exp(_scores(query, key, held[block]) - log_total)
            of_value += _product("bhqk,bhqc->bhkc", weights.astype(gradient.dtype), gradient)
            of_scores = weights * (_product("bhqc,bhkc->bhqk", gradient, value) - mean)
            of_scores = of_scores.astype(query.dtype)
            of_key += _product("bhqk,bhqc->bhkc", of_scores, query)
            return (of_key, of_value), of_query + _product("bhqk,bhkc->bhqc", of_scores, key)

        nothing = jnp.zeros(key.shape, jnp.float32)
        (of_key, of_value), of_queries = jax.lax.scan(add, (nothing, nothing), (*rows, of_queries))
        keys = keys.at[block].set((of_key * scale).astype(keys.dtype))
        return of_queries, keys, values.at[block].set(of_value.astype(values.dtype))

    first = jnp.zeros(queries.shape, jnp.float32), keys, values
    of_queries, of_keys, of_values = jax.lax.fori_loop(0, len(keys), of_columns, first)
    of_query = _by_instance(of_queries * scale, seen.shape[1]).astype(queries.dtype)
    return of_query, _by_instance(of_keys, mask.shape[1]), _by_instance(of_values, mask.shape[1]), None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _scores(query: Array, key: Array, held: Array) -> Float32[Array, "batch head row instance"]:
    scores = _product("bhqc,bhkc->bhqk", query, key) * query.shape[-1] ** -0.5
    return jnp.where(held[:, None, None], scores, -jnp.inf)


def _product(axes: str, one: Array, other: Array) -> Float32[Array, "batch head some other"]:
    return jnp.einsum(axes, one, other, preferred_element_type=jnp.float32)


def _by_head(
    part: Float[Array, "batch instance head channel"], largest: int
) -> Float[Array, "block batch head some channel"]:
    return jnp.swapaxes(_split(part, largest), 2, 3)


def _by_instance(
    blocks: Float[Array, "block batch head some channel"], count: int
) -> Float[Array, "batch instance head channel"]:
    return _joined(jnp.swapaxes(blocks, 2, 3), count)
