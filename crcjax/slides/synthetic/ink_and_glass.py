"""Surgical ink on the margin of the tissue, and tinted glass: what a synthetic slide has only on request."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from scipy.ndimage import maximum_filter

from crcjax.slides.synthetic.tissue_map import MAP_UM, smooth_field

LOOKS = ("inked_margin", "tinted_glass")
# Optical densities (RGB) of black, blue, green and orange ink, and of pink, yellow and blue glass.
_INKS = ((1.6, 1.6, 1.5), (1.9, 1.0, 0.35), (1.6, 0.7, 1.2), (0.1, 0.8, 1.6))
_TINTS = ((0.005, 0.05, 0.01), (0.0, 0.015, 0.06), (0.05, 0.02, 0.0))
_INK_UM = 40.0  # how deep ink soaks into the tissue
_FIELD_PX = (
    32  # of the map: the side of the squares that a scanner leaves out if they and their neighbours hold no tissue
)


def inked_margin(kinds: UInt8[np.ndarray, "y x"], seed: int) -> Float32[np.ndarray, "y x"]:
    """The ink on about half of the tissue's border, between 0 and 1 on the map's grid."""
    rng = np.random.default_rng([seed, 8])
    depth = cv2.distanceTransform((kinds > 0).astype(np.uint8), cv2.DIST_L2, 3)
    ink = (depth > 0) & (depth <= _INK_UM / MAP_UM)
    ink &= smooth_field(rng, kinds.shape, 20.0) > 0
    return np.clip(2 * cv2.GaussianBlur(ink.astype(np.float32), (0, 0), 0.7) - 0.5, 0, 1)


def ink_density(seed: int) -> tuple[float, float, float]:
    """The optical density (RGB) of the slide's ink."""
    return _INKS[int(np.random.default_rng([seed, 9]).integers(len(_INKS)))]


def glass_tint(kinds: UInt8[np.ndarray, "y x"], seed: int) -> Float32[np.ndarray, "y x channel"]:
    """The optical density of tinted glass, which varies by a fifth, on the map's grid."""
    rng = np.random.default_rng([seed, 10])
    tint = np.array(_TINTS[int(rng.integers(len(_TINTS)))], np.float32)
    return (1 + 0.1 * np.clip(smooth_field(rng, kinds.shape, 40.0), -2, 2))[..., None].astype(np.float32) * tint


def not_scanned(kinds: UInt8[np.ndarray, "y x"]) -> Bool[np.ndarray, "y x"]:
    """The squares without tissue that scanners leave out and fill with pure white, on the map's grid."""
    height, width = kinds.shape
    padded = np.pad(kinds, ((0, -height % _FIELD_PX), (0, -width % _FIELD_PX)))
    fields = padded.reshape(padded.shape[0] // _FIELD_PX, _FIELD_PX, -1, _FIELD_PX).max(axis=(1, 3))
    is_scanned = maximum_filter(fields, 3) > 0
    return ~is_scanned.repeat(_FIELD_PX, axis=0).repeat(_FIELD_PX, axis=1)[:height, :width]
