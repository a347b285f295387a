import numpy as np
import pytest

from crcjax.predict.evidence_map import PixelGrid, TileLayer, draw, merged, tile_layers

# Slots of 10x and 20x.
BOXES = np.array([(0, 0, 1), (0, 0, 0.5), (0.5, 0, 0.5), (0, 0.5, 0.5), (0.5, 0.5, 0.5)], np.float32)


def _half_height(profile: np.ndarray, middle: np.ndarray) -> tuple[float, float]:
    """Where a profile of one mark rises and falls through half of its height, in the units of `middle`."""
    half = (profile.max() + profile.min()) / 2
    above = np.flatnonzero(profile >= half)
    ends = []
    for inside, outside in ((above[0], above[0] - 1), (above[-1], above[-1] + 1)):
        share = (half - profile[outside]) / (profile[inside] - profile[outside])
        ends.append(middle[outside] + share * (middle[inside] - middle[outside]))
    return ends[0], ends[1]


@pytest.mark.parametrize("pixel", [1.0, 10.3, 51.3 / 4])
def test_the_half_height_of_a_single_tile_is_its_own_edge_whatever_the_pixels(pixel: float) -> None:
    side, offset = 51.3, np.array([17.0, 140.0])
    cells = np.stack(np.meshgrid(np.arange(9), np.arange(7)), axis=-1).reshape(-1, 2)
    layer = TileLayer(offset + cells * side, side, np.zeros((63, 1), np.float32))
    layer.value[(cells == (4, 2)).all(axis=1)] = 5
    grid = PixelGrid((0.0, 0.0), (pixel, pixel), (int(600 / pixel), int(600 / pixel)))
    values, coverage = draw(layer, grid)
    middle = (grid.edges(0)[:-1] + grid.edges(0)[1:]) / 2
    left, right = _half_height(values[..., 0].max(axis=0), middle)
    top, bottom = _half_height(values[..., 0].max(axis=1), middle)
    expected = offset + np.array([4, 2]) * side
    np.testing.assert_allclose([left, top, right, bottom], [*expected, *(expected + side)], atol=0.01)
    # The coverage is exact: its sum is the area of all tiles.
    assert coverage.sum() * pixel**2 == pytest.approx(63 * side**2, rel=1e-5)
    # Over its middle the tile keeps its value.
    at = int((expected[1] + side / 2) / pixel), int((expected[0] + side / 2) / pixel)
    assert values[at][0] == pytest.approx(5)


def test_equal_tiles_are_one_colour_and_missing_neighbours_do_not_darken_the_rim() -> None:
    rng = np.random.default_rng(0)
    cells = np.argwhere(rng.random((12, 15)) < 0.5)
    layer = TileLayer(cells[:, ::-1] * 8.0, 8.0, np.full((len(cells), 2), 0.7, np.float32))
    values, coverage = draw(layer, PixelGrid((0.0, 0.0), (1.0, 1.0), (100, 130)))
    expected = np.zeros((100, 130))
    for y, x in cells * 8:
        expected[y : y + 8, x : x + 8] = 1
    np.testing.assert_array_equal(coverage, expected)
    np.testing.assert_allclose(values, 0.7 * expected[..., None].repeat(2, axis=2), rtol=1e-5)


def test_rows_of_a_grid_are_drawn_as_in_the_whole() -> None:
    rng = np.random.default_rng(1)
    cells = np.argwhere(rng.random((9, 9)) < 0.7)
    layer = TileLayer(cells * 20.5 + 3, 20.5, rng.normal(size=(len(cells), 3)).astype(np.float32))
    grid = PixelGrid((3.0, 3.0), (6.1, 6.2), (37, 31))
    whole, whole_coverage = draw(layer, grid)
    parts = [draw(layer, grid.rows(first, min(first + 10, 37))) for first in range(0, 37, 10)]
    np.testing.assert_allclose(np.concatenate([values for values, _ in parts]), whole, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([coverage for _, coverage in parts]), whole_coverage, atol=1e-5)


def test_tiles_off_any_grid_are_blocks_at_their_places() -> None:
    corner = np.array([(10.0, 20.0), (47.5, 30.25), (90.0, 20.0)])
    layer = TileLayer(corner, 30.0, np.array([[1.0], [3.0], [2.0]], np.float32))
    values, coverage = draw(layer, PixelGrid((0.0, 0.0), (0.25, 0.25), (280, 520)))
    for (x, y), value in zip(corner, layer.value[:, 0], strict=True):
        inside = values[int(4 * y) : int(4 * (y + 30)), int(4 * x) : int(4 * (x + 30)), 0]
        np.testing.assert_allclose(inside, value)
    assert coverage.sum() / 16 == pytest.approx(3 * 900)
    # Part of the last tile lies beyond the slide.
    clipped, _ = draw(layer, PixelGrid((0.0, 0.0), (1.0, 1.0), (40, 100)))
    assert (clipped[20:40, 90:100, 0] == 2).all()


def test_merged_layers_are_the_sum_of_the_values_per_area() -> None:
    origin = np.array([(100, 0), (164, 0)])
    mask = np.ones((2, 5), bool)
    mask[1, 2] = mask[0, 0] = False
    value = np.arange(10, dtype=np.float32).reshape(2, 5, 1) + 1
    layers = tile_layers(origin, 64.0, BOXES, mask, value)
    assert [(layer.side, len(layer.corner)) for layer in layers] == [(64.0, 1), (32.0, 7)]
    layer = merged(layers)
    values = {tuple(corner): float(v) for corner, v in zip(layer.corner.tolist(), layer.value[:, 0], strict=True)}
    # The region without a coarse tile has its fine ones alone; the masked fine tile has the coarse one's value alone.
    assert values == {
        **{(100, 0): 8, (132, 0): 12, (100, 32): 16, (132, 32): 20},
        **{(164, 0): 6 + 28, (196, 0): 6, (164, 32): 6 + 36, (196, 32): 6 + 40},
    }
    assert len(merged(layers[:1]).corner) == 1
    # Attention, summed over the area, stays what it was.
    drawn, _ = draw(layer, PixelGrid((0.0, 0.0), (1.0, 1.0), (64, 300)))
    assert drawn.sum() / 64**2 == pytest.approx(value[mask].sum(), rel=1e-5)
