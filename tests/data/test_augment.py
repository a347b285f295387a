import jax
import jax.numpy as jnp
import numpy as np

from crcjax.config import get_config
from crcjax.data.augment import augment, jitter_stain


def test_flips_move_pixels_and_lose_none() -> None:
    config = get_config().augment
    config.stain = 0.0
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 1, 6, 6, 3)).astype(np.uint8)
    turned = np.asarray(augment(jax.random.key(0), jnp.asarray(pixels), config))
    assert not (turned == pixels).all()
    for before, after in zip(pixels.reshape(16, 36, 3), turned.reshape(16, 36, 3), strict=True):
        assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))


def test_stain_jitter_scales_the_density_of_a_whole_bag_by_one_gain_a_channel() -> None:
    pixels = jnp.asarray(np.random.default_rng(1).integers(0, 250, (3, 4, 1, 5, 5, 3)).astype(np.uint8))
    jittered = jitter_stain(jax.random.key(1), pixels, 0.2)
    gain = np.log((np.asarray(jittered) + 1) / 256) / np.log((np.asarray(pixels, np.float32) + 1) / 256)
    per_bag = gain.reshape(3, -1, 3)
    assert np.ptp(per_bag, axis=1).max() < 1e-3
    assert np.ptp(per_bag.mean(axis=1)) > 0.05


def test_nothing_is_changed_when_everything_is_switched_off() -> None:
    config = get_config().augment
    config.stain, config.flips = 0.0, False
    pixels = jnp.ones((1, 2, 1, 4, 4, 3), jnp.uint8)
    assert augment(jax.random.key(0), pixels, config) is pixels
