import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from crcjax.data.corruptions import ARTEFACTS, Artefacts, add_artefacts, blur, jpeg, sample_artefacts
from crcjax.slides.synthetic.painter import SITES, SlideSpec, paint_block

TILE = paint_block(SlideSpec("stromal", 3, SITES[1]), 1400, 1200, 96, 96)


def test_blur_keeps_constants_and_is_the_gaussian_away_from_the_border() -> None:
    constant = jnp.full((2, 40, 24, 3), 77.0)
    np.testing.assert_allclose(blur(constant, jnp.array([0.5, 9.0])), constant, rtol=1e-5)
    actual = blur(jnp.asarray(TILE, jnp.float32)[None], jnp.array([1.5]))[0]
    expected = gaussian_filter(TILE.astype(np.float32), (1.5, 1.5, 0), truncate=8)
    np.testing.assert_allclose(actual[12:-12, 12:-12], expected[12:-12, 12:-12], atol=0.01)
    np.testing.assert_array_equal(blur(constant, jnp.zeros(2)), constant)


@pytest.mark.parametrize("subsampled", [False, True])
@pytest.mark.parametrize("quality", [30, 75, 100])
def test_jpeg_is_pillows_to_within_its_own_rounding(quality: int, subsampled: bool) -> None:
    file = io.BytesIO()
    Image.fromarray(TILE).save(file, "JPEG", quality=quality, subsampling=2 if subsampled else 0)
    theirs = np.asarray(Image.open(file), np.float32)
    ours = np.asarray(jpeg(jnp.asarray(TILE, jnp.float32)[None], jnp.array([float(quality)]), subsampled)[0])
    lost = np.abs(theirs - TILE).mean()
    assert np.abs(ours - theirs).mean() < 1.0
    assert np.abs(ours - TILE).mean() == pytest.approx(lost, abs=0.15)
    if quality == 100:
        assert np.abs(ours - TILE).max() <= 8


def test_jpeg_takes_any_side_and_a_quality_for_each_tile() -> None:
    tiles = jnp.asarray(TILE[:37, :50], jnp.float32)
    both = jpeg(jnp.stack([tiles, tiles]), jnp.array([20.0, 95.0]), True)
    assert both.shape == (2, 37, 50, 3)
    rough, fine = (float(jnp.abs(one - tiles).mean()) for one in both)
    assert rough > 2 * fine


def test_artefacts_change_the_tiles_that_are_labelled_and_no_others() -> None:
    artefacts = sample_artefacts(jax.random.key(0), (4, 50, 2), 0.4)
    tiles = jnp.broadcast_to(jnp.asarray(TILE[:32, :32], jnp.float32), (4, 50, 2, 32, 32, 3))
    actual = jax.jit(add_artefacts)(tiles, artefacts)
    changed = np.asarray((actual != tiles).any(axis=(-3, -2, -1)))
    np.testing.assert_array_equal(changed, np.asarray(artefacts.kind) > 0)
    assert 0.3 < changed.mean() < 0.5
    assert set(np.unique(artefacts.kind)) == set(range(len(ARTEFACTS)))
    assert float(actual.min()) >= 0
    assert float(actual.max()) <= 255


@pytest.mark.parametrize("kind", range(1, len(ARTEFACTS)))
def test_each_artefact_is_what_its_name_says(kind: int) -> None:
    artefacts = sample_artefacts(jax.random.key(1), (8,), 1.0)
    tiles = jnp.broadcast_to(jnp.asarray(TILE, jnp.float32), (8, *TILE.shape))
    actual = np.asarray(
        add_artefacts(tiles, Artefacts(jnp.full(8, kind, jnp.int32), artefacts.geometry, artefacts.specks))
    )
    before = np.asarray(tiles)
    darker, sharpness = (
        actual < before - 1,
        np.abs(np.diff(actual, axis=1)).mean() / np.abs(np.diff(before, axis=1)).mean(),
    )
    if ARTEFACTS[kind] in ("pen", "fold", "dust"):
        assert (actual <= before + 1e-3).all()
        assert darker.any(axis=(1, 2, 3)).all()
    if ARTEFACTS[kind] == "out_of_focus":
        assert sharpness < 0.7
        np.testing.assert_allclose(actual.mean(axis=(1, 2, 3)), before.mean(axis=(1, 2, 3)), rtol=0.05)
    if ARTEFACTS[kind] == "bubble":
        assert actual.mean() != pytest.approx(before.mean(), rel=1e-3)
        assert darker.any(axis=(1, 2, 3)).all()  # its rim
