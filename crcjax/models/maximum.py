"""The maximum along an axis, with a gradient that any compiler keeps finite."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def maximum_along(values: Float[Array, "*axes"], axis: int) -> Float[Array, "*axes_but_one"]:
    """The maximum along one axis, which the result lacks. Equal largest values share the gradient equally, as with jnp.max.

    jnp.max divides the gradient by the number of values that equal the maximum. XLA may compute the values once for the
    maximum and once more, rounded differently, for the comparison. None is equal then, and the gradient is infinite. Here the
    place of the maximum counts as equal in any case.
    """
    return values.max(axis=axis)


@maximum_along.defjvp
def _tangent(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (values,), (tangent,) = primals, tangents
    largest, first = maximum_along(values, axis), jnp.argmax(values, axis=axis, keepdims=True)
    at_first = jax.lax.broadcasted_iota(first.dtype, values.shape, axis % values.ndim) == first
    shares = at_first | (values == jnp.expand_dims(largest, axis))
    return largest, jnp.where(shares, tangent, 0).sum(axis=axis) / shares.sum(axis=axis)
