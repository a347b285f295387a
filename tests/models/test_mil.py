import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crcjax.config import get_config
from crcjax.errors import InputError
from crcjax.models.encoders import optical_density
from crcjax.models.mil import MILModel, build_model, params_of


@pytest.fixture(scope="module")
def model() -> MILModel:
    config = get_config().model
    config.width, config.features, config.attention = 8, 16, 8
    return build_model(config, 3, seed=0)


def _features(seed: int, regions: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((2, regions, 5, 16)).astype(np.float32)
    return jnp.asarray(features), jnp.asarray(rng.random((2, regions, 5)) < 0.7)


def _pixels(seed: int, *lead: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (*lead, 64, 64, 3)).astype(np.uint8))


def test_pooling_equals_gated_attention_written_out(model: MILModel) -> None:
    features, mask = _features(0, 6)
    found = model.pool(features, mask)
    weights = jax.tree.map(lambda value: np.asarray(value, np.float64), params_of(model))
    part = weights["attention"]
    for b in range(2):
        h = np.asarray(features[b], np.float64).reshape(-1, 16)[np.asarray(mask[b]).ravel()]
        content = np.tanh(h @ part["content"]["kernel"] + part["content"]["bias"])
        gate = 1 / (1 + np.exp(-(h @ part["gate"]["kernel"] + part["gate"]["bias"])))
        scores = ((content * gate) @ part["score"]["kernel"] + part["score"]["bias"])[:, 0]
        attention = np.exp(scores) / np.exp(scores).sum()
        logits = attention @ h @ weights["head"]["linear"]["kernel"] + weights["head"]["linear"]["bias"]
        np.testing.assert_allclose(found.logits[b], logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(found.slot_attention[b])[np.asarray(mask[b])], attention, rtol=1e-5)
    assert (np.asarray(found.slot_attention)[~np.asarray(mask)] == 0).all()
    np.testing.assert_allclose(found.region_attention.sum(axis=1), 1, rtol=1e-6)


def test_padding_never_changes_a_prediction(model: MILModel) -> None:
    features, mask = _features(1, 6)
    noise, _ = _features(2, 9)
    padded = jnp.concatenate([features, noise], axis=1)
    found = model.pool(padded, jnp.pad(mask, ((0, 0), (0, 9), (0, 0))))
    np.testing.assert_allclose(found.probs, model.pool(features, mask).probs, rtol=1e-5)


def test_the_order_of_regions_never_changes_a_prediction(model: MILModel) -> None:
    features, mask = _features(3, 7)
    order = np.random.default_rng(0).permutation(7)
    shuffled = model.pool(features[:, order], mask[:, order])
    plain = model.pool(features, mask)
    np.testing.assert_allclose(shuffled.probs, plain.probs, rtol=1e-5)
    np.testing.assert_allclose(shuffled.region_attention, plain.region_attention[:, order], rtol=1e-5)


def test_a_bag_without_tiles_gives_numbers_and_a_finite_gradient(model: MILModel) -> None:
    features, mask = _features(4, 3)
    graph, state = nnx.split(model)

    def total(state: nnx.State) -> jax.Array:
        return nnx.merge(graph, state).pool(features, jnp.zeros_like(mask)).probs.sum()

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(total)(state)))
    assert float(model.pool(features, jnp.zeros_like(mask)).region_attention.sum()) == 0


def test_a_bag_from_pixels_is_encoding_then_pooling(model: MILModel) -> None:
    pixels, mask = _pixels(5, 1, 3, 5), jnp.ones((1, 3, 5), bool)
    whole = model(pixels, mask)
    np.testing.assert_allclose(whole.probs, model.pool(model.encode(pixels), mask).probs, rtol=1e-6)


def test_dropout_acts_with_a_key_alone(model: MILModel) -> None:
    features, mask = _features(6, 8)
    dropped = model.pool(features, mask, jax.random.key(0))
    assert not np.allclose(dropped.logits, model.pool(features, mask).logits)


def test_bfloat16_keeps_parameters_and_results_in_float32_and_is_near() -> None:
    config = get_config().model
    config.width, config.features, config.attention = 8, 16, 8
    pixels, mask = _pixels(7, 2, 4, 1), jnp.ones((2, 4, 1), bool)
    exact = build_model(config, 3, 0)(pixels, mask)
    config.dtype = "bfloat16"
    half = build_model(config, 3, 0)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params_of(half)))
    found = half(pixels, mask)
    assert found.logits.dtype == jnp.float32
    np.testing.assert_allclose(found.probs, exact.probs, atol=0.03)


def test_optical_density_is_beer_lamberts() -> None:
    pixels = jnp.array([[[255] * 3, [127] * 3, [0] * 3]], jnp.uint8)
    density = optical_density(pixels)[0, :, 0] + 0.5
    np.testing.assert_allclose(density, np.log([1.0, 2.0, 256.0]), atol=1e-6)


def test_unknown_encoders_and_types_are_refused_by_name() -> None:
    config = get_config().model
    config.encoder = "vit"
    with pytest.raises(InputError, match=r"config\.model\.encoder 'vit': choose one of compact"):
        build_model(config, 3, 0)
    config.encoder, config.dtype = "compact", "float16"
    with pytest.raises(InputError, match=r"config\.model\.dtype 'float16'"):
        build_model(config, 3, 0)
