import numpy as np
import pytest

from crcjax.slides.tiling.tissue_colour import tissue_colour


def test_the_colour_is_the_median_optical_density_of_the_tissue_alone() -> None:
    thumbnail = np.full((20, 30, 3), 255, np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:15, 5:25] = True
    thumbnail[mask] = (127, 63, 159)
    thumbnail[5:7, 5:25] = 0  # a fifth of the tissue
    assert tissue_colour(thumbnail, mask) == pytest.approx((np.log10(2), np.log10(4), np.log10(256 / 160)))
    assert tissue_colour(thumbnail, np.zeros_like(mask)) is None
