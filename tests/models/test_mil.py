import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crcjax.config import get_config
from crcjax.errors import InputError
from crcjax.models.heads import evidential_head
from crcjax.models.mil import MILModel, build_model, params_of
from crcjax.slides.stain.methods import clipped_optical_density


@pytest.fixture(scope="module")
def model() -> MILModel:
    config = get_config().model
    config.width, config.features, config.attention = 8, 16, 8
    return build_model(config, 3, 0, (1, 2))


def _features(seed: int, regions: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((2, regions, 5, 16)).astype(np.float32)
    return jnp.asarray(features), jnp.asarray(rng.random((2, regions, 5)) < 0.7)


def _pixels(seed: int, *lead: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (*lead, 64, 64, 3)).astype(np.uint8))


def test_a_bag_from_pixels_is_encoding_then_pooling(model: MILModel) -> None:
    pixels, mask = _pixels(5, 1, 3, 5), jnp.ones((1, 3, 5), bool)
    whole = model(pixels, mask)
    np.testing.assert_allclose(whole.probs, model.pool(model.encode(pixels), mask).probs, rtol=1e-6)


def test_dropout_acts_with_a_key_alone(model: MILModel) -> None:
    features, mask = _features(6, 8)
    dropped = model.pool(features, mask, None, jax.random.split(jax.random.key(0), len(mask)))
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
    density = clipped_optical_density(pixels, jnp.full(3, 255.0))[0, :, 0]
    np.testing.assert_allclose(density, np.log([1.0, 2.0, 256.0]), atol=1e-6)


def test_unknown_encoders_and_types_are_refused_by_name() -> None:
    config = get_config().model
    config.encoder = "vit"
    with pytest.raises(InputError, match=r"config\.model\.encoder 'vit': choose one of compact"):
        build_model(config, 3, 0)
    config.encoder, config.mil = "compact", "abml"
    with pytest.raises(
        InputError, match=r"config\.model\.mil 'abml': no such aggregator here; .* or choose one of hierarchical, mean"
    ):
        build_model(config, 3, 0)
    config.mil, config.dtype = "abmil", "float8"
    with pytest.raises(InputError, match=r"config\.model\.dtype 'float8'"):
        build_model(config, 3, 0)


def test_a_bag_of_another_tiling_is_refused(model: MILModel) -> None:
    with pytest.raises(ValueError, match="must have 5 slots per region, as the model was built for, got 1"):
        model.pool(jnp.zeros((1, 2, 1, 16)), jnp.ones((1, 2, 1), bool))


def test_evidence_gives_probabilities_and_a_vacuity_that_falls_with_it() -> None:
    head = evidential_head(jnp.array([[-20.0, -20, -20], [5, 0, -20], [50, 0, -20]]))
    alpha, probs, vacuity = head.alpha, head.probs, head.vacuity
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(vacuity, 3 / alpha.sum(axis=1), rtol=1e-6)
    assert float(vacuity[0]) == pytest.approx(1)
    assert float(vacuity[2]) < float(vacuity[1]) < 0.5


@pytest.mark.parametrize("logits", [(-9.0, -9.0, -9.0), (3.0, 0.0, -4.0), (30.0, 20.0, 1.0)])
def test_the_expected_entropy_of_evidence_is_the_mean_over_its_dirichlet(logits: tuple[float, ...]) -> None:
    head = evidential_head(jnp.array([logits]))
    drawn = np.random.default_rng(0).dirichlet(np.asarray(head.alpha[0], np.float64), 200_000)
    entropy = -(drawn * np.log(np.maximum(drawn, 1e-300))).sum(axis=1)
    assert float(head.expected_entropy[0]) == pytest.approx(entropy.mean(), abs=5 * entropy.std() / len(drawn) ** 0.5)


def _end_to_end(regions: int, encode_regions: int, remat: str = "full"):
    """The jitted gradient of a model from pixels, its parameters and its bag."""
    config = get_config().model
    config.width, config.features, config.attention, config.encode_regions = 8, 16, 8, encode_regions
    config.remat = remat
    model = build_model(config, 3, 0)
    graph, state = nnx.split(model)
    pixels, mask = _pixels(9, 1, regions, 1), jnp.ones((1, regions, 1), bool)

    def loss(state: nnx.State, pixels: jax.Array, mask: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        found = model.pool(model.encode_bag(pixels, lambda some, first: 255.0 - some), mask)
        return jax.nn.logsumexp(found.logits[0]) - found.logits[0, 1]

    return jax.jit(jax.grad(loss)), (state, pixels, mask)


@pytest.mark.parametrize("regions", [12, 13])
def test_encoding_in_chunks_gives_the_gradient_of_encoding_at_once(regions: int) -> None:
    results = []
    for encode_regions, remat in ((regions, "full"), (4, "full"), (4, "dots"), (4, "none")):
        gradient, arguments = _end_to_end(regions, encode_regions, remat)
        results.append(jax.tree.leaves(gradient(*arguments)))
    for whole, *chunked in zip(*results, strict=True):
        for part in chunked:
            np.testing.assert_allclose(part, whole, rtol=1e-5, atol=1e-5 * float(jnp.abs(whole).max()))


def test_the_less_is_made_again_the_more_is_kept() -> None:
    kept = {}
    for remat in ("full", "dots", "none"):
        gradient, arguments = _end_to_end(64, 8, remat)
        kept[remat] = gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert kept["full"] < 0.8 * kept["dots"] < 0.8 * 0.8 * kept["none"], kept


def test_memory_grows_with_the_bag_by_its_features_alone() -> None:
    temporary = {}
    for regions in (64, 256):
        gradient, arguments = _end_to_end(regions, 8)
        temporary[regions] = gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    slope = (temporary[256] - temporary[64]) / (256 - 64)
    print(f"{slope:.0f} bytes a region")
    assert slope < 2 * 16 * 4  # twice its features; a tile's activations are tens of thousands of numbers
