import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcjax.models.feature_scaling import Standardiser, column_statistics, drop_columns, standardise


def test_statistics_of_parts_are_those_of_all_rows_and_constant_columns_become_zero() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal([0, 1e4, 5, -3], [1, 0.1, 1e-5, 40], size=(300, 4))
    rows = np.concatenate([rows, np.full((300, 1), 0.1), np.full((300, 1), 1e6)], axis=1)
    mean, inverse_deviation = column_statistics([rows[:0], rows[:7], rows[7:7], rows[7:250], rows[250:]])
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(inverse_deviation[:4], 1 / rows[:, :4].std(axis=0), rtol=1e-5)
    assert (inverse_deviation[4:] == 0).all()
    # A bag of the test cases differs in a column that was constant in training.
    other = rows[:2] + 1
    assert (standardise(other, mean, inverse_deviation, 3.0)[:, 4:] == 0).all()
    with pytest.raises(ValueError, match="at least one row"):
        column_statistics([rows[:0]])


def test_standardised_features_are_deviations_from_the_mean_clipped_at_the_limit() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(4, 2, size=(50, 3)).astype(np.float16)
    standardiser = Standardiser(3, 1.5)
    standardiser.set_statistics(*column_statistics([rows]))
    exact = rows.astype(np.float64)
    expected = np.clip((exact - exact.mean(axis=0)) / exact.std(axis=0), -1.5, 1.5)
    result = standardiser(jnp.asarray(rows))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert np.abs(expected).max() == 1.5


def test_a_dropped_column_is_zero_in_all_instances_of_its_bag_and_the_mean_stays() -> None:
    features = jnp.ones((200, 2, 3, 40))
    keys = jax.random.split(jax.random.key(0), 200)
    dropped = np.asarray(drop_columns(features, 0.25, keys))
    by_bag = dropped.reshape(200, 6, 40)
    assert (by_bag == by_bag[:, :1]).all()
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert dropped.mean() == pytest.approx(1, abs=0.03)
    # Each bag has a key of its own.
    assert len(np.unique(by_bag[:, 0], axis=0)) == 200
    np.testing.assert_array_equal(drop_columns(features[5:6], 0.25, keys[5:6])[0], dropped[5])
