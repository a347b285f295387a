"""How much of each box a mask covers."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float


def box_shares(
    mask: Bool[np.ndarray, "y x"],
    start: Float[np.ndarray, "*box 2"],
    end: Float[np.ndarray, "*box 2"],
    *,
    outside_counts: bool,
) -> Float[np.ndarray, "*box"]:
    """The share of each box that a mask covers, by an integral image.

    Args:
      mask: the map.
      start: (x, y) of each box's top-left corner, in pixels of the mask; rounded to whole pixels.
      end: (x, y) of its bottom-right corner.
      outside_counts: True if the part of a box outside the mask counts as not covered; False if it is ignored, so that
        the share is that of the part inside.

    Returns:
      Shares from 0 to 1; 0 for a box that lies outside the mask or has no pixel.
    """
    start, end = np.rint(start), np.rint(end)
    limit = np.array(mask.shape[::-1])
    inner_start, inner_end = np.clip(start, 0, limit).astype(int), np.clip(end, 0, limit).astype(int)
    (x0, y0), (x1, y1) = np.moveaxis(inner_start, -1, 0), np.moveaxis(inner_end, -1, 0)
    integral = cv2.integral(mask.astype(np.uint8))
    covered = integral[y1, x1] - integral[y0, x1] - integral[y1, x0] + integral[y0, x0]
    sides = end - start if outside_counts else inner_end - inner_start
    return covered / np.maximum(sides, 1).prod(axis=-1)
