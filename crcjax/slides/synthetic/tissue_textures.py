"""Computes the stains in any block of a synthetic slide from its map of tissue kinds.

A hash of the seed and the place on the slide decides every gland, nucleus and fat cell, so that a block can be painted
alone and fits its neighbours. Sizes are in µm; textures repeat after some hundred µm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from scipy import fft

from crcjax.slides.synthetic.patterns import draw_patterns
from crcjax.slides.synthetic.structures import Brush, Ground, Part, Rows, draw_structures, hashed
from crcjax.slides.synthetic.tissue_map import MAP_UM, Tissue

REACH_UM = 20.0  # the edge of a block may be wrong by half a nucleus and a piece of an outline
_NOISE_PX = 1024


@dataclass(frozen=True)
class _Look:
    """Mean concentrations, the amplitudes of fibres and clouds in them, and nuclei per mm²."""

    eosin: float = 0.0
    haematoxylin: float = 0.0
    fibres: float = 0.0
    clouds: float = 0.0
    nuclei: tuple[tuple[str, int], ...] = ()


_LOOKS: dict[int, _Look] = {
    Tissue.BACKGROUND: _Look(),
    Tissue.GLANDS: _Look(0.46, 0.07, 0.11, 0.06, (("fibrocyte", 900), ("lymphocyte", 350))),
    Tissue.CRIBRIFORM: _Look(0.44, 0.07, 0.11, 0.05, (("fibrocyte", 900), ("lymphocyte", 300))),
    Tissue.STROMA: _Look(0.54, 0.06, 0.13, 0.06, (("fibrocyte", 900), ("lymphocyte", 200))),
    Tissue.DESMOPLASTIC: _Look(0.42, 0.13, 0.13, 0.05, (("plump", 3000), ("lymphocyte", 150))),
    Tissue.LYMPHOID: _Look(0.24, 0.13, 0.03, 0.04, (("lymphocyte", 10500),)),
    Tissue.MUCIN: _Look(0.05, 0.13, 0.035, 0.03, (("debris", 60),)),
    Tissue.NECROSIS: _Look(0.62, 0.09, 0.0, 0.13, (("debris", 2600),)),
    Tissue.ADIPOSE: _Look(0.30, 0.05),
    Tissue.STRATIFIED: _Look(0.20, 0.08, 0.10, 0.05, (("fibrocyte", 900), ("lymphocyte", 2200))),
    Tissue.VILLOUS: _Look(0.015, 0.01, 0.0, 0.008),
    Tissue.SERRATED: _Look(0.36, 0.08, 0.10, 0.05, (("fibrocyte", 900), ("lymphocyte", 1500))),
    Tissue.FOLLICLES: _Look(0.28, 0.12, 0.05, 0.05, (("dark lymphocyte", 13500), ("fibrocyte", 700))),
    Tissue.MUCOSA: _Look(0.34, 0.08, 0.08, 0.05, (("lymphocyte", 4000), ("fibrocyte", 700))),
    Tissue.MUSCLE: _Look(0.70, 0.26, 0.26, 0.07, (("myocyte", 4000), ("lymphocyte", 500))),
    Tissue.SUBMUCOSA: _Look(0.13, 0.09, 0.08, 0.04, (("pale", 4500), ("lymphocyte", 150))),
    Part.EPITHELIUM: _Look(0.42, 0.20, 0.0, 0.05),
    Part.SHEET: _Look(0.42, 0.20, 0.0, 0.05, (("epithelial", 5200),)),
    Part.LUMEN: _Look(0.015, 0.01, 0.0, 0.008),
    Part.DEBRIS: _Look(0.60, 0.12, 0.0, 0.12, (("debris", 5500),)),
    Part.BLOOD: _Look(0.95, 0.0, 0.0, 0.15),
    Part.CROWDED: _Look(0.75, 0.34, 0.0, 0.06),
    Part.CORE: _Look(0.20, 0.08, 0.08, 0.05, (("lymphocyte", 2500), ("fibrocyte", 1200))),
    Part.GOBLET: _Look(0.05, 0.12, 0.0, 0.03),
    Part.FOAMY: _Look(0.24, 0.18, 0.0, 0.09),
    Part.MANTLE: _Look(0.24, 0.15, 0.0, 0.04, (("dark lymphocyte", 18000),)),
    Part.GERMINAL: _Look(0.28, 0.16, 0.0, 0.05, (("centroblast", 13000),)),
}
# Looks of slides with patterns, within the range of real tiles (tools/painter_statistics.py). Default slides keep their pixels,
# which are paler and poorer in nuclei.
_REAL_LOOKS = _LOOKS | {
    Tissue.STROMA: _Look(0.27, 0.20, 0.28, 0.07, (("fibrocyte", 5000), ("lymphocyte", 2500))),
    Tissue.DESMOPLASTIC: _Look(0.24, 0.19, 0.28, 0.06, (("plump", 6000), ("lymphocyte", 1500))),
    Tissue.LYMPHOID: _Look(0.24, 0.10, 0.04, 0.06, (("dark lymphocyte", 15500),)),
    Tissue.MUCIN: _Look(0.06, 0.16, 0.07, 0.07, (("debris", 1500), ("lymphocyte", 1200), ("fibrocyte", 600))),
    Tissue.NECROSIS: _Look(0.62, 0.20, 0.0, 0.22, (("debris", 6500),)),
    Tissue.ADIPOSE: _Look(0.30, 0.05, nuclei=(("fibrocyte", 6000),)),
    Part.LUMEN: _Look(0.008, 0.0, 0.0, 0.004),
}


def _table(looks: dict[int, _Look]) -> Float32[np.ndarray, "kind column"]:
    table = np.zeros((256, 4), np.float32)
    for kind, look in looks.items():
        table[kind] = look.eosin, look.haematoxylin, look.fibres, look.clouds
    return table


_TABLE, _REAL_TABLE = _table(_LOOKS), _table(_REAL_LOOKS)


@dataclass(frozen=True)
class _Nucleus:
    """Half axes, the spread of their size, the concentration of haematoxylin, or of another particle's own pigment."""

    long_um: float
    short_um: float
    spread: float
    concentration: float
    vesicular: bool = False


_NUCLEI = {
    "epithelial": _Nucleus(5.0, 3.0, 0.15, 1.15, vesicular=True),
    "lymphocyte": _Nucleus(3.1, 2.9, 0.10, 1.55),
    "dark lymphocyte": _Nucleus(3.1, 2.9, 0.10, 1.9),
    "fibrocyte": _Nucleus(7.5, 1.3, 0.25, 1.15),
    "plump": _Nucleus(8.0, 2.6, 0.20, 1.05, vesicular=True),
    "pencil": _Nucleus(6.5, 2.1, 0.15, 1.0),
    "basal": _Nucleus(3.8, 2.5, 0.15, 1.5),
    "centroblast": _Nucleus(4.3, 3.9, 0.15, 1.6, vesicular=True),
    "pale": _Nucleus(7.0, 1.6, 0.25, 0.5),
    "myocyte": _Nucleus(10.0, 1.7, 0.25, 1.0),
    "debris": _Nucleus(1.5, 1.1, 0.40, 1.25),
    "erythrocyte": _Nucleus(3.7, 3.4, 0.08, 1.0, vesicular=True),
    "speck": _Nucleus(2.0, 1.5, 0.40, 1.0),
    "grain": _Nucleus(5.0, 4.0, 0.40, 1.0),
    "flake": _Nucleus(9.0, 5.0, 0.40, 1.0),
}
_SPINDLES = ("fibrocyte", "plump", "pale", "myocyte")  # nuclei that lie along the fibres
_SIZES, _TURNS = 4, 16
# At most one nucleus in a cell of this side, except for those along outlines; smaller in slides with patterns, whose lymphoid
# tissue is as crowded as real tissue.
_CELL_UM, _REAL_CELL_UM = 9.0, 7.0


def draw_stains(
    ground: Ground, x: int, y: int, width: int, height: int
) -> tuple[Float32[np.ndarray, "y x"], Float32[np.ndarray, "y x"]]:
    """Computes concentrations of haematoxylin and eosin in a block at (x, y), in px of `ground.mpp`; about 0 to 2.

    They depend only on the place, except within REACH_UM of the edge of the block.
    """
    zones = _zones(ground, x, y, width, height)
    if not zones.any():
        return np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    brush = Brush(ground, zones, x, y)
    draw_structures(brush)
    if ground.has_patterns:
        draw_patterns(brush)
    table = _REAL_TABLE if ground.has_patterns else _TABLE
    eosin, haematoxylin, fibres, clouds = (_looked_up(zones, column) for column in table.T)
    fibres *= _fibres(ground, x, y, width, height)
    clouds *= _wrapped(_noise(0, 6.0, ground.mpp), x + _shift(ground, 1), y + _shift(ground, 2), width, height)
    eosin += fibres
    eosin += clouds
    haematoxylin += np.float32(0.5) * clouds
    np.maximum(haematoxylin, 0, out=haematoxylin)
    _stamp(ground.mpp, haematoxylin, brush.rows + _scattered(ground, zones, x, y))
    eosin *= 1 - np.float32(0.45) * np.minimum(haematoxylin, 1)  # nuclei absorb little eosin
    np.maximum(eosin, 0, out=eosin)
    return haematoxylin, eosin


def _looked_up(zones: np.ndarray, column: np.ndarray) -> Float32[np.ndarray, "y x"]:
    return cv2.LUT(zones, np.ascontiguousarray(column)).astype(np.float32, copy=False)


def _zones(ground: Ground, x: int, y: int, width: int, height: int) -> UInt8[np.ndarray, "y x"]:
    """The map's kinds at every pixel; borders are roughened by about 9 µm."""
    step = MAP_UM / ground.mpp
    noise = _noise(1, 13.0, ground.mpp) * np.float32(9.0 / ground.mpp)
    shift = _shift(ground, 3)
    # Read from a window of the map: cv2.remap takes no map larger than 32767 px, and floats stay precise.
    left, top = max(0, int(x / step) - 4), max(0, int(y / step) - 4)
    window = ground.kinds[top : int((y + height) / step) + 5, left : int((x + width) / step) + 5]
    columns = (np.arange(x, x + width) / step - 0.5 - left).astype(np.float32)
    rows = (np.arange(y, y + height) / step - 0.5 - top).astype(np.float32)
    return cv2.remap(
        np.ascontiguousarray(window),
        _wrapped(noise, x + shift, y, width, height) / np.float32(step) + columns,
        _wrapped(noise, x, y + shift, width, height) / np.float32(step) + rows[:, None],
        cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_CONSTANT,
    )


def _scattered(ground: Ground, zones: np.ndarray, x: int, y: int) -> list[Rows]:
    """Scatters nuclei at the density of each zone."""
    looks, cell_um = (_REAL_LOOKS, _REAL_CELL_UM) if ground.has_patterns else (_LOOKS, _CELL_UM)
    px, py, u = _scattered_places(ground, cell_um, 9, x, y, *zones.shape[::-1])
    zone = zones[py, px]
    along = _fibre_angle(ground, px + x, py + y)
    rows = []
    for kind, look in looks.items():
        low = 0.0
        for name, density in look.nuclei:
            high = low + density * cell_um**2 * 1e-6
            i = np.flatnonzero((zone == kind) & (u[2] >= low) & (u[2] < high))
            low = high
            angle = along[i] + 0.5 * (u[3, i] - 0.5) if name in _SPINDLES else np.pi * u[3, i]
            rows.append(Rows(name, px[i], py[i], angle, u[4, i]))
    return rows


def draw_particles(
    ground: Ground, names: Sequence[str], apart_um: float, x: int, y: int, width: int, height: int
) -> Float32[np.ndarray, "y x"]:
    """Scatters particles of these kinds, in equal numbers, about `apart_um` apart over a block: about 1 on a particle, else 0.

    They depend only on the place, except within REACH_UM of the edge of the block.
    """
    px, py, u = _scattered_places(ground, apart_um, 20, x, y, width, height)
    which = (u[2] * len(names)).astype(int)
    amount = np.zeros((height, width), np.float32)
    of = [(name, which == i) for i, name in enumerate(names)]
    _stamp(ground.mpp, amount, [Rows(name, px[i], py[i], np.pi * u[3, i], u[4, i]) for name, i in of])
    return amount


def _scattered_places(
    ground: Ground, pitch_um: float, purpose: int, x: int, y: int, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scatters places, one in each cell of a grid: px of the block, and five numbers in [0, 1) for each."""
    pitch = pitch_um / ground.mpp
    column, row = (
        grid.ravel()
        for grid in np.meshgrid(
            np.arange(int(x // pitch), int((x + width) // pitch) + 1),
            np.arange(int(y // pitch), int((y + height) // pitch) + 1),
        )
    )
    u = hashed(ground.seed, purpose, column, row, 5)
    px = np.floor((column + 0.7 * u[0]) * pitch).astype(int) - x
    py = np.floor((row + 0.7 * u[1]) * pitch).astype(int) - y
    inside = (px >= 0) & (py >= 0) & (px < width) & (py < height)
    return px[inside], py[inside], u[:, inside]


def _stamp(mpp: float, haematoxylin: np.ndarray, rows: list[Rows]) -> None:
    """Adds nuclei to the block; where two overlap, the larger concentration counts, so that order does not matter."""
    height, width = haematoxylin.shape
    for row in rows:
        sprites = _sprites(row.name, mpp)
        half = sprites[0].shape[0] // 2
        look = (row.size * _SIZES).astype(int) * _TURNS + np.rint(row.angle * (_TURNS / np.pi)).astype(int) % _TURNS
        near = (row.x > -half) & (row.y > -half) & (row.x < width + half) & (row.y < height + half)
        left, top = row.x - half, row.y - half
        for i in np.flatnonzero(near).tolist():
            sprite, x, y = sprites[look[i]], int(left[i]), int(top[i])
            cut_x, cut_y = max(0, -x), max(0, -y)
            part = haematoxylin[y + cut_y : y + 2 * half + 1, x + cut_x : x + 2 * half + 1]
            np.maximum(part, sprite[cut_y : cut_y + part.shape[0], cut_x : cut_x + part.shape[1]], out=part)


@lru_cache
def _sprites(name: str, mpp: float) -> list[np.ndarray]:
    """Soft-edged nuclei with coarse chromatin, in _SIZES sizes by _TURNS directions."""
    nucleus = _NUCLEI[name]
    half = int(np.ceil(nucleus.long_um * (1 + nucleus.spread) / mpp)) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    sprites = []
    for size in np.linspace(1 - nucleus.spread, 1 + nucleus.spread, _SIZES):
        for turn in range(_TURNS):
            angle = turn * np.pi / _TURNS
            along = (x * np.cos(angle) + y * np.sin(angle)) * mpp / (nucleus.long_um * size)
            across = (y * np.cos(angle) - x * np.sin(angle)) * mpp / (nucleus.short_um * size)
            radius = np.hypot(along, across)
            edge = np.clip((1 - radius) * nucleus.short_um * size / mpp + 0.5, 0, 1)
            # Open chromatin: paler inside than at the membrane.
            inner = 0.72 + 0.28 * np.clip((radius - 0.5) / 0.4, 0, 1) if nucleus.vesicular else 1.0
            chromatin = 1 + 0.1 * _noise(2, 0.7, mpp)[: 2 * half + 1, 40 * turn : 40 * turn + 2 * half + 1]
            sprites.append((nucleus.concentration * edge * inner * chromatin).astype(np.float32))
    return sprites


def _fibres(ground: Ground, x: int, y: int, width: int, height: int) -> Float32[np.ndarray, "y x"]:
    """Wavy streaks: a texture of straight streaks, sampled along bent coordinates."""
    angle, bend = _fibre_course(ground)
    warp = _wrapped(_noise(3, 40.0, ground.mpp), x, y, width, height)
    scale = ground.mpp * 2
    columns, rows = np.arange(x, x + width) * scale, (np.arange(y, y + height) * scale)[:, None]
    cos, sin = np.cos(angle), np.sin(angle)
    # Wrapped in double precision, so that floats are exact far from the origin.
    along = (cos * columns % _NOISE_PX).astype(np.float32) + (sin * rows % _NOISE_PX).astype(np.float32)
    across = (-sin * columns % _NOISE_PX).astype(np.float32) + (cos * rows % _NOISE_PX).astype(np.float32)
    across += np.float32(bend * scale) * warp
    return cv2.remap(_streaks(), along, across, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def _fibre_course(ground: Ground) -> tuple[float, float]:
    """The fibres' main direction, and by how many px their bends leave it."""
    rng = np.random.default_rng([ground.seed, 2])
    return float(rng.uniform(0, np.pi)), float(rng.uniform(16, 30) / ground.mpp)


def _fibre_angle(ground: Ground, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The direction of the fibres at each place: across the gradient of the bent coordinate."""
    angle, bend = _fibre_course(ground)
    texture = _noise(3, 40.0, ground.mpp)
    here = texture[y % _NOISE_PX, x % _NOISE_PX]
    right = texture[y % _NOISE_PX, (x + 4) % _NOISE_PX]
    below = texture[(y + 4) % _NOISE_PX, x % _NOISE_PX]
    slope_x = -np.sin(angle) + (right - here) / 4 * bend
    slope_y = np.cos(angle) + (below - here) / 4 * bend
    return np.arctan2(slope_y, slope_x) - np.pi / 2


@lru_cache
def _streaks() -> Float32[np.ndarray, "y x"]:
    """Crimped streaks along x, periodic, half a µm a pixel, of unit deviation."""
    fine, coarse = _periodic(4, 60.0, 1.3), _periodic(5, 120.0, 6.0)
    crimp = np.rint(5 * np.sin(np.arange(_NOISE_PX) * (2 * np.pi * 14 / _NOISE_PX))).astype(int)
    field = (0.7 * fine + 0.7 * coarse)[(np.arange(_NOISE_PX)[:, None] + crimp) % _NOISE_PX, np.arange(_NOISE_PX)]
    return np.ascontiguousarray(field)


@lru_cache
def _noise(index: int, sigma_um: float, mpp: float) -> Float32[np.ndarray, "y x"]:
    """Smooth periodic noise of unit deviation."""
    return _periodic(index, sigma_um / mpp, sigma_um / mpp)


def _periodic(index: int, sigma_x: float, sigma_y: float) -> Float32[np.ndarray, "y x"]:
    """White noise with a Gaussian filter, computed in the frequency domain."""
    white = np.random.default_rng([index, 3]).standard_normal((_NOISE_PX, _NOISE_PX), dtype=np.float32)
    fall = [np.exp(-2 * (np.pi * sigma * fft.fftfreq(_NOISE_PX)) ** 2) for sigma in (sigma_y, sigma_x)]
    transfer = fall[0][:, None] * fall[1][None, : _NOISE_PX // 2 + 1]
    field = fft.irfft2(fft.rfft2(white) * transfer.astype(np.float32))
    return field / field.std()


def _wrapped(texture: np.ndarray, x: int, y: int, width: int, height: int) -> Float32[np.ndarray, "y x"]:
    """A window of a periodic texture."""
    rolled = np.roll(texture, (-y % _NOISE_PX, -x % _NOISE_PX), axis=(0, 1))[:height, :width]
    below, right = height - rolled.shape[0], width - rolled.shape[1]
    return cv2.copyMakeBorder(rolled, 0, below, 0, right, cv2.BORDER_WRAP)


def _shift(ground: Ground, purpose: int) -> int:
    """Where this slide's window of a texture begins."""
    return int(_NOISE_PX * hashed(ground.seed, 10 + purpose, np.zeros(1, int), np.zeros(1, int), 1)[0, 0])
