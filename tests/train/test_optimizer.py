from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from crcjax.config import get_config
from crcjax.config_check import CHOICES
from crcjax.train.optimizer import build_optimizer, learning_rate

STEPS = 20
PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "bias": jnp.array([0.5, -0.5, 0.1])}
MASK = {"kernel": True, "bias": False}
SCHEDULES: dict[str, optax.Schedule] = {
    "cosine": optax.warmup_cosine_decay_schedule(0.0, 1e-2, 4, STEPS, 1e-3),
    "linear": optax.join_schedules([optax.linear_schedule(0.0, 1e-2, 4), optax.linear_schedule(1e-2, 1e-3, 16)], [4]),
    "constant": optax.join_schedules([optax.linear_schedule(0.0, 1e-2, 4), optax.constant_schedule(1e-2)], [4]),
    "one_cycle": optax.cosine_onecycle_schedule(STEPS, 1e-2, pct_start=0.2, div_factor=25.0, final_div_factor=0.4),
}
RULES: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "adamw": lambda rate: optax.adamw(rate, b1=0.8, b2=0.95, weight_decay=0.1, mask=MASK),
    "lamb": lambda rate: optax.lamb(rate, b1=0.8, b2=0.95, weight_decay=0.1, mask=MASK),
    "lion": lambda rate: optax.lion(rate, b1=0.8, b2=0.95, weight_decay=0.1, mask=MASK),
    "adam": lambda rate: optax.chain(optax.add_decayed_weights(0.1, MASK), optax.adam(rate, b1=0.8, b2=0.95)),
    "sgd": lambda rate: optax.chain(optax.add_decayed_weights(0.1, MASK), optax.sgd(rate, momentum=0.8)),
}


def _config(**fields: object) -> ConfigDict:
    config = get_config().optimizer
    config.update({"learning_rate": 1e-2, "warmup_steps": 4, "final_fraction": 0.1, "weight_decay": 0.1} | fields)
    return config


def _trained(optimizer: optax.GradientTransformation) -> optax.Params:
    """The parameters after five steps with gradients that the clipping to a norm of 1 changes in some steps."""
    params, state = PARAMS, optimizer.init(PARAMS)
    for step in range(5):
        gradient = jax.tree.map(lambda value, step=step: jnp.cos(value * (step + 1)) * (step - 1.5), params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_every_optimiser_and_schedule_of_the_config_is_tested_here() -> None:
    assert set(RULES) == set(CHOICES["optimizer.name"])
    assert set(SCHEDULES) == set(CHOICES["optimizer.schedule"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_that_of_optax_and_ends_where_the_config_says(schedule: str) -> None:
    rate = learning_rate(_config(schedule=schedule), STEPS)
    steps = jnp.arange(STEPS + 1)
    np.testing.assert_allclose(jax.vmap(rate)(steps), jax.vmap(SCHEDULES[schedule])(steps), rtol=1e-6)
    assert float(rate(4)) == pytest.approx(1e-2)
    assert float(rate(STEPS)) == pytest.approx(1e-2 if schedule == "constant" else 1e-3)
    assert float(rate(0)) == pytest.approx(1e-2 / 25 if schedule == "one_cycle" else 0.0)


@pytest.mark.parametrize("name", RULES)
def test_an_optimiser_is_that_of_optax_with_clipped_gradients(name: str) -> None:
    config = _config(name=name, beta1=0.8, beta2=0.95)
    plain = optax.chain(optax.clip_by_global_norm(1.0), RULES[name](SCHEDULES["cosine"]))
    for ours, theirs in zip(
        *(jax.tree.leaves(_trained(one)) for one in (build_optimizer(config, STEPS), plain)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(_trained(plain)["kernel"], PARAMS["kernel"])


def test_the_default_is_adamw_with_a_warm_up_and_a_cosine_to_the_bit() -> None:
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 30, 300, 1e-3 * 0.01)
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2, mask=MASK))
    default = build_optimizer(get_config().optimizer, 300)
    for ours, theirs in zip(*(jax.tree.leaves(_trained(one)) for one in (default, plain)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    state, expected = default.init(PARAMS), plain.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(expected)


def test_a_frozen_parameter_does_not_change_and_has_no_optimiser_state() -> None:
    optimizer = build_optimizer(_config(), STEPS, lambda path: path == ("bias",))
    trained = _trained(optimizer)
    np.testing.assert_array_equal(trained["bias"], PARAMS["bias"])
    assert not np.array_equal(trained["kernel"], PARAMS["kernel"])
    assert not [leaf for leaf in jax.tree.leaves(optimizer.init(PARAMS)) if leaf.shape == (3,)]
