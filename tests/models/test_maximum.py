import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcjax.models.maximum import maximum_along


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_equal_largest_values_share_the_gradient_as_with_jax_s_own_maximum(axis: int) -> None:
    values = jnp.asarray(np.random.default_rng(0).integers(0, 3, (4, 5, 6)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=values.max(axis=axis).shape), jnp.float32)
    np.testing.assert_array_equal(maximum_along(values, axis), values.max(axis=axis))
    gradient = jax.jit(jax.grad(lambda values: (maximum_along(values, axis) * weights).sum()))(values)
    expected = jax.jit(jax.grad(lambda values: (values.max(axis=axis) * weights).sum()))(values)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_the_gradient_is_finite_where_the_values_are_computed_twice_with_different_rounding() -> None:
    rng = np.random.default_rng(0)
    features, mask = jnp.asarray(rng.normal(size=(60, 16)), jnp.float32), jnp.asarray(rng.random((60, 1)) < 0.9)
    offset = jnp.where(mask, features - features.mean(axis=0), 0.0)
    weights = jnp.asarray(rng.normal(size=16), jnp.float32)

    def gradient_at(fraction: jax.Array) -> jax.Array:
        values = features - (1 - fraction) * offset
        return jax.grad(lambda values: maximum_along(values + jnp.where(mask, 0.0, -jnp.inf), 0) @ weights)(values)

    gradients = jax.jit(lambda fractions: jax.lax.map(gradient_at, fractions))((jnp.arange(32) + 0.5) / 32)
    np.testing.assert_allclose(gradients.sum(axis=1), jnp.tile(weights, (32, 1)), rtol=1e-6)
