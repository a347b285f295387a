"""Artefacts of synthetic slides: their places and their effects on the section and its picture.

`fold` is tissue in two layers, `pale` is too thin or hardly stained, `dense` too thick or overstained. `blood` (pools of
red cells) and `dust` (dark specks of 2 to 25 µm, in clusters) absorb light. The others change the picture.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from crcjax.slides.synthetic.tissue_map import MAP_UM
from crcjax.slides.synthetic.tissue_textures import Ground, draw_particles

# The score of a tile (`quality_control.QUALITY_NAMES`) that detects each artefact, and whether it rises or falls.
SCORE_OF = {
    "out_of_focus": ("focus", -1),
    "pen": ("pen", 1),
    "fold": ("fold", 1),
    "bubble": ("bubble", 1),
    "blood": ("blood", 1),
    "dust": ("dust", 1),
    "pale": ("pale", 1),
    "dense": ("stain", 1),
}
SYNTHETIC_ARTEFACTS = tuple(SCORE_OF)
_TIMES = {"fold": 2.0, "pale": 0.25, "dense": 3.0}  # factor of the stain
# Particles (as often as named), their distance in µm, the optical density of one (RGB), the least amount between them, the
# part of the stain that remains. Red cells, in plasma, replace tissue; dust lies on top of it.
_LAYERS = {
    "blood": (("erythrocyte",), 6.0, (0.20, 1.05, 1.10), 0.3, 0.3),
    "dust": (("speck",) * 4 + ("grain",) * 2 + ("flake",), 8.0, (1.2, 1.3, 1.4), 0.0, 1.0),
}

Masks = dict[str, Float32[np.ndarray, "y x"]]


def artefact_mask(name: str, shape: tuple[int, int], rng: np.random.Generator) -> Float32[np.ndarray, "y x"]:
    """Places an artefact on a map of that shape; values from 0 to 1, with a soft edge."""
    mask = np.zeros(shape, np.float32)
    start, end = (rng.uniform(0.2, 0.8, 2) * shape[::-1] for _ in range(2))
    if name in ("out_of_focus", "bubble"):
        _disc(mask, start, max(3, int(min(shape) * rng.uniform(0.15, 0.25))))
    elif name == "blood":
        radius = max(3, int(min(shape) * rng.uniform(0.08, 0.12)))
        for away in rng.normal(0, radius, (6, 2)):
            _disc(mask, start + away, radius)
    elif name == "dust":
        for centre in rng.uniform(0.1, 0.9, (6, 2)) * shape[::-1]:
            for away, radius in zip(rng.normal(0, 5, (8, 2)), rng.exponential(2, 8), strict=True):
                _disc(mask, centre + away, int(radius))
    elif name in ("pale", "dense"):  # all on one side of a wavy line
        y, x = np.mgrid[: shape[0], : shape[1]]
        along, across = np.cos(angle := rng.uniform(0, 2 * np.pi)), np.sin(angle)
        place = along * x + across * y + 4 * np.sin((along * y - across * x) / 9)
        mask[place < np.quantile(place, rng.uniform(0.2, 0.35))] = 1
    else:
        thickness = max(2, round((160 if name == "pen" else 60) / MAP_UM))
        cv2.line(mask, start.astype(int).tolist(), end.astype(int).tolist(), 1.0, thickness)
    return np.clip(2 * cv2.GaussianBlur(mask, (0, 0), 1.0) - 0.5, 0, 1)


def _disc(mask: np.ndarray, at: np.ndarray, radius: int) -> None:
    cv2.circle(mask, at.astype(int).tolist(), radius, 1.0, -1)


def corrupt_section(
    ground: Ground, masks: Masks, haematoxylin: np.ndarray, eosin: np.ndarray, x: int, y: int
) -> list[tuple[Float32[np.ndarray, "y x"], tuple[float, ...]]]:
    """Changes the stains of a block at (x, y) in place; returns other absorbing layers: amounts, and the density per amount."""
    layers: list[tuple[np.ndarray, tuple[float, ...]]] = []
    for name, mask in masks.items():
        left = _TIMES.get(name, 1.0)
        if name in _LAYERS and mask.any():
            names, apart_um, density, least, left = _LAYERS[name]
            height, width = mask.shape
            particles = draw_particles(ground, names, apart_um, x, y, width, height)
            layers.append((np.maximum(particles, np.float32(least)) * mask, density))
        if left != 1.0:
            haematoxylin *= 1 + (left - 1) * mask
            eosin *= 1 + (left - 1) * mask
    return layers


def corrupt_picture(
    pixels: UInt8[np.ndarray, "y x 3"], masks: Masks, white: tuple[int, int, int], mpp: float
) -> UInt8[np.ndarray, "y x 3"]:
    """Adds defocus, ink and air bubbles to the picture of a block."""
    for name, mask in masks.items():
        if name in _TIMES or name in _LAYERS or not mask.any():
            continue
        if name == "out_of_focus":
            changed = cv2.GaussianBlur(pixels, (0, 0), 2.5 / mpp).astype(np.float32)
        elif name == "pen":
            changed = pixels * np.array([0.15, 0.45, 0.40], np.float32)
        else:  # an air bubble: smooth and pale within, dark at its rim
            rim = np.clip(1 - np.abs(mask - 0.5) * 4, 0, 1)[..., None]
            changed = 0.6 * cv2.GaussianBlur(pixels, (0, 0), 2.0 / mpp) + 0.4 * np.array(white, np.float32)
            changed *= 1 - 0.7 * rim
        mixed = pixels + (changed - pixels) * mask[..., None]
        pixels = np.where(mask[..., None] > 0, mixed, pixels).astype(np.uint8)
    return pixels
