"""Scores of a tile's pixels that decide whether a model may see it."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from crcjax.slides.tissue import TissueModel

QUALITY_NAMES = ("tissue", "sharpness")
_SCORED_PX = 64  # the stain of a tile is judged on this many pixels a side
_ROUNDING = 2.0  # Laplacian variance that rounding to whole intensities gives a smooth picture: 20 / 12, and some more


def score_tile(tile: UInt8[np.ndarray, "y x 3"], model: TissueModel) -> Float32[np.ndarray, " score"]:
    """The scores named in QUALITY_NAMES.

    `tissue`: the stained fraction of the tile, 0 to 1. `sharpness`: the variance of the Laplacian over the variance of
    the green channel, so that pale and dense tissue compare; about 0.5 to 3 in focus, towards 0 when blurred, 0 on a
    tile of one colour.
    """
    small = cv2.resize(tile, (_SCORED_PX, _SCORED_PX), interpolation=cv2.INTER_AREA)
    green = np.ascontiguousarray(tile[..., 1])
    contrast = float(cv2.meanStdDev(green)[1][0, 0]) ** 2
    detail = float(cv2.meanStdDev(cv2.Laplacian(green, cv2.CV_16S))[1][0, 0]) ** 2
    sharpness = max(0.0, detail - _ROUNDING) / contrast if contrast > 1 else 0.0
    return np.array([model.stained(small).mean(), sharpness], np.float32)
