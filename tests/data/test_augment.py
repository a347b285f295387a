from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.stats import spearmanr

from crcjax.config import get_config
from crcjax.data.augment import augment, sample_augmentation
from crcjax.slides.stain.methods import StainMatrix, clipped_optical_density, fit_macenko

PIXELS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 5, 3, 8, 8, 3)).astype(np.uint8))
SHAPE = PIXELS.shape[:3]
OFF = {"flips": False, "stain": 0.0}
ALL = {
    "flips": True,
    "stain": 0.1,
    "hed": 0.2,
    "stain_swap_prob": 0.9,
    "blur": 2.0,
    "noise": 9.0,
    "jpeg_min_quality": 30.0,
}


def _config(**fields: object) -> ConfigDict:
    config = get_config().augment.unlock()
    config.update(OFF | fields)
    return config


def _augmented(seed: int, **fields: object) -> np.ndarray:
    augmentation = sample_augmentation(jax.random.key(seed), SHAPE, _config(**fields))
    return np.asarray(augment(PIXELS, augmentation))


def _two_slides() -> tuple[np.ndarray, np.ndarray, StainMatrix]:
    """Stain concentrations, the pixels of two slides with these concentrations, and the slides' stain estimates."""
    rng = np.random.default_rng(1)
    codes = rng.gamma(2.0, 0.35, (64 * 64, 2)) * rng.integers(0, 2, (64 * 64, 2))
    vectors = np.array([[[0.65, 0.70, 0.29], [0.09, 0.95, 0.29]], [[0.56, 0.72, 0.41], [0.20, 0.90, 0.39]]])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    white, strength = np.array([[245.0, 244, 246], [236, 238, 232]]), np.array([[1.0, 0.7], [0.6, 1.2]])
    density = np.einsum("pi,bi,bic->bpc", codes, strength, vectors)
    pixels = np.rint((white[:, None] + 1) * np.exp(-density) - 1).clip(0, 255).astype(np.uint8)
    everywhere = np.ones(len(codes), bool)
    estimates = [
        fit_macenko(one, everywhere, light.astype(np.float32)) for one, light in zip(pixels, white, strict=True)
    ]
    return codes, pixels.reshape(2, 1, 1, 64, 64, 3), jax.tree.map(lambda *leaves: jnp.stack(leaves), *estimates)


def test_flips_and_rotations_give_each_tile_one_of_its_eight_views() -> None:
    actual, seen_views = _augmented(0, flips=True), set()
    for place in np.ndindex(2, 5, 3):
        tile = np.asarray(PIXELS[place], np.float32)
        views = [np.rot90(side, k) for side in (tile, tile[:, ::-1]) for k in range(4)]
        matches = [i for i, view in enumerate(views) if np.allclose(view, actual[place], atol=1e-3)]
        assert len(matches) == 1
        seen_views.add(matches[0])
    assert len(seen_views) > 4


def test_stain_jitter_scales_the_optical_density_of_a_bag_by_one_gain_a_channel() -> None:
    actual = _augmented(1, stain=0.2)
    before = -np.log((np.asarray(PIXELS, np.float32) + 1) / 256)
    after = -np.log((actual + 1) / 256)
    gains = np.median(after / np.maximum(before, 1e-6), axis=(1, 2, 3, 4))
    for b in range(2):
        black = np.log(256)  # no pixel gets darker
        np.testing.assert_allclose(after[b], np.minimum(before[b] * gains[b], black), rtol=1e-3, atol=1e-3)
    assert len(np.unique(gains.round(4))) == 6


def test_hed_jitter_changes_the_amounts_of_a_slides_own_stains_and_not_their_directions() -> None:
    _, pixels, estimate = _two_slides()
    augmentation = sample_augmentation(jax.random.key(4), (2, 1, 1), _config(hed=0.3), estimate)
    actual = augment(jnp.asarray(pixels), augmentation)
    for b in range(2):
        white = np.asarray(estimate.white[b])
        basis = np.concatenate([estimate.vectors[b], np.cross(*estimate.vectors[b])[None]])
        before, after = (
            np.asarray(-np.log((np.asarray(some[b], np.float64).reshape(-1, 3) + 1) / (white + 1)))
            @ np.linalg.inv(basis)
            for some in (pixels, actual)
        )
        used = before[:, :2].min(axis=1) > 0.2
        ratio = after[used, :2] / before[used, :2]
        np.testing.assert_allclose(ratio, np.broadcast_to(np.median(ratio, axis=0), ratio.shape), rtol=2e-3)
        assert np.abs(np.log(np.median(ratio, axis=0))).max() > 0.02
    np.testing.assert_allclose(_augmented(4, hed=1e-9), PIXELS, atol=0.01)  # a gain of 1


def test_stain_swapping_gives_a_slide_the_other_slides_stains_concentrations_and_background() -> None:
    codes, pixels, estimate = _two_slides()
    actual = np.asarray(
        augment(
            jnp.asarray(pixels),
            sample_augmentation(jax.random.key(0), (2, 1, 1), _config(stain_swap_prob=1.0), estimate),
        )
    )
    # The same tissue, so each becomes the other, as far as 8 bits and the estimates tell.
    assert np.abs(actual - pixels[::-1]).mean() < 0.1 * np.abs(pixels.astype(float) - pixels[::-1]).mean()
    for b in range(2):
        light = np.asarray(estimate.white[b])
        again = fit_macenko(
            np.rint(actual[b]).astype(np.uint8).reshape(-1, 3), np.ones(len(codes), bool), estimate.white[1 - b]
        )
        np.testing.assert_allclose(again.vectors, estimate.vectors[1 - b], atol=0.02)
        background = clipped_optical_density(pixels[b].reshape(-1, 3), light).max(axis=1) < 0.005
        np.testing.assert_allclose(
            actual[b].reshape(-1, 3)[background], np.tile(estimate.white[1 - b], (background.sum(), 1)), atol=6
        )


def test_unreliable_stains_are_not_swapped() -> None:
    _, pixels, estimate = _two_slides()
    unknown = StainMatrix(estimate.vectors, estimate.concentration, estimate.white, jnp.array([True, False]))
    augmentation = sample_augmentation(jax.random.key(0), (2, 1, 1), _config(stain_swap_prob=1.0), unknown)
    np.testing.assert_allclose(augment(jnp.asarray(pixels), augmentation), pixels, atol=0.01)


def test_nothing_is_changed_or_computed_when_all_changes_are_disabled() -> None:
    augmentation = sample_augmentation(jax.random.key(2), SHAPE, _config())
    assert jax.tree.leaves(augmentation) == []
    program = jax.jit(lambda pixels: augment(pixels, augmentation)).lower(PIXELS).compile()
    assert not program.cost_analysis().get("flops", 0)
    np.testing.assert_array_equal(augment(PIXELS, augmentation), PIXELS)


@pytest.mark.parametrize(("first", "each"), [(0, "slide"), (2, "instance")])
def test_a_chunk_of_a_bag_is_augmented_like_the_whole_bag_and_the_same_key_gives_the_same_bits(
    first: int, each: str
) -> None:
    estimate = _two_slides()[2]
    config = _config(**ALL, artefacts=0.5, each=each)
    augmentation, again = (sample_augmentation(jax.random.key(3), SHAPE, config, estimate) for _ in range(2))
    work = jax.jit(augment)
    augmented = work(PIXELS, augmentation)
    np.testing.assert_array_equal(work(PIXELS, again), augmented)
    np.testing.assert_array_equal(
        work(PIXELS[:, first : first + 3], augmentation, first), augmented[:, first : first + 3]
    )
    assert not np.array_equal(work(PIXELS, sample_augmentation(jax.random.key(4), SHAPE, config, estimate)), augmented)


@pytest.mark.parametrize(("each", "samples"), [("slide", 2), ("instance", 30)])
def test_a_slide_shares_a_sample_or_each_instance_has_its_own(each: str, samples: int) -> None:
    augmentation = sample_augmentation(
        jax.random.key(0), SHAPE, _config(blur=2.0, jpeg_min_quality=50.0, noise=3.0, stain=0.1, each=each)
    )
    for part in (
        augmentation.blur_px,
        augmentation.jpeg_quality,
        augmentation.noise.deviation,
        augmentation.colour.density[..., 0, 0],
    ):
        assert len(np.unique(part)) == samples


def test_no_key_is_used_twice_and_no_parent_of_other_keys_is_used_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled_from: list[bytes] = []
    parents: set[bytes] = set()

    def recording(name: str, note: Callable[[bytes], None]) -> None:
        original = getattr(jax.random, name)
        monkeypatch.setattr(
            jax.random,
            name,
            lambda key, *rest, **named: (
                note(np.asarray(jax.random.key_data(key)).tobytes()),
                original(key, *rest, **named),
            )[1],
        )

    for sampler in ("bernoulli", "normal", "uniform", "randint"):
        recording(sampler, sampled_from.append)
    for derivation in ("split", "fold_in"):
        recording(derivation, parents.add)
    config = _config(**ALL, artefacts=0.5)
    for step in range(20):
        augmentation = sample_augmentation(jax.random.key(step), SHAPE, config, _two_slides()[2])
        noise_keys = np.asarray(jax.random.key_data(augmentation.noise.key)).reshape(-1, 2)
        sampled_from += [noise_key.tobytes() for noise_key in noise_keys]
    assert len(sampled_from) == len(set(sampled_from)) > 20 * 40
    assert not parents & set(sampled_from)


def test_parameters_of_different_changes_are_independent_over_steps_and_bags() -> None:
    config = _config(flips=True, stain=0.1, blur=2.0, noise=9.0, jpeg_min_quality=30.0, artefacts=0.5)
    steps, bags = 800, 4
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(steps))

    def parameters_of(key: jax.Array) -> dict[str, jax.Array]:
        augmentation = sample_augmentation(key, (bags, 1, 1), config)
        return {
            "flips": augmentation.flips,
            "gains": jnp.diagonal(augmentation.colour.density, axis1=-2, axis2=-1),
            "artefacts": augmentation.artefacts.kind > 0,
            "places": augmentation.artefacts.geometry,
            "blur": augmentation.blur_px,
            "noise": augmentation.noise.deviation,
            "jpeg": augmentation.jpeg_quality,
        }

    parameters = jax.jit(jax.vmap(parameters_of))(keys)
    columns = {name: np.asarray(value, np.float32).reshape(steps, -1) for name, value in parameters.items()}
    parameter_of = np.concatenate([[name] * column.shape[1] for name, column in columns.items()])
    correlation = spearmanr(np.concatenate(list(columns.values()), axis=1)).statistic
    between = parameter_of[:, None] != parameter_of
    # 800 independent steps: a standard deviation of 0.035.
    assert np.abs(correlation[between]).max() < 0.2
    assert 30 <= columns["jpeg"].min() < 35
    assert 95 < columns["jpeg"].max() <= 100
