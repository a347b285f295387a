import matplotlib
import numpy as np
import pytest

from crcjax.predict.evidence_map import TileLayer
from crcjax.predict.heatmap import evidence_scale, overlay, rank


def test_ranks_span_zero_to_one_and_ties_share() -> None:
    np.testing.assert_allclose(rank(np.array([0.1, 0.4, 0.2])), [0, 1, 0.5])
    np.testing.assert_allclose(rank(np.array([0.2, 0.2, 0.2])), [0.5, 0.5, 0.5])
    assert rank(np.array([1.0])).tolist() == [0.0]


def test_a_hot_tile_is_coloured_within_half_a_pixel_of_its_place_and_nowhere_else() -> None:
    size, side = (4096, 2048), 256.0
    corner = np.array([[x, y] for y in range(0, 2048, 256) for x in range(0, 4096, 256)], np.float64)
    value = np.zeros((len(corner), 1), np.float32)
    value[(corner == (1024, 512)).all(axis=1)] = 1
    picture = overlay(np.full((500, 1000, 3), 255, np.uint8), TileLayer(corner, side, value), size)
    # Brightness rises with the rank. Half-way between the ranks of the cold tiles, which share one, and 1 is the tile's edge.
    weights = np.array([0.3, 0.6, 0.1])
    colours = np.asarray(matplotlib.colormaps["magma"]([63.0 / 127, (1 + 63.0 / 127) / 2]))[:, :3] @ weights
    cold, half = 255 * (0.45 + 0.55 * colours)
    brightness = picture @ weights
    scale = 1000 / 4096
    for profile, low in ((brightness[round(640 * scale)], 1024), (brightness[:, round(1152 * scale)], 512)):
        inside = np.flatnonzero(profile > half)
        assert inside[0] == pytest.approx(low * scale, abs=0.6)
        assert inside[-1] + 1 == pytest.approx((low + 256) * scale, abs=0.6)
        # Beyond a quarter of the neighbours, nothing is seen of it.
        outside = np.r_[profile[: round((low - 64) * scale)], profile[round((low + 320) * scale) :]]
        np.testing.assert_allclose(outside, cold, atol=1.5)


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
