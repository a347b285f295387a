import numpy as np
import pytest

from crcjax.slides.tiling.box_shares import box_shares


@pytest.mark.parametrize("outside_counts", [True, False])
def test_shares_are_the_means_of_the_boxes_with_the_outside_counted_or_ignored(outside_counts: bool) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((30, 40)) < 0.4
    start = rng.uniform(-12, 40, (7, 9, 2))
    end = start + rng.uniform(0, 15, (7, 9, 1))
    shares = box_shares(mask, start, end, outside_counts=outside_counts)
    padded = np.pad(mask, 60)
    inside = np.pad(np.ones_like(mask), 60)
    for index in np.ndindex(7, 9):
        (x0, y0), (x1, y1) = np.rint(start[index]).astype(int) + 60, np.rint(end[index]).astype(int) + 60
        box, within = padded[y0:y1, x0:x1], inside[y0:y1, x0:x1]
        pixels = box.size if outside_counts else within.sum()
        assert shares[index] == pytest.approx(box.sum() / max(pixels, 1))


def test_a_box_outside_the_mask_or_without_a_pixel_has_the_share_0() -> None:
    start = np.array([[50.0, 50.0], [3.0, 3.0]])
    end = np.array([[59.0, 59.0], [3.1, 8.0]])
    for outside_counts in (True, False):
        shares = box_shares(np.ones((10, 10), bool), start, end, outside_counts=outside_counts)
        assert shares.tolist() == [0, 0]
