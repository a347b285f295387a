import io

import matplotlib
import numpy as np
import pytest
from PIL import Image

from crcjax.predict.evidence_map import TileLayer
from crcjax.predict.heatmap import LONGEST_PX, evidence_scale, heatmap_png, overlay, rank, to_heatmap_size


def test_ranks_span_zero_to_one_and_ties_share() -> None:
    np.testing.assert_allclose(rank(np.array([0.1, 0.4, 0.2])), [0, 1, 0.5])
    np.testing.assert_allclose(rank(np.array([0.2, 0.2, 0.2])), [0.5, 0.5, 0.5])
    assert rank(np.array([1.0])).tolist() == [0.0]


@pytest.mark.parametrize(("side", "corner"), [(256.0, (0.0, 0.0)), (51.3 * 4, (17.0, 140.0)), (300.7, (61.5, 3.25))])
def test_the_png_shows_a_hot_tile_within_half_of_its_own_pixel(side: float, corner: tuple[float, float]) -> None:
    size, thumbnail = (4096, 2048), np.full((500, 1000, 3), 128, np.uint8)
    cells = np.stack(np.meshgrid(np.arange(int(3900 / side)), np.arange(int(1900 / side))), axis=-1).reshape(-1, 2)
    value = (cells == (4, 2)).all(axis=1).astype(np.float32)[:, None]
    coloured = overlay(thumbnail, TileLayer(corner + cells * side, side, value), size)
    png = heatmap_png(thumbnail, coloured, title="s: a 0.9", meaning="attention", um_per_px=2.0, synthetic=False)
    assert _has_panel(png, coloured)
    # Brightness rises with the rank. Half-way between the ranks of the cold tiles, which share one, and 1 is the tile's edge.
    weights = np.array([0.3, 0.6, 0.1])
    cold_rank = (len(cells) - 2) / 2 / (len(cells) - 1)
    colours = np.asarray(matplotlib.colormaps["magma"]([cold_rank, (1 + cold_rank) / 2]))[:, :3] @ weights
    cold, half = 128 * 0.45 + 255 * 0.55 * colours
    brightness, scale = coloured @ weights, 1000 / 4096
    left, top = (np.array(corner) + np.array([4, 2]) * side) * scale
    width = side * scale
    for profile, low in ((brightness[round(top + width / 2)], left), (brightness[:, round(left + width / 2)], top)):
        inside = np.flatnonzero(profile > half)
        np.testing.assert_allclose(_crossings(profile, half, inside), (low, low + width), atol=0.2)
        # Beyond a quarter of the neighbours, nothing is seen of it.
        near = slice(int(low - width / 4), int(np.ceil(low + 1.25 * width)))
        outside = np.r_[
            profile[inside[0] - int(width * 0.9) : near.start], profile[near.stop : near.stop + int(width / 2)]
        ]
        np.testing.assert_allclose(outside, cold, atol=1.5)


def _crossings(profile: np.ndarray, half: float, inside: np.ndarray) -> list[float]:
    """Where a profile passes `half`, between the middles of pixels; pixel i's middle is at i + 0.5."""
    places = []
    for first, last in ((inside[0] - 1, inside[0]), (inside[-1], inside[-1] + 1)):
        places.append(first + 0.5 + (half - profile[first]) / (profile[last] - profile[first]))
    return places


def test_a_small_thumbnail_is_enlarged_and_a_narrow_one_leaves_room_for_the_title() -> None:
    thumbnail = np.random.default_rng(0).integers(0, 255, (40, 10, 3), np.uint8)
    large = to_heatmap_size(thumbnail)
    assert large.shape == (LONGEST_PX, LONGEST_PX // 4, 3)
    assert to_heatmap_size(large) is large
    png = heatmap_png(large, large[::-1], title="s", meaning="attention", um_per_px=2.0, synthetic=True)
    assert _has_panel(png, large[::-1])
    assert Image.open(io.BytesIO(png)).width >= 700


def _has_panel(png: bytes, panel: np.ndarray) -> bool:
    """Whether the right panel of a PNG is `panel`, pixel for pixel."""
    pixels, (height, width) = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), panel.shape[:2]
    right = pixels[:, pixels.shape[1] // 2 :]
    right = right[:, np.flatnonzero((right[right.shape[0] // 2] != 255).any(axis=1))[0] :][:, :width]
    return any(np.array_equal(right[top : top + height], panel) for top in range(len(pixels) - height))


def test_evidence_for_a_class_is_red_evidence_against_it_blue_and_no_evidence_grey() -> None:
    corner = np.array([(0.0, 0.0), (100.0, 0.0), (200.0, 0.0)])
    value = np.array([[2.0], [0.0], [-2.0]], np.float32)
    scale = evidence_scale(value)
    assert scale == pytest.approx(2, rel=0.02)
    picture = overlay(np.full((20, 80, 3), 200, np.uint8), TileLayer(corner, 100.0, value), (400, 100), scale)
    red, none, blue, outside = (picture[10, x].astype(int) for x in (10, 30, 50, 70))
    assert red[0] > red[2] + 40
    assert blue[2] > blue[0] + 40
    assert none.max() - none.min() < 5
    # Where no tile is, the slide is grey.
    assert outside.tolist() == [200, 200, 200]
