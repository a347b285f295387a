import cv2
import numpy as np
import pytest

from crcjax.slides.quality import QUALITY_NAMES, score_tile
from crcjax.slides.tissue import TissueModel

MODEL = TissueModel((240.0, 240.0, 240.0), 0.06)


def _tile(stain: float = 1.0) -> np.ndarray:
    """Nuclei on pink; `stain` scales the optical density."""
    rng = np.random.default_rng(0)
    density = np.full((256, 256, 3), (0.05, 0.4, 0.2))
    for x, y in rng.integers(0, 256, (150, 2)).tolist():
        cv2.circle(density, (x, y), 4, (0.7, 0.9, 0.4), -1)
    noise = rng.normal(0, 2, density.shape)
    return np.clip(240 * np.exp(-stain * density) + noise, 0, 255).astype(np.uint8)


def _score(tile: np.ndarray) -> dict[str, float]:
    return dict(zip(QUALITY_NAMES, score_tile(tile, MODEL).tolist(), strict=True))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_tissue_is_the_stained_fraction_of_the_tile(fraction: float) -> None:
    tile = _tile()
    tile[:, round(256 * fraction) :] = 240
    assert _score(tile)["tissue"] == pytest.approx(fraction, abs=0.02)


def test_sharpness_falls_with_every_step_out_of_focus() -> None:
    scores = [_score(cv2.GaussianBlur(_tile(), (0, 0), sigma))["sharpness"] for sigma in (0.5, 1, 2, 4, 8)]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.005 < scores[0]


def test_sharpness_is_about_the_same_for_pale_and_dense_stain() -> None:
    pale, dense = _score(_tile(0.5))["sharpness"], _score(_tile(1.5))["sharpness"]
    assert 0.5 < pale / dense < 2


def test_a_tile_of_one_colour_has_no_sharpness() -> None:
    assert _score(np.full((256, 256, 3), 180, np.uint8))["sharpness"] == 0
