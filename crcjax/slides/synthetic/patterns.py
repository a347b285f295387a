"""Patterns of colorectal tissue that a slide has only on request: their places on its map, and their structures.

`stratified` is dysplastic epithelium with crowded, stratified, hyperchromatic nuclei, as in tubular adenomas. `villous` has the
same epithelium on fronds. `serrated` glands have saw-toothed openings and foamy cytoplasm, `follicles` are lymphoid, with
germinal centres. `mucosa` is normal, with goblet cells; `muscle` and the pale, loose `submucosa` lie below it.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import UInt8

from crcjax.slides.synthetic.structures import Brush, Part, direction, hashed, oval, shrunk
from crcjax.slides.synthetic.tissue_map import Tissue, claim, smooth_field

PATTERNS = {
    "stratified": Tissue.STRATIFIED,
    "villous": Tissue.VILLOUS,
    "serrated": Tissue.SERRATED,
    "follicles": Tissue.FOLLICLES,
    "mucosa": Tissue.MUCOSA,
    "muscle": Tissue.MUSCLE,
    "submucosa": Tissue.SUBMUCOSA,
}
_SHARE = 0.8  # of the map's stroma and simple glands that patterns replace


def add_patterns(kinds: UInt8[np.ndarray, "y x"], names: tuple[str, ...], seed: int) -> UInt8[np.ndarray, "y x"]:
    """Replaces stroma and simple glands of a map by equal parts of the named patterns."""
    rng, kinds = np.random.default_rng([seed, 7]), kinds.copy()
    free = np.isin(kinds, (Tissue.STROMA, Tissue.GLANDS))
    count = int(_SHARE * free.sum() / max(1, len(names)))
    for name in names:
        claim(kinds, free, smooth_field(rng, kinds.shape, 11.0), PATTERNS[name], count)
    return kinds


def draw_patterns(brush: Brush) -> None:
    """Draws the structures of all patterns."""
    first = len(brush.rows)
    _draw_stratified(brush)
    _draw_villous(brush)
    _draw_serrated(brush)
    _draw_follicles(brush)
    _draw_mucosa(brush)
    brush.drop_nuclei(first, (Part.CROWDED, Part.FOAMY, Part.EPITHELIUM))
    for at, u in brush.places(Tissue.SUBMUCOSA, 260.0, 17):
        vessel = oval(at, 14 + 26 * u[0], 0.5 + 0.5 * u[1], u[2:], 0.08)
        brush.fill(vessel, Tissue.STROMA)
        brush.fill(shrunk(vessel, 5.0), Part.BLOOD if u[4] < 0.5 else Part.LUMEN)
        brush.nuclei(shrunk(vessel, 3.0), "fibrocyte", 14.0, along=True)


def _draw_stratified(brush: Brush) -> None:
    for at, u in brush.places(Tissue.STRATIFIED, 116.0, 11):
        gland = oval(at, 54 + 14 * u[0], 0.65 + 0.35 * u[1], u[2:], 0.06)
        brush.fill(gland, Part.CROWDED)
        depth = 27 + 12 * u[4]
        brush.fill(shrunk(gland, depth), Part.LUMEN if u[4] < 0.6 else Tissue.MUCIN)
        _stand_crowded(brush, gland, depth)


def _stand_crowded(brush: Brush, gland: np.ndarray, depth_um: float) -> None:
    """Stands pencil-shaped nuclei in rows from the base of an epithelium to near its surface."""
    for i, below in enumerate(np.arange(5.0, depth_um - 6.0, 5.2)):
        brush.nuclei(shrunk(gland, float(below)), "pencil", 4.4 + 0.5 * i)


def _draw_villous(brush: Brush) -> None:
    lean = np.pi * float(hashed(brush.ground.seed, 31, np.zeros(1, int), np.zeros(1, int), 1)[0, 0])
    for at, u in brush.places(Tissue.VILLOUS, 140.0, 12):
        axis, width, length = direction(lean + 0.7 * (u[0] - 0.5)), 50 + 10 * u[1], 115 + 40 * u[2]
        brush.fill(_frond(at, axis, length + 6, width + 6, u), Part.LUMEN)
        frond = _frond(at, axis, length, width, u)
        depth = 24 + 8 * u[3]
        brush.fill(frond, Part.CROWDED)
        brush.fill(_frond(at, axis, length - depth, width - depth, u), Part.CORE)
        for i, below in enumerate(np.arange(5.0, depth - 5.0, 5.2)):
            # The nuclei lie towards the core, below the surface.
            brush.nuclei(_frond(at, axis, length - depth + below, width - depth + below, u), "pencil", 4.4 + 0.5 * i)


def _frond(at: np.ndarray, axis: np.ndarray, length: float, width: float, u: np.ndarray) -> np.ndarray:
    """A closed outline of that half length and half width with rounded ends and a bent axis."""
    turn = np.linspace(0, 2 * np.pi, max(24, int(0.8 * (length + width))), endpoint=False)
    along = length * np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** 0.7
    across = width * np.sign(np.sin(turn)) * np.abs(np.sin(turn)) ** 0.7 + 12 * np.sin(along / 45 + 6 * u[4])
    return at + along[:, None] * axis + across[:, None] * np.array([-axis[1], axis[0]])


def _draw_serrated(brush: Brush) -> None:
    for at, u in brush.places(Tissue.SERRATED, 128.0, 13):
        gland = oval(at, 58 + 14 * u[0], 0.7 + 0.3 * u[1], u[2:], 0.06)
        brush.fill(gland, Part.FOAMY)
        ray, turn = gland - at, np.linspace(0, 1, len(gland), endpoint=False)
        teeth = np.abs((turn * (7 + int(4 * u[3])) + u[4]) % 1 - 0.5) * 2
        brush.fill(at + ray * (0.22 + 0.34 * teeth)[:, None], Part.LUMEN)
        brush.nuclei(shrunk(gland, 5.0), "basal", 5.4)
        brush.nuclei(shrunk(gland, 11.0), "basal", 11.0)


def _draw_follicles(brush: Brush) -> None:
    for at, u in brush.places(Tissue.FOLLICLES, 400.0, 14):
        follicle = oval(at, 165 + 45 * u[0], 0.75 + 0.25 * u[1], u[2:], 0.04)
        brush.fill(follicle, Part.MANTLE)
        if u[4] < 0.75:
            brush.fill(shrunk(follicle, 55 + 35 * u[3]), Part.GERMINAL)


def _draw_mucosa(brush: Brush) -> None:
    for at, u in brush.places(Tissue.MUCOSA, 106.0, 15):
        crypt = oval(at, 40 + 9 * u[0], 0.7 + 0.3 * u[1], u[2:], 0.04)
        brush.fill(crypt, Part.EPITHELIUM)
        goblets = shrunk(crypt, 17.0)
        for point in goblets[:: max(1, round(len(goblets) * 13 / cv2.arcLength(goblets.astype(np.float32), True)))]:
            brush.fill(oval(point, 6.5, 0.75, u[2:], 0.04), Part.GOBLET)
        brush.fill(shrunk(crypt, 28.0), Part.LUMEN)
        brush.nuclei(shrunk(crypt, 4.5), "basal", 5.6)
