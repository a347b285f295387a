"""Linear layers whose gradients are summed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32


class Linear(nnx.Linear):
    """As nnx.Linear, with `linear`'s gradients."""

    def __call__(self, inputs: Float[Array, "*place feature"]) -> Float[Array, "*place output"]:  # type: ignore[override]
        bias = None if self.bias is None else self.bias[...]
        return linear(inputs, self.kernel[...], bias, self.dtype or jnp.float32)


def linear(
    inputs: Float[Array, "*place feature"],
    kernel: Float32[Array, "feature output"],
    bias: Float32[Array, " output"] | None,
    dtype: DTypeLike,
) -> Float[Array, "*place output"]:
    """The product with the kernel, and the bias added, computed in `dtype`.

    The gradients of kernel and bias are float32 sums whatever `dtype` is. Of the plain product XLA has devices add up
    their parts of a gradient before it is converted: in bfloat16, with 8 bits.
    """
    return (_plain if dtype == jnp.float32 else _summed)(inputs.astype(dtype), kernel, bias)


def _plain(inputs: Array, kernel: Array, bias: Array | None) -> Array:
    found = inputs @ kernel.astype(inputs.dtype)
    return found if bias is None else found + bias.astype(inputs.dtype)


def _kept(inputs: Array, kernel: Array, bias: Array | None) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _plain(inputs, kernel, bias), (inputs, kernel, bias)


def _gradients(kept: tuple[Array, Array, Array | None], of: Array) -> tuple[Array, Array, Array | None]:
    inputs, kernel, bias = kept
    places = tuple(range(of.ndim - 1))
    by_kernel = jax.lax.dot_general(inputs, of, ((places, places), ((), ())), preferred_element_type=kernel.dtype)
    by_bias = None if bias is None else of.sum(places, dtype=bias.dtype)
    return of @ kernel.astype(of.dtype).T, by_kernel, by_bias


_summed = jax.custom_vjp(_plain)
_summed.defvjp(_kept, _gradients)
