"""Stain estimates against the painter's truth and the methods' formulas; each known trap a test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcjax.slides.stain import methods as stain
from crcjax.slides.stain.methods import (
    METHODS,
    STANDARD,
    STANDARD_MOMENTS,
    clipped_optical_density,
    fit_macenko,
    fit_reinhard,
    fit_vahadane,
    normalise,
    normalise_colour,
    normalise_stain,
)
from crcjax.slides.synthetic.painter import SITES, SlideSpec, paint_block
from crcjax.slides.tiling.tissue_segmentation import optical_density

WHITE = np.full(3, 240.0, np.float32)


def _unit(vector: tuple[float, ...]) -> np.ndarray:
    return np.array(vector) / np.linalg.norm(vector)


def _degrees(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip((np.asarray(one) * np.asarray(other)).sum(axis=-1), -1, 1)))


def _painted(site: int, subtype: str, seed: int, count: int = 20_000) -> np.ndarray:
    """Pixels of a painted slide, chosen at random."""
    block = paint_block(SlideSpec(subtype, seed, SITES[site]), 500, 500, 1600, 1400).reshape(-1, 3)
    return block[np.random.default_rng(0).choice(len(block), count, replace=False)]


def _mixture(seed: int, count: int = 4000) -> np.ndarray:
    """Pixels of two known stains, some pure."""
    rng = np.random.default_rng(seed)
    codes = rng.gamma(2.0, 0.4, (count, 2)) * (rng.random((count, 2)) < 0.6)
    return np.clip(np.rint(241 * np.exp(-codes @ np.asarray(STANDARD.vectors)) - 1), 0, 255).astype(np.uint8)


# Other seeds than those on which the shares of extreme pixels and the sparsity were chosen.
@pytest.mark.parametrize("site", range(len(SITES)))
@pytest.mark.parametrize("fit", [fit_macenko, fit_vahadane])
def test_stains_of_painted_slides_are_found_within_three_degrees(fit, site: int) -> None:
    truth = np.stack([_unit(SITES[site].haematoxylin), _unit(SITES[site].eosin)])
    for seed, subtype in ((31, "canonical"), (32, "immune")):
        pixels = _painted(site, subtype, seed)
        found = fit(pixels, np.ones(len(pixels), bool), np.float32(SITES[site].white))
        assert bool(found.reliable)
        assert _degrees(found.vectors, truth).max() < 3


@pytest.mark.parametrize("method", METHODS)
def test_what_the_mask_leaves_out_does_not_matter(method: str) -> None:
    fit, _ = METHODS[method]
    pixels = _mixture(0)
    noise = np.random.default_rng(1).integers(0, 256, (1000, 3)).astype(np.uint8)
    plain = fit(pixels, np.ones(len(pixels), bool), WHITE)
    mask = np.arange(len(pixels) + 1000) < len(pixels)
    padded = fit(np.concatenate([pixels, noise]), mask, WHITE)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_many_slides_are_fitted_at_once_as_one_by_one() -> None:
    samples = np.stack([_mixture(seed) for seed in range(3)])
    mask = np.ones(samples.shape[:2], bool)
    together = jax.vmap(fit_macenko, (0, 0, None))(samples, mask, WHITE)
    for i in range(3):
        np.testing.assert_allclose(together.vectors[i], fit_macenko(samples[i], mask[i], WHITE).vectors, atol=1e-3)


def test_the_sign_of_an_eigenvector_does_not_matter() -> None:
    """With a plane that points away from the tissue angles wrap, and the stains are up to 22 degrees off."""
    for seed in range(20):
        pixels = _mixture(seed)
        found = fit_macenko(pixels, np.ones(len(pixels), bool), WHITE)
        assert _degrees(found.vectors, STANDARD.vectors).max() < 4


def test_haematoxylin_comes_first_whatever_there_is_more_of() -> None:
    rng = np.random.default_rng(2)
    for share in (0.1, 0.9):
        first = rng.random(3000) < share
        codes = np.where(first[:, None], [1.2, 0.05], [0.05, 1.2]) * rng.uniform(0.5, 1.5, (3000, 1))
        pixels = np.clip(np.rint(241 * np.exp(-codes @ np.asarray(STANDARD.vectors)) - 1), 0, 255).astype(np.uint8)
        found = fit_macenko(pixels, np.ones(3000, bool), WHITE)
        assert float(found.vectors[0, 0]) > float(found.vectors[1, 0])
        assert _degrees(found.vectors, STANDARD.vectors).max() < 6


def test_tissue_without_nuclei_is_marked_and_given_the_references_stains() -> None:
    codes = np.random.default_rng(3).uniform(0.4, 1.4, (2000, 1))
    pixels = np.clip(np.rint(241 * np.exp(-codes * np.asarray(STANDARD.vectors)[1]) - 1), 0, 255).astype(np.uint8)
    found = fit_macenko(pixels, np.ones(2000, bool), WHITE)
    assert not bool(found.reliable)
    np.testing.assert_array_equal(found.vectors, STANDARD.vectors)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_without_tissue_gives_finite_numbers(method: str) -> None:
    fit, reference = METHODS[method]
    found = fit(np.full((500, 3), 250, np.uint8), np.ones(500, bool), WHITE)
    assert not bool(found.reliable)
    tiles = np.random.default_rng(4).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    assert normalise(method, tiles, found, reference).dtype == jnp.uint8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_the_white_of_the_slide_decides_the_eosin_vector() -> None:
    pixels = _mixture(5)
    mask = np.ones(len(pixels), bool)
    wrong = fit_macenko(pixels, mask, np.float32([255, 255, 255]))
    right = fit_macenko(pixels, mask, WHITE)
    assert _degrees(right.vectors, STANDARD.vectors)[1] < _degrees(wrong.vectors, STANDARD.vectors)[1]


def test_white_pixels_do_not_wrap_and_black_ones_are_finite() -> None:
    density = np.asarray(clipped_optical_density(np.array([[255] * 3, [240] * 3, [0] * 3], np.uint8), WHITE))
    np.testing.assert_allclose(density[:, 0], [0, 0, np.log(241)], atol=1e-6)


def test_the_density_on_the_device_is_that_of_tissue_segmentation_not_below_0() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    expected = np.maximum(optical_density(picture, tuple(WHITE.tolist())), 0)
    density = np.moveaxis(np.asarray(clipped_optical_density(picture, WHITE)), -1, 0)
    np.testing.assert_allclose(density, expected, atol=1e-6)


def test_normalising_to_ones_own_stains_changes_nothing() -> None:
    tiles = _mixture(6, 32 * 64).reshape(2, 32, 32, 3)
    same = np.asarray(normalise_stain(tiles, STANDARD, STANDARD)).astype(int)
    assert np.abs(same - tiles).max() <= 2  # what rounding had put outside the stains' plane is lost
    own = fit_reinhard(tiles.reshape(-1, 3), np.ones(2 * 32 * 32, bool), WHITE)
    assert np.abs(np.asarray(normalise_colour(tiles, own, own)).astype(int) - tiles).max() <= 1


def test_concentrations_keep_their_place_between_two_pairs_of_stains() -> None:
    """A pixel painted with one site's stains becomes what the other site's would have made of the same tissue."""
    from dataclasses import replace

    rng = np.random.default_rng(7)
    codes = rng.uniform(0.05, 1.2, (500, 2))
    one = np.stack([_unit(SITES[0].haematoxylin), _unit(SITES[0].eosin)]).astype(np.float32)
    source = replace(STANDARD, vectors=one, white=np.float32(SITES[0].white))
    before, expected = (
        np.clip(np.rint((white + 1) * np.exp(-codes @ vectors) - 1), 0, 255).astype(np.uint8)
        for white, vectors in ((source.white, one), (STANDARD.white, np.asarray(STANDARD.vectors)))
    )
    for sparse in (False, True):
        found = np.asarray(normalise_stain(before.reshape(1, 20, 25, 3), source, STANDARD, sparse)).reshape(-1, 3)
        assert np.abs(found.astype(int) - expected).max() <= (6 if sparse else 3)


def test_background_stays_background() -> None:
    tiles = np.full((1, 4, 4, 3), 240, np.uint8)
    source = fit_macenko(_mixture(8), np.ones(4000, bool), WHITE)
    np.testing.assert_array_equal(normalise_stain(tiles, source, STANDARD), 240)
    moments = fit_reinhard(_mixture(8), np.ones(4000, bool), WHITE)
    np.testing.assert_array_equal(normalise_colour(tiles, moments, STANDARD_MOMENTS), 240)


def test_reinhard_gives_the_tissue_the_references_moments() -> None:
    pixels = _mixture(9, 4096)
    mask = np.ones(4096, bool)
    other = fit_reinhard(_painted(1, "stromal", 33, 4096), mask, WHITE)
    moved = np.asarray(normalise_colour(pixels.reshape(1, 64, 64, 3), fit_reinhard(pixels, mask, WHITE), other))
    found = fit_reinhard(moved.reshape(-1, 3), mask, WHITE)
    np.testing.assert_allclose(found.mean, other.mean, atol=0.1)
    np.testing.assert_allclose(found.deviation, other.deviation, rtol=0.35)


def test_every_round_of_vahadanes_factors_lowers_their_objective_and_none_is_negative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = _painted(0, "stromal", 12, 4000)
    density = np.asarray(stain.clipped_optical_density(pixels, WHITE), np.float64)
    values = density * (density.mean(axis=1, keepdims=True) >= stain.BETA)
    costs = []
    for steps in (0, 1, 2, 4, 8, 16, 32, stain._NMF_STEPS):
        monkeypatch.setattr(stain, "_NMF_STEPS", steps)
        found = stain.fit_vahadane.__wrapped__(jnp.asarray(pixels), np.ones(len(pixels), bool), WHITE)
        vectors = np.asarray(found.vectors, np.float64)
        assert (vectors >= 0).all()
        codes = np.maximum(values @ np.linalg.pinv(vectors), 1e-3)
        for _ in range(500):  # to the codes that are best for these vectors
            codes = codes * (values @ vectors.T) / (codes @ (vectors @ vectors.T) + stain._SPARSITY)
        costs.append(((values - codes @ vectors) ** 2).sum() / 2 + stain._SPARSITY * codes.sum())
    assert (np.diff(costs) <= 1e-4 * costs[0]).all(), costs
    assert costs[-1] < costs[0]


def test_the_concentrations_of_vahadane_solve_their_lasso() -> None:
    from crcjax.slides.stain.methods import _lasso

    density = np.random.default_rng(10).uniform(0, 1.5, (200, 3)).astype(np.float32)
    vectors = np.asarray(STANDARD.vectors)
    found = np.stack(_lasso(list(jnp.asarray(density).T), jnp.asarray(vectors)), axis=-1).astype(np.float64)

    def cost(codes: np.ndarray) -> np.ndarray:
        return ((density - codes @ vectors) ** 2).sum(axis=1) / 2 + 0.01 * codes.sum(axis=1)

    assert (found >= 0).all()
    for change in np.random.default_rng(11).normal(0, 0.05, (50, 1, 2)):
        assert (cost(found) <= cost(np.maximum(found + change, 0)) + 1e-6).all()
