"""Attention in tiles of queries and keys, whose memory grows with the instances and not with their pairs."""

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
    """FlashAttention (Dao et al. 2022) as two loops over tiles; the gradient recomputes the scores.

    Computes the same as `attend`, but the axes of keys and values are (instance, head) in place of (head, instance). A bag
    without unmasked instances gives zeros.

    Args:
      query: the queries.
      key: the keys.
      value: the values.
      mask: the instances that are attended to.
      tile: the largest number of queries and of keys in a tile.
    """
    if query.shape[1] <= tile[0] and key.shape[1] <= tile[1]:
        return attend(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), mask)
    return _tiled(query, key, value, mask, tile)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(query: Array, key: Array, value: Array, mask: Array, tile: tuple[int, int]) -> Array:
    return _tiled_forward(query, key, value, mask, tile)[0]


def _tiled_forward(query: Array, key: Array, value: Array, mask: Array, tile: tuple[int, int]) -> tuple[Array, tuple]:
    """Returns the attended values, and the residuals of the gradient: the inputs and the logarithm of each query's weight sum."""
    queries, keys, values = _by_head(query, tile[0]), _by_head(key, tile[1]), _by_head(value, tile[1])

    def attend_rows(rows: Array) -> tuple[Array, Array]:
        def add_columns(state: tuple, columns: tuple) -> tuple[tuple, None]:
            attended, highest, weight_sum = state
            key, value, valid = columns
            scores = _scores(rows, key, valid)
            # The running maximum keeps the exponentials from overflowing; earlier sums are rescaled to the new one.
            new_highest = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights, rescale = jnp.exp(scores - new_highest), jnp.exp(highest - new_highest)
            attended = attended * rescale + _einsum("bhqk,bhkc->bhqc", weights.astype(value.dtype), value)
            return (attended, new_highest, weight_sum * rescale + weights.sum(axis=-1, keepdims=True)), None

        zeros = jnp.zeros((*rows.shape[:-1], 1), jnp.float32)
        start = jnp.zeros(rows.shape, jnp.float32), zeros + jnp.finfo(jnp.float32).min, zeros
        columns = keys, values, split_blocks(mask, tile[1])
        (attended, highest, weight_sum), _ = jax.lax.scan(add_columns, start, columns)
        weight_sum = jnp.maximum(weight_sum, jnp.finfo(jnp.float32).tiny)
        return (attended / weight_sum).astype(rows.dtype), highest + jnp.log(weight_sum)

    by_block, log_weight_sum = jax.lax.map(attend_rows, queries)
    attended = _by_instance(by_block, query.shape[1])
    return attended, (queries, keys, values, mask, attended, log_weight_sum)


def _tiled_backward(tile: tuple[int, int], residuals: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
    queries, keys, values, mask, attended, log_weight_sum = residuals
    # The gradient of the softmax subtracts, for each query, the weighted mean of the gradients of its weights.
    mean = (gradient.astype(jnp.float32) * attended.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    rows = queries, _by_head(gradient, tile[0]), log_weight_sum, _by_head(mean, tile[0])
    valid, scale = split_blocks(mask, tile[1]), queries.shape[-1] ** -0.5

    def differentiate_columns(block: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Replaces a tile of keys and values by their gradients, which therefore need no further memory."""
        d_queries, keys, values = state
        key, value = keys[block], values[block]

        def add_row(state: tuple[Array, Array], row: tuple) -> tuple[tuple[Array, Array], Array]:
            (d_key, d_value), (query, gradient, log_weight_sum, mean, d_query) = state, row
            weights = jnp.exp(_scores(query, key, valid[block]) - log_weight_sum)
            d_value += _einsum("bhqk,bhqc->bhkc", weights.astype(gradient.dtype), gradient)
            d_scores = weights * (_einsum("bhqc,bhkc->bhqk", gradient, value) - mean)
            d_scores = d_scores.astype(query.dtype)
            d_key += _einsum("bhqk,bhqc->bhkc", d_scores, query)
            return (d_key, d_value), d_query + _einsum("bhqk,bhkc->bhqc", d_scores, key)

        zeros = jnp.zeros(key.shape, jnp.float32)
        (d_key, d_value), d_queries = jax.lax.scan(add_row, (zeros, zeros), (*rows, d_queries))
        keys = keys.at[block].set((d_key * scale).astype(keys.dtype))
        return d_queries, keys, values.at[block].set(d_value.astype(values.dtype))

    start = jnp.zeros(queries.shape, jnp.float32), keys, values
    d_queries, d_keys, d_values = jax.lax.fori_loop(0, len(keys), differentiate_columns, start)
    d_query = _by_instance(d_queries * scale, attended.shape[1]).astype(queries.dtype)
    return d_query, _by_instance(d_keys, mask.shape[1]), _by_instance(d_values, mask.shape[1]), None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _scores(query: Array, key: Array, valid: Array) -> Float32[Array, "batch head row instance"]:
    scores = _einsum("bhqc,bhkc->bhqk", query, key) * query.shape[-1] ** -0.5
    return jnp.where(valid[:, None, None], scores, -jnp.inf)


def _einsum(axes: str, left: Array, right: Array) -> Float32[Array, "batch head row column"]:
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def _by_head(
    values: Float[Array, "batch instance head channel"], largest: int
) -> Float[Array, "block batch head row channel"]:
    """Splits instances into blocks of at most `largest`, heads before instances."""
    return jnp.swapaxes(split_blocks(values, largest), 2, 3)


def _by_instance(
    blocks: Float[Array, "block batch head row channel"], count: int
) -> Float[Array, "batch instance head channel"]:
    """The inverse of `_by_head` for `count` instances."""
    return join_blocks(jnp.swapaxes(blocks, 2, 3), count)
