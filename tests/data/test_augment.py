import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from crcjax.data.augment import augment, draw_augmentation

PIXELS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 5, 3, 8, 8, 3)).astype(np.uint8))


def _config(flips: bool, stain: float) -> ConfigDict:
    return ConfigDict({"flips": flips, "stain": stain})


def _augmented(seed: int, flips: bool, stain: float) -> np.ndarray:
    drawn = draw_augmentation(jax.random.key(seed), PIXELS.shape[:3], _config(flips, stain))
    return np.asarray(augment(PIXELS, drawn))


def test_flips_and_turns_give_each_tile_one_of_its_eight_views() -> None:
    found, seen = _augmented(0, True, 0.0), set()
    for place in np.ndindex(2, 5, 3):
        tile = np.asarray(PIXELS[place], np.float32)
        views = [np.rot90(side, k) for side in (tile, tile[:, ::-1]) for k in range(4)]
        matches = [i for i, view in enumerate(views) if np.allclose(view, found[place], atol=1e-3)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 4


def test_stain_jitter_scales_the_optical_density_of_a_bag_by_one_gain_a_channel() -> None:
    found = _augmented(1, False, 0.2)
    before = -np.log((np.asarray(PIXELS, np.float32) + 1) / 256)
    after = -np.log((found + 1) / 256)
    gains = after.sum(axis=(1, 2, 3, 4)) / before.sum(axis=(1, 2, 3, 4))
    for b in range(2):
        np.testing.assert_allclose(after[b], before[b] * gains[b], rtol=1e-3, atol=1e-3)
    assert len(np.unique(gains.round(4))) == 6


def test_nothing_is_changed_when_all_is_off() -> None:
    np.testing.assert_allclose(_augmented(2, False, 0.0), PIXELS, atol=1e-3)


@pytest.mark.parametrize("first", [0, 2])
def test_some_regions_are_augmented_as_the_whole_bag_is(first: int) -> None:
    drawn = draw_augmentation(jax.random.key(3), PIXELS.shape[:3], _config(True, 0.2))
    whole = augment(PIXELS, drawn)
    np.testing.assert_array_equal(augment(PIXELS[:, first : first + 3], drawn, first), whole[:, first : first + 3])
