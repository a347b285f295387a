"""Attention in tiles: memory that grows with the instances, not with their pairs, and a gradient that recomputes scores."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from crcjax.models.attention import attend, join_blocks, split_blocks


def attend_in_tiles(
    query: Float[Array, "batch row head channel"],
    key: Float[Array, "batch instance head channel"],
    value: Float[Array, "batch instance head channel"],
    mask: Bool[Array, "batch instance"],
    tile: tuple[int, int],
) -> Float[Array, "batch row head channel"]:
    """`attend` in tiles of at most `tile` (queries, keys); the gradient recomputes the scores.

    FlashAttention (Dao et al. 2022) in two loops. The memory grows with the instances, not with their pairs. A bag without
    unmasked instances gives zeros. The axes of keys and values are instance, head; `attend` has head, instance.
    """
    if query.shape[1] <= tile[0] and key.shape[1] <= tile[1]:
        return attend(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), mask)
    return _tiled(query, key, value, mask, tile)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(query: Array, key: Array, value: Array, mask: Array, tile: tuple[int, int]) -> Array:
    return _tiled_forward(query, key, value, mask, tile)[0]


def _tiled_forward(query: Array, key: Array, value: Array, mask: Array, tile: tuple[int, int]) -> tuple[Array, tuple]:
    """The attended values and, for the gradient, the inputs and the logarithm of each query's sum of weights."""
    queries, keys, values = _by_head(query, tile[0]), _by_head(key, tile[1]), _by_head(value, tile[1])

    def of_rows(rows: Array) -> tuple[Array, Array]:
        def add(state: tuple, columns: tuple) -> tuple[tuple, None]:
            attended, top, total = state
            key, value, valid = columns
            scores = _scores(rows, key, valid)
            higher = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
            weights, shrunk = jnp.exp(scores - higher), jnp.exp(top - higher)
            attended = attended * shrunk + _einsum("bhqk,bhkc->bhqc", weights.astype(value.dtype), value)
            return (attended, higher, total * shrunk + weights.sum(axis=-1, keepdims=True)), None

        nothing = jnp.zeros((*rows.shape[:-1], 1), jnp.float32)
        first = jnp.zeros(rows.shape, jnp.float32), nothing + jnp.finfo(jnp.float32).min, nothing
        (attended, top, total), _ = jax.lax.scan(add, first, (keys, values, split_blocks(mask, tile[1])))
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (attended / total).astype(rows.dtype), top + jnp.log(total)

    by_block, log_total = jax.lax.map(of_rows, queries)
    attended = _by_instance(by_block, query.shape[1])
    return attended, (queries, keys, values, mask, attended, log_total)


def _tiled_backward(tile: tuple[int, int], residuals: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
    queries, keys, values, mask, attended, log_total = residuals
    # For each query, the weighted mean of its weights' gradients, which the softmax's gradient subtracts.
    mean = (gradient.astype(jnp.float32) * attended.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    rows = queries, _by_head(gradient, tile[0]), log_total, _by_head(mean, tile[0])
    valid, scale = split_blocks(mask, tile[1]), queries.shape[-1] ** -0.5

    def of_columns(block: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """The gradients of a tile of keys and values overwrite the tile, so that they need no memory of their own."""
        of_queries, keys, values = state
        key, value = keys[block], values[block]

        def add(state: tuple[Array, Array], row: tuple) -> tuple[tuple[Array, Array], Array]:
            (of_key, of_value), (query, gradient, log_total, mean, of_query) = state, row
            weights = jnp.exp(_scores(query, key, valid[block]) - log_total)
            of_value += _einsum("bhqk,bhqc->bhkc", weights.astype(gradient.dtype), gradient)
            of_scores = weights * (_einsum("bhqc,bhkc->bhqk", gradient, value) - mean)
            of_scores = of_scores.astype(query.dtype)
            of_key += _einsum("bhqk,bhqc->bhkc", of_scores, query)
            return (of_key, of_value), of_query + _einsum("bhqk,bhkc->bhqc", of_scores, key)

        nothing = jnp.zeros(key.shape, jnp.float32)
        (of_key, of_value), of_queries = jax.lax.scan(add, (nothing, nothing), (*rows, of_queries))
        keys = keys.at[block].set((of_key * scale).astype(keys.dtype))
        return of_queries, keys, values.at[block].set(of_value.astype(values.dtype))

    first = jnp.zeros(queries.shape, jnp.float32), keys, values
    of_queries, of_keys, of_values = jax.lax.fori_loop(0, len(keys), of_columns, first)
    of_query = _by_instance(of_queries * scale, attended.shape[1]).astype(queries.dtype)
    return of_query, _by_instance(of_keys, mask.shape[1]), _by_instance(of_values, mask.shape[1]), None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _scores(query: Array, key: Array, valid: Array) -> Float32[Array, "batch head row instance"]:
    scores = _einsum("bhqc,bhkc->bhqk", query, key) * query.shape[-1] ** -0.5
    return jnp.where(valid[:, None, None], scores, -jnp.inf)


def _einsum(axes: str, one: Array, other: Array) -> Float32[Array, "batch head some other"]:
    return jnp.einsum(axes, one, other, preferred_element_type=jnp.float32)


def _by_head(
    part: Float[Array, "batch instance head channel"], largest: int
) -> Float[Array, "block batch head some channel"]:
    return jnp.swapaxes(split_blocks(part, largest), 2, 3)


def _by_instance(
    blocks: Float[Array, "block batch head some channel"], count: int
) -> Float[Array, "batch instance head channel"]:
    return join_blocks(jnp.swapaxes(blocks, 2, 3), count)
