import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike

from crcjax.models.linear import Linear, linear


@pytest.mark.parametrize("bias", [True, False])
def test_in_bfloat16_it_gives_what_flax_gives_and_gradients_are_float32_sums(bias: bool) -> None:
    ours, theirs = (layer(5, 3, use_bias=bias, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)) for layer in (Linear, nnx.Linear))
    inputs = jax.random.normal(jax.random.key(0), (4, 700, 5)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(ours(inputs), theirs(inputs))

    def loss(state: dict, inputs: jax.Array) -> jax.Array:
        return jnp.square(nnx.merge(nnx.graphdef(ours), state)(inputs).astype(jnp.float32)).sum() / 2.0

    by_state, by_inputs = jax.grad(loss, argnums=(0, 1))(nnx.to_pure_dict(nnx.state(ours)), inputs)
    made, held = np.asarray(ours(inputs), np.float64), np.asarray(inputs, np.float64)
    np.testing.assert_allclose(by_state["kernel"], np.einsum("bnf,bno->fo", held, made), rtol=1e-5)
    if bias:
        np.testing.assert_allclose(by_state["bias"], made.sum((0, 1)), rtol=1e-5)
    kernel = np.asarray(ours.kernel[...].astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(np.asarray(by_inputs, np.float64), made @ kernel.T, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_few_outputs_have_the_gradients_that_they_have_among_many(dtype: DTypeLike) -> None:
    """The kernel's gradient is computed in another order where there are few, on CPUs."""
    inputs, of = (jax.random.normal(jax.random.key(i), (4, 700, size)).astype(dtype) for i, size in enumerate((5, 513)))

    def by_kernel(of: jax.Array) -> jax.Array:
        kernel = jnp.zeros((5, of.shape[-1]))
        return jax.vjp(lambda kernel: linear(inputs, kernel, None, dtype), kernel)[1](of)[0]

    few, many = by_kernel(of[..., :3]), by_kernel(of)
    assert few.dtype == many.dtype == jnp.float32
    truth = np.einsum("bnf,bno->fo", np.asarray(inputs, np.float64), np.asarray(of, np.float64))
    for found in (few, many):
        expected = truth[:, : found.shape[1]]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
