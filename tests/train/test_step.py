import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcjax.config import get_config
from crcjax.data.bags import Bag
from crcjax.errors import InputError
from crcjax.models.mil import build_model, params_of
from crcjax.train.mesh import device_mesh
from crcjax.train.optimizer import build_optimizer, learning_rate
from crcjax.train.step import Forward, build_step, init_state


@pytest.fixture
def config():
    config = get_config()
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    config.optimizer.warmup_steps, config.train.steps, config.optimizer.learning_rate = 2, 60, 1e-2
    config.augment.stain, config.model.dropout = 0.05, 0.0
    return config


def _bag() -> Bag:
    """Three kinds of texture, one a class."""
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
    step, state = build_step(model, optimizer, config, mesh), init_state(model, optimizer, mesh)
    bag = jax.device_put(_bag())
    losses = []
    with jax.transfer_guard("disallow"):
        for _ in range(60):
            state, metrics = step(state, bag)
            losses.append(metrics["loss"])
    assert float(losses[-1]) < 0.6 * float(losses[0])
    assert int(state.step) == 60


def test_the_same_seed_gives_the_same_bits(config) -> None:
    mesh, results = device_mesh(), []
    for _ in range(2):
        model = build_model(config.model, 3, 0)
        optimizer = build_optimizer(config.optimizer, config.train.steps)
        step, state = build_step(model, optimizer, config, mesh), init_state(model, optimizer, mesh)
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
        found = forward.bag(params_of(model), chunks, mask, position)
        plain = model(jnp.asarray(pixels)[None], jnp.asarray(mask)[None], jnp.asarray(position)[None])
        np.testing.assert_allclose(found.probs, plain.probs, rtol=1e-4)
        np.testing.assert_allclose(found.region_attention, plain.region_attention, rtol=1e-4, atol=1e-7)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end(config) -> None:
    rate = learning_rate(config.optimizer, 60)
    assert float(rate(0)) == 0
    assert float(rate(2)) == pytest.approx(1e-2)
    assert float(rate(60)) == pytest.approx(1e-4)
    with pytest.raises(InputError, match=r"warmup_steps 2 is not below train\.steps 2"):
        learning_rate(config.optimizer, 2)
