from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from crcjax.config import get_config
from crcjax.data.bags import Bag
from crcjax.errors import InputError
from crcjax.models.mil import build_model, params_of
from crcjax.parallel.mesh import device_mesh
from crcjax.predict.forward import Forward
from crcjax.runs.train_state import LossScale
from crcjax.train.optimizer import build_optimizer, learning_rate
from crcjax.train.step import abstract_state, build_step, init_state


@pytest.fixture
def config():
    config = get_config()
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    config.optimizer.warmup_steps, config.train.steps, config.optimizer.learning_rate = 2, 60, 1e-2
    config.augment.stain, config.model.dropout = 0.05, 0.0
    return config


def _bag() -> Bag:
    """Bags of three textures, one per class."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(150, 255, (6, 3, 1, 32, 32, 3)).astype(np.uint8)
    for i in range(6):
        pixels[i, ..., :: 1 + 2 * (i % 3), :, :] //= 2
    position = np.zeros((6, 3, 2), np.float32)
    return Bag(pixels, np.ones((6, 3, 1), bool), position, np.arange(6, dtype=np.int32) % 3, np.ones(6, np.float32))


def test_the_step_learns_without_hidden_transfers(config) -> None:
    mesh = device_mesh()
    model = build_model(config.model, 3, 0)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    step, state = build_step(model, optimizer, config, mesh), init_state(model, optimizer, config, mesh)
    bag = jax.device_put(_bag())
    losses = []
    with jax.transfer_guard("disallow"):
        for _ in range(60):
            state, metrics = step(state, bag)
            losses.append(metrics["loss"])
    assert float(losses[-1]) < 0.6 * float(losses[0])
    assert int(state.step) == 60


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_parameters_after_one_step_are_those_of_a_plain_optax_update_of_the_mean_loss(
    config, micro_batches: int
) -> None:
    config.augment.flips, config.augment.stain, config.optimizer.warmup_steps = False, 0.0, 0
    config.train.micro_batches, config.train.label_smoothing = micro_batches, 0.0
    mesh, model = device_mesh(), build_model(config.model, 3, 0)
    bag = replace(_bag(), weight=np.arange(1, 7, dtype=np.float32))
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    graph, params = nnx.graphdef(model), jax.tree.map(np.array, params_of(model))

    @jax.jit
    def weighted_loss(params):
        logits = nnx.merge(graph, params)(jnp.asarray(bag.tiles), jnp.asarray(bag.mask)).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, bag.label)
        return (losses * bag.weight).sum() / bag.weight.sum()

    loss, gradients = jax.value_and_grad(weighted_loss)(params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    expected = optax.apply_updates(params, updates)
    step = build_step(model, optimizer, config, mesh)
    state, metrics = step(init_state(model, optimizer, config, mesh), bag)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
    # Adam's first update is the sign of the gradient, which rounding decides where the gradient is about 0.
    for value, plain, gradient in zip(*map(jax.tree.leaves, (state.params, expected, gradients)), strict=True):
        certain = np.abs(gradient) > 1e-5
        np.testing.assert_allclose(np.asarray(value)[certain], np.asarray(plain)[certain], rtol=0, atol=1e-6)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (state.params, params)), strict=True)]
    assert max(moved) > 5e-3


def test_the_same_seed_gives_the_same_bits(config) -> None:
    mesh, results = device_mesh(), []
    for _ in range(2):
        model = build_model(config.model, 3, 0)
        optimizer = build_optimizer(config.optimizer, config.train.steps)
        step, state = build_step(model, optimizer, config, mesh), init_state(model, optimizer, config, mesh)
        for _ in range(3):
            state, _ = step(state, _bag())
        results.append(jax.tree.leaves(state.params))
    assert all((a == b).all() for a, b in zip(*results, strict=True))


def test_a_bag_in_chunks_and_buckets_equals_the_bag_at_once(config) -> None:
    model = build_model(config.model, 3, 0)
    forward = Forward(model, (8, 16), chunk=4, mesh=device_mesh())
    rng = np.random.default_rng(1)
    for regions in (7, 37):
        pixels = rng.integers(0, 256, (regions, 1, 32, 32, 3)).astype(np.uint8)
        mask = rng.random((regions, 1)) < 0.8
        mask[0] = True
        chunks = (pixels[start : start + forward.chunk] for start in range(0, regions, forward.chunk))
        position = rng.random((regions, 2)).astype(np.float32)
        actual = forward.bag(params_of(model), chunks, mask, position)
        plain = model(jnp.asarray(pixels)[None], jnp.asarray(mask)[None], jnp.asarray(position)[None])
        np.testing.assert_allclose(actual.probs, plain.probs, rtol=1e-4)
        np.testing.assert_allclose(actual.region_attention, plain.region_attention, rtol=1e-4, atol=1e-7)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end(config) -> None:
    rate = learning_rate(config.optimizer, 60)
    assert float(rate(0)) == 0
    assert float(rate(2)) == pytest.approx(1e-2)
    assert float(rate(60)) == pytest.approx(1e-4)


def _steps(config, count: int, bag: Bag | None = None):
    """The state and the metrics of each step."""
    mesh = device_mesh()
    model = build_model(config.model, 3, 0)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    step, state = build_step(model, optimizer, config, mesh), init_state(model, optimizer, config, mesh)
    actual = []
    for _ in range(count):
        state, metrics = step(state, bag or _bag())
        actual.append({name: float(value) for name, value in metrics.items()})
    return state, actual


def test_micro_batches_give_the_step_of_the_whole_batch(config) -> None:
    config.model.dropout = 0.3
    bag = replace(_bag(), weight=np.arange(1, 7, dtype=np.float32))
    whole, of_whole = _steps(config, 4, bag)
    config.train.micro_batches = 3
    accumulated, of_accumulated = _steps(config, 4, bag)
    for one, other in zip(of_whole, of_accumulated, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(accumulated.params), strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(one)


def test_a_loss_that_compares_all_bags_is_refused_with_micro_batches(config) -> None:
    config.train.micro_batches, config.train.contrastive_weight = 3, 0.1
    with pytest.raises(
        InputError, match=r"micro_batches must be 1 with config\.train\.contrastive_weight, .*, got 3; set"
    ):
        _steps(config, 0)


def test_the_step_compiles_from_shapes_alone(config) -> None:
    mesh = device_mesh()
    model = build_model(config.model, 3, 0)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    bag = jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype), _bag())
    state = abstract_state(model, optimizer, config, mesh)
    assert build_step(model, optimizer, config, mesh).lower(state, bag).compile().cost_analysis()["flops"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_with_parameters_in_float32(config, dtype: str) -> None:
    config.model.dtype = dtype
    state, actual = _steps(config, 60)
    assert actual[-1]["loss"] < 0.6 * actual[0]["loss"]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_float16_skips_an_overflow_halves_the_scale_and_continues(config) -> None:
    config.model.dtype = "float16"
    mesh = device_mesh()
    model = build_model(config.model, 3, 0)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    step, state = build_step(model, optimizer, config, mesh), init_state(model, optimizer, config, mesh)
    state = replace(state, scaling=LossScale(jnp.float32(2.0**40), jnp.int32(7)))
    before = jax.tree.map(np.array, state.params)
    state, metrics = step(state, _bag())
    assert (float(metrics["loss_scale"]), float(metrics["gradient_norm"])) == (2.0**40, 0.0)
    assert (float(state.scaling.scale), int(state.scaling.good_steps), int(state.step)) == (2.0**39, 0, 1)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True))
    for _ in range(40):
        state, metrics = step(state, _bag())
        assert np.isfinite(float(metrics["loss"]))
    assert int(state.scaling.good_steps) > 0
    assert 0 < float(metrics["gradient_norm"]) < 1e3


def test_gradients_that_are_not_finite_at_the_lowest_scale_are_reported(config) -> None:
    config.model.dtype = "float16"
    mesh = device_mesh()
    model = build_model(config.model, 3, 0)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    step, state = build_step(model, optimizer, config, mesh), init_state(model, optimizer, config, mesh)
    state = replace(state, scaling=LossScale(jnp.float32(1.0), jnp.int32(0)))
    _, metrics = step(state, replace(_bag(), weight=np.full(6, np.inf, np.float32)))
    assert not np.isfinite(float(metrics["gradient_norm"]))


@pytest.mark.parametrize(("mil", "features"), [("gated_abmil", 7), ("hierarchical", 16)])
def test_the_memory_of_a_step_grows_with_the_bag_by_a_few_times_its_features(config, mil: str, features: int) -> None:
    """By the compiler's analysis, a region adds the memory of at most `features` feature vectors."""
    with config.unlocked():
        config.update(get_config())
    config.model.mil, config.model.width, config.data.batch_size = mil, 4, 1
    config.augment.flips, config.augment.stain = False, 0.0  # of a part of the bag at a time, as the encoder
    mesh, shape, temporary = device_mesh(config), jax.ShapeDtypeStruct, {}
    model, optimizer = build_model(config.model, 3, 0), build_optimizer(config.optimizer, config.train.steps)
    step, state = build_step(model, optimizer, config, mesh), abstract_state(model, optimizer, config, mesh)
    for regions in (4096, 8192):
        pixels, mask = shape((1, regions, 1, 32, 32, 3), np.uint8), shape((1, regions, 1), bool)
        position, label, weight = shape((1, regions, 2), np.float32), shape((1,), np.int32), shape((1,), np.float32)
        analysis = step.lower(state, Bag(pixels, mask, position, label, weight)).compile().memory_analysis()
        temporary[regions] = analysis.temp_size_in_bytes
    slope = (temporary[8192] - temporary[4096]) / 4096 / (4 * config.model.features)
    print(f"{mil}: {slope:.1f} features a region")
    assert slope < features
