"""The map of tissue kinds of a synthetic colorectal slide, with MAP_UM per pixel.

The three subtypes differ in part of the tissue, as the literature describes: cohesive cribriform
epithelium with dirty necrosis (canonical), dense lymphocytes at the margin and in the tumour (immune), desmoplastic
stroma with plump spindle cells (stromal). Every slide has some of each.
"""

from __future__ import annotations

from enum import IntEnum

import cv2
import numpy as np
from jaxtyping import UInt8
from scipy.ndimage import gaussian_filter

MAP_UM = 16.0  # side of a pixel of the map
SUBTYPES = ("canonical", "immune", "stromal")


class Tissue(IntEnum):
    """Kinds of tissue on the map."""

    BACKGROUND = 0
    GLANDS = 1
    CRIBRIFORM = 2
    STROMA = 3
    DESMOPLASTIC = 4
    LYMPHOID = 5
    MUCIN = 6
    NECROSIS = 7
    ADIPOSE = 8
    # Kinds of `patterns`, which default slides do not have.
    STRATIFIED = 9
    VILLOUS = 10
    SERRATED = 11
    FOLLICLES = 12
    MUCOSA = 13
    MUSCLE = 14
    SUBMUCOSA = 15


CARRIER = {"canonical": Tissue.CRIBRIFORM, "immune": Tissue.LYMPHOID, "stromal": Tissue.DESMOPLASTIC}


def architecture(subtype: str, seed: int, width_um: float, height_um: float) -> UInt8[np.ndarray, "y x"]:
    """Creates the map of a slide of that size.

    The subtype's own signature covers 18 to 40 % of the tissue, each of the others 0.5 to 8 %.
    """
    rng = np.random.default_rng([seed, 1])
    shape = (max(8, round(height_um / MAP_UM)), max(8, round(width_um / MAP_UM)))
    outline = _outline(rng, shape)
    inside = cv2.distanceTransform(outline.astype(np.uint8), cv2.DIST_L2, 3)
    kinds = np.where(outline, Tissue.STROMA, Tissue.BACKGROUND).astype(np.uint8)
    free = outline.copy()
    total = outline.sum()
    shares = {Tissue.MUCIN: 0.06, Tissue.NECROSIS: 0.06, Tissue.ADIPOSE: 0.05}
    shares = {kind: rng.uniform(0.2, 1.8) * share for kind, share in shares.items()}
    for name, kind in CARRIER.items():
        shares[kind] = rng.uniform(0.18, 0.40) if name == subtype else rng.uniform(0.005, 0.08)
    # The largest share is placed first, so that it finds room for patches rather than remnants.
    for kind in sorted(shares, key=lambda kind: -shares[kind]):
        field = smooth_field(rng, shape, 11.0 if shares[kind] > 0.1 else 5.0)
        if kind in (Tissue.LYMPHOID, Tissue.ADIPOSE):
            field = field - 0.05 * np.minimum(inside, 20)  # at the invasive margin, and outside the tumour
        claim(kinds, free, field, kind, int(np.ceil(shares[kind] * total)))
    claim(kinds, free, smooth_field(rng, shape, 5.0), Tissue.GLANDS, int(rng.uniform(0.25, 0.75) * free.sum()))
    return kinds


def _outline(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """One piece of tissue with an irregular border that covers 45 to 75 % of the slide."""
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j].astype(np.float32)
    radius = np.hypot(x * rng.uniform(0.85, 1.15), y * rng.uniform(0.85, 1.15))
    field = 0.25 * smooth_field(rng, shape, max(shape) / 10) + 0.05 * smooth_field(rng, shape, 2.0) - radius
    outline = field > np.quantile(field, 1 - rng.uniform(0.45, 0.75))
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(outline.astype(np.uint8))
    return labels == 1 + np.argmax(statistics[1:, cv2.CC_STAT_AREA])


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    coarse = max(1, int(sigma / 4))  # a wide filter would take minutes on a large slide
    small = [max(2, -(-side // coarse)) for side in shape]
    field = gaussian_filter(rng.standard_normal(small).astype(np.float32), sigma / coarse, mode="reflect")
    field = cv2.resize(field, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return field / max(float(field.std()), 1e-6)


def claim(kinds: np.ndarray, free: np.ndarray, field: np.ndarray, kind: Tissue, count: int) -> None:
    candidates = np.flatnonzero(free)
    count = min(count, len(candidates))
    chosen = candidates[np.argsort(-field.flat[candidates], kind="stable")[:count]]
    kinds.flat[chosen] = kind
    free.flat[chosen] = False
