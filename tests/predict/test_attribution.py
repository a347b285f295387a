from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from crcjax.config import get_config
from crcjax.models.aggregators.registry import AGGREGATORS
from crcjax.models.mil import MILModel, build_model, params_of
from crcjax.predict.attribution import (
    attributor,
    integrated_gradients,
    log_odds,
    occlusion,
    region_occlusion,
)
from crcjax.predict.attribution_method import attention_for

PLANTED = (7, 3)  # region, slot


def _bag(label: int, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A bag of 12 regions and 5 slots, of which one instance alone tells its class."""
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 0.3, (12, 5, 16)).astype(np.float32)
    features[PLANTED][:3] += 4 * np.eye(3)[label]
    mask = rng.random((12, 5)) < 0.8
    mask[PLANTED] = True
    position = np.stack(np.meshgrid(np.arange(4), np.arange(3)), axis=-1).reshape(-1, 2).astype(np.float32)
    return jnp.asarray(features), jnp.asarray(mask), jnp.asarray(position)


@cache
def _trained(mil: str) -> MILModel:
    """A model that was trained to tell planted bags, and by a fourth class bags without, so that none is told by absence."""
    config = get_config().model
    config.mil, config.width, config.features, config.attention, config.heads = mil, 4, 16, 16, 2
    graph = nnx.graphdef(build_model(config, 4, 0, (1, 2)))
    optimizer = optax.adam(3e-3)
    labels = jnp.arange(24) % 4
    _, _, position = _bag(0)
    positions = jnp.broadcast_to(position, (24, *position.shape))

    @jax.jit
    def step(key: jax.Array, params: dict, moments: optax.OptState) -> tuple:
        drawn, held, where = jax.random.split(key, 3)  # new bags at every step, so that none is learnt by heart
        instances = 0.3 * jax.random.normal(drawn, (24, 60, 16))
        places = jax.random.randint(where, (24,), 0, 60)
        instances = instances.at[jnp.arange(24), places, labels].add(jnp.where(labels < 3, 4.0, 0.0))
        masks = jax.random.bernoulli(held, 0.8, (24, 60)).at[jnp.arange(24), places].set(True)

        def loss(params: dict) -> jax.Array:
            bags = instances.reshape(24, 12, 5, 16), masks.reshape(24, 12, 5), positions
            logits = nnx.merge(graph, params).pool(*bags).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, value

    # Gradient descent on so small a model may end with two classes confused: it then starts from other initial weights.
    for seed in range(10):
        params = params_of(build_model(config, 4, seed, (1, 2)))
        optimizer_state = optimizer.init(params)
        for number in range(300):
            params, optimizer_state, loss_value = step(jax.random.key(number), params, optimizer_state)
        if loss_value < 0.2:
            return nnx.merge(graph, params)
    pytest.fail(f"{mil} learned none of ten times: {loss_value:.3f}")


@pytest.mark.parametrize("mil", ["hierarchical", "gated_abmil", pytest.param("transmil", marks=pytest.mark.slow)])
def test_every_attribution_finds_the_one_instance_that_tells(mil: str) -> None:
    model = _trained(mil)
    for target in range(3):
        features, mask, position = _bag(target, 100 + target)

        def score(features: jax.Array, mask: jax.Array, position=position, target=target) -> jax.Array:
            return log_odds(model.pool(features[None], mask[None], position[None]).logits[0], target)

        found = {
            "gradient": jax.jit(lambda *bag: integrated_gradients(score, *bag))(features, mask),
            "occlusion": jax.jit(lambda *bag: occlusion(score, *bag))(features, mask),
        }
        if mil == "gated_abmil":  # where instances see each other, attention may lie on one that has seen the evidence
            found["attention"] = attention_for(model.pool(features[None], mask[None], position[None]), target)
        for name, map_ in found.items():
            values = np.asarray(map_)
            assert np.unravel_index(values.argmax(), values.shape) == PLANTED, (name, target)
            assert (values[~np.asarray(mask)] == 0).all()


def test_integrated_gradients_sum_to_the_score_above_that_of_the_mean_instances() -> None:
    model = _trained("gated_abmil")
    features, mask, position = _bag(1, 9)

    def score(features: jax.Array, mask: jax.Array) -> jax.Array:
        return log_odds(model.pool(features[None], mask[None], position[None]).logits[0], 1)

    mean = jnp.broadcast_to(features[mask].mean(axis=0), features.shape)
    total = integrated_gradients(score, features, mask).sum()
    assert float(total) == pytest.approx(float(score(features, mask) - score(mean, mask)), rel=0.02)


def test_occlusion_is_the_loss_of_each_instance_and_stands_a_bag_of_one() -> None:
    model = _trained("gated_abmil")
    features, mask, position = _bag(2, 4)

    def score(features: jax.Array, mask: jax.Array) -> jax.Array:
        return log_odds(model.pool(features[None], mask[None], position[None]).logits[0], 2)

    found = occlusion(score, features, mask)
    for place in [PLANTED, *np.argwhere(np.asarray(mask))[:3]]:
        lost = score(features, mask) - score(features, mask.at[tuple(place)].set(False))
        np.testing.assert_allclose(found[tuple(place)], lost, rtol=1e-4, atol=1e-5)
    alone = jnp.zeros_like(mask).at[PLANTED].set(True)
    assert np.isfinite(occlusion(score, features, alone)).all()
    assert np.isfinite(region_occlusion(score, features, alone)).all()


def test_a_regions_occlusion_is_what_is_lost_without_all_of_its_instances() -> None:
    model = _trained("gated_abmil")
    features, mask, position = _bag(2, 4)
    mask = mask.at[PLANTED[0], :3].set(True).at[2].set(False)

    def score(features: jax.Array, mask: jax.Array) -> jax.Array:
        return log_odds(model.pool(features[None], mask[None], position[None]).logits[0], 2)

    found = np.asarray(region_occlusion(score, features, mask))
    assert (found[~np.asarray(mask)] == 0).all()
    for region in range(len(mask)):
        lost = score(features, mask) - score(features, mask.at[region].set(False))
        np.testing.assert_allclose(found[region].sum(), lost, rtol=1e-4, atol=1e-5)
        assert len(np.unique(found[region][np.asarray(mask[region])])) <= 1
    assert found.sum(axis=1).argmax() == PLANTED[0]
    twice = features.at[PLANTED[0], :3].set(features[PLANTED])  # one hides what the loss of the other would tell
    alone, together = (
        np.asarray(method(score, twice, mask))[PLANTED[0]].sum() for method in (occlusion, region_occlusion)
    )
    assert together > alone


@pytest.mark.parametrize("head", ["softmax", "evidential"])
def test_what_is_attributed_is_the_log_odds_of_the_probability_that_the_head_says(head: str) -> None:
    config = get_config().model
    config.width, config.features, config.attention, config.head = 4, 16, 16, head
    model = build_model(config, 3, 0, (1, 2))
    features, mask, position = _bag(1, 3)

    def odds(mask: jax.Array, features: jax.Array = features) -> float:
        prob = np.float64(model.pool(features[None], mask[None], position[None]).probs[0, 1])
        return float(np.log(prob / (1 - prob)))

    lost = attributor(model, "occlusion")(params_of(model), features, mask, position)[..., 1]
    for place in [PLANTED, *np.argwhere(np.asarray(mask))[:3]]:
        np.testing.assert_allclose(lost[tuple(place)], odds(mask) - odds(mask.at[tuple(place)].set(False)), atol=2e-5)
    mean = jnp.broadcast_to(features[mask].mean(axis=0), features.shape)
    total = attributor(model, "gradient")(params_of(model), features, mask, position)[..., 1].sum()
    assert float(total) == pytest.approx(odds(mask) - odds(mask, mean), rel=0.02)


def test_log_odds_have_a_gradient_where_the_class_is_all_but_certain() -> None:
    logits = jnp.array([40.0, -3.0, 1.0])
    assert float(jax.grad(lambda values: log_odds(values, 0))(logits)[0]) == 1.0
    probs = jax.nn.softmax(jnp.array([0.3, -1.0, 2.0]))
    assert float(log_odds(jnp.array([0.3, -1.0, 2.0]), 1)) == pytest.approx(float(jnp.log(probs[1] / (1 - probs[1]))))


@pytest.mark.parametrize("mil", AGGREGATORS)
def test_no_aggregator_s_gradients_or_occlusions_are_undefined(mil: str) -> None:
    config = get_config().model
    config.mil, config.width, config.features, config.attention, config.heads = mil, 4, 16, 16, 2
    model = build_model(config, 3, 0, (1, 2))
    features, mask, position = _bag(0)

    def score(features: jax.Array, mask: jax.Array) -> jax.Array:
        return log_odds(model.pool(features[None], mask[None], position[None]).logits[0], 0)

    for method in (integrated_gradients, occlusion, region_occlusion):
        values = np.asarray(jax.jit(lambda *bag, method=method: method(score, *bag))(features, mask))
        assert np.isfinite(values).all()
        assert np.abs(values).sum() > 0
