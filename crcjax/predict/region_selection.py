"""The first stage of prediction in two stages: a pass over a small picture of the slide chooses the regions that are encoded.

Regions are ordered by their appearance at the thumbnail's 8 µm per pixel, and every n-th is chosen, so that the chosen ones
hold each tissue in its share of the slide. The expensive stages, decoding and encoding, see these regions alone.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from jaxtyping import Float32, Int

from crcjax.errors import InputError
from crcjax.slides.tiling.plan import TilePlan
from crcjax.slides.tiling.tissue_segmentation import optical_density

# A slide with fewer regions is encoded whole: there is little to save.
_FEWEST_REGIONS = 8


def check_region_share(share: float) -> None:
    """Raises InputError unless a share of regions is above 0 and at most 1."""
    if not 0 < share <= 1:
        raise InputError(f"region share must be above 0 and at most 1, got {share:g}; try 0.25, or 1 for whole slides")


def select_regions(plan: TilePlan, width: int, share: float) -> TilePlan:
    """The plan with a share of its regions, in their order; rounded up, and at least `_FEWEST_REGIONS` if there are as many.

    Args:
      plan: all regions with tissue.
      width: the width of the slide in level-0 px.
      share: the share of regions, above 0 and at most 1.
    """
    regions = len(plan.origin)
    count = min(regions, max(_FEWEST_REGIONS, int(np.ceil(share * regions))))
    if count == regions:
        return plan
    chosen = spread(_appearance(plan, width), count)
    return replace(plan, origin=plan.origin[chosen], mask=plan.mask[chosen])


def spread(appearance: Float32[np.ndarray, "region score"], count: int) -> Int[np.ndarray, " chosen"]:
    """The numbers of `count` regions at equal distances in the order of the first principal component."""
    centred = appearance - appearance.mean(axis=0)
    scaled = centred / np.maximum(centred.std(axis=0), 1e-6)
    _, vectors = np.linalg.eigh(scaled.T @ scaled)
    order = np.argsort(scaled @ vectors[:, -1], kind="stable")
    places = ((np.arange(count) + 0.5) * len(order) / count).astype(int)
    return np.sort(order[places])


def _appearance(plan: TilePlan, width: int) -> Float32[np.ndarray, "region score"]:
    """Means and standard deviations of the optical densities of every region, and its share of tissue, on the thumbnail."""
    density = optical_density(plan.thumbnail, plan.tissue.white)
    channels = [*density, *density**2, plan.tissue_mask.astype(np.float32)]
    sums = np.stack([cv2.integral(channel) for channel in channels], axis=-1)
    px_per_level_0 = plan.thumbnail.shape[1] / width
    left, top = (np.clip(np.rint(plan.origin[:, axis] * px_per_level_0), 0, None).astype(int) for axis in (0, 1))
    side = max(1, round(plan.region_px * px_per_level_0))
    right, bottom = np.minimum(left + side, sums.shape[1] - 1), np.minimum(top + side, sums.shape[0] - 1)
    areas = np.maximum((right - left) * (bottom - top), 1)[:, None]
    means = (sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]) / areas
    deviations = np.sqrt(np.maximum(means[:, 3:6] - means[:, :3] ** 2, 0))
    return np.concatenate([means[:, :3], deviations, means[:, 6:]], axis=1).astype(np.float32)
