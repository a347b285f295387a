"""Linear layers whose gradients are summed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

_NARROW = 512  # outputs up to which the kernel's gradient is faster turned over on CPUs, by 10 to 30 %


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

    The gradients of kernel and bias are float32 sums whatever `dtype` is. By the product's own gradient XLA has devices
    add up their parts before they are converted: in bfloat16, with 8 bits.
    """
    return _product(inputs.astype(dtype), kernel, bias)


def _plain(inputs: Array, kernel: Array, bias: Array | None) -> Array:
    found = inputs @ kernel.astype(inputs.dtype)
    return found if bias is None else found + bias.astype(inputs.dtype)


def _kept(inputs: Array, kernel: Array, bias: Array | None) -> tuple[Array, tuple[Array, Array, Array | None]]:
    # Not by `_product`, within which a policy of what is kept (config.model.remat) would not see the product.
    return _plain(inputs, kernel, bias), (inputs, kernel, bias)


def _gradients(kept: tuple[Array, Array, Array | None], of: Array) -> tuple[Array, Array, Array | None]:
    inputs, kernel, bias = kept
    by_bias = None if bias is None else of.sum(range(of.ndim - 1), dtype=bias.dtype)
    return of @ kernel.astype(of.dtype).T, _by_kernel(inputs, of, kernel.dtype), by_bias


def _by_kernel(inputs: Array, of: Array, dtype: DTypeLike) -> Array:
    places = tuple(range(of.ndim - 1))
    if jax.default_backend() == "cpu" and of.shape[-1] <= _NARROW:
        turned, after = jax.lax.optimization_barrier(jnp.moveaxis(of, -1, 0)), tuple(place + 1 for place in places)
        product = jax.lax.dot_general(turned, inputs, ((after, places), ((), ())), preferred_element_type=dtype)
        return jax.lax.optimization_barrier(product).T
    return jax.lax.dot_general(inputs, of, ((places, places), ((), ())), preferred_element_type=dtype)


_product = jax.custom_vjp(_plain)
_product.defvjp(_kept, _gradients)
