"""The colour of a slide's tissue, by which its stain is compared with that of other slides."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, UInt8


def tissue_colour(
    thumbnail: UInt8[np.ndarray, "y x 3"], tissue_mask: Bool[np.ndarray, "y x"]
) -> tuple[float, float, float] | None:
    """The median optical density of the tissue in red, green and blue; None without tissue.

    Optical density is -log10 of the transmitted share of white light. Medians hardly change with the size of the thumbnail.
    """
    tissue = thumbnail[tissue_mask]
    if not len(tissue):
        return None
    red, green, blue = -np.log10((np.median(tissue, axis=0) + 1) / 256)
    return float(red), float(green), float(blue)
