"""Draws the outlines of glands, vessels and fat cells into a block of a synthetic slide.

A hash of the seed and the place on the slide decides every one of them, so that a block can be painted alone and fits its
neighbours. Sizes are in µm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import cv2
import numpy as np
from jaxtyping import UInt8

from crcjax.slides.synthetic.tissue_map import MAP_UM, Tissue

_FIRST_PART = len(Tissue)


class Part(IntEnum):
    """Parts of structures, only within a block; their codes continue those of Tissue."""

    EPITHELIUM = _FIRST_PART
    SHEET = _FIRST_PART + 1
    LUMEN = _FIRST_PART + 2
    DEBRIS = _FIRST_PART + 3
    BLOOD = _FIRST_PART + 4
    CROWDED = _FIRST_PART + 5
    CORE = _FIRST_PART + 6
    GOBLET = _FIRST_PART + 7
    FOAMY = _FIRST_PART + 8
    MANTLE = _FIRST_PART + 9
    GERMINAL = _FIRST_PART + 10


@dataclass(frozen=True)
class Ground:
    """The input of painting: a slide's map, seed and scale, and whether the map has kinds of `patterns`."""

    kinds: UInt8[np.ndarray, "row column"]
    seed: int
    mpp: float
    has_patterns: bool = False


@dataclass(frozen=True)
class Rows:
    """Nuclei of one kind: px of the block, directions in radians, sizes in [0, 1)."""

    name: str
    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    size: np.ndarray


def draw_structures(brush: Brush) -> None:
    """Draws glands, cribriform sheets, buds, vessels and fat cells."""
    for at, u in brush.places(Tissue.ADIPOSE, 46.0, 1):
        fat = oval(at, 27 + 3 * u[0], 0.85 + 0.15 * u[1], u[2:], 0.05)
        brush.fill(fat, Part.LUMEN)
        brush.line(fat, Tissue.ADIPOSE, 1.5)
    for kind in (Tissue.STROMA, Tissue.DESMOPLASTIC):
        for at, u in brush.places(kind, 210.0, 2):
            if u[4] < 0.4:
                vessel = oval(at, 11 + 16 * u[0], 0.5 + 0.5 * u[1], u[2:], 0.08)
                brush.fill(vessel, Tissue.STROMA)
                brush.fill(shrunk(vessel, 4.0), Part.BLOOD if u[4] < 0.25 else Part.LUMEN)
                brush.nuclei(shrunk(vessel, 3.0), "fibrocyte", 14.0, along=True)
    for at, u in brush.places(Tissue.GLANDS, 122.0, 3):
        gland = oval(at, 46 + 18 * u[0], 0.65 + 0.35 * u[1], u[2:], 0.07)
        brush.fill(gland, Part.EPITHELIUM)
        brush.fill(shrunk(gland, 17 + 8 * u[4]), Part.DEBRIS if u[4] < 0.1 else Part.LUMEN)
        brush.nuclei(shrunk(gland, 5.5), "epithelial", 5.6)
        brush.nuclei(shrunk(gland, 11.0), "epithelial", 11.0)
    for at, u in brush.places(Tissue.CRIBRIFORM, 162.0, 4):
        sheet = oval(at, 86 + 20 * u[0], 0.75 + 0.25 * u[1], u[2:], 0.06)
        brush.fill(sheet, Part.SHEET)
        brush.nuclei(shrunk(sheet, 5.0), "epithelial", 5.6)
        for turn in range(7):  # one lumen in the middle, six around it
            v = np.modf((u + 0.37 * turn) * 7.3)[0]
            away = 0 if turn == 0 else 46 + 16 * v[5]
            angle = turn * np.pi / 3 + 6 * u[2] + 0.5 * v[4]
            hole = oval(at + away * direction(angle), 7 + 12 * v[0], 0.7 + 0.3 * v[1], v[2:], 0.06)
            brush.fill(shrunk(hole, -9.0), Part.EPITHELIUM)
            brush.fill(hole, Part.DEBRIS if v[4] < 0.4 else Part.LUMEN)
            brush.nuclei(shrunk(hole, -6.0), "epithelial", 6.5)
    for kind, share in ((Tissue.DESMOPLASTIC, 0.4), (Tissue.MUCIN, 0.4)):
        for at, u in brush.places(kind, 95.0, 5):
            if u[4] < share:  # tumour buds; islets that float in mucin
                bud = oval(at, 10 + 9 * u[0], 0.5 + 0.4 * u[1], u[2:], 0.08)
                brush.fill(bud, Part.EPITHELIUM)
                brush.nuclei(shrunk(bud, 5.0), "epithelial", 6.5)


class Brush:
    """Draws outlines, in µm of the slide, into the zones of a block and collects the nuclei that line them."""

    def __init__(self, ground: Ground, zones: np.ndarray, x: int, y: int):
        self.ground, self.zones, self.corner = ground, zones, np.array([x, y])
        self.rows: list[Rows] = []

    def places(self, kind: int, pitch_um: float, purpose: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Jittered hexagonal grid points near the block where the map has that kind, each with six numbers in [0, 1)."""
        kinds, mpp = self.ground.kinds, self.ground.mpp
        low = self.corner * mpp // pitch_um - 2
        high = (self.corner + self.zones.shape[::-1]) * mpp // pitch_um + 3
        column, row = (
            grid.ravel() for grid in np.meshgrid(*(np.arange(int(a), int(b)) for a, b in zip(low, high, strict=True)))
        )
        u = hashed(self.ground.seed, purpose, column, row, 8)
        at_x = (column + 0.5 * (row % 2) + 0.3 * u[6]) * pitch_um
        at_y = (row + 0.3 * u[7]) * pitch_um
        map_x, map_y = np.floor(at_x / MAP_UM).astype(int), np.floor(at_y / MAP_UM).astype(int)
        there = (map_x >= 0) & (map_y >= 0) & (map_x < kinds.shape[1]) & (map_y < kinds.shape[0])
        there[there] = kinds[map_y[there], map_x[there]] == kind
        for i in np.flatnonzero(there):
            yield np.array([at_x[i], at_y[i]]), u[:6, i]

    def fill(self, outline: np.ndarray, kind: int) -> None:
        cv2.fillPoly(self.zones, [self._px(outline)], int(kind))

    def line(self, outline: np.ndarray, kind: int, thickness_um: float) -> None:
        cv2.polylines(self.zones, [self._px(outline)], True, int(kind), max(1, round(thickness_um / self.ground.mpp)))

    def nuclei(self, outline: np.ndarray, name: str, apart_um: float, along: bool = False) -> None:
        """Nuclei that stand on the outline `apart_um` from each other, or lie `along` it."""
        steps = np.roll(outline, -1, axis=0) - outline
        reached = np.concatenate([[0], np.cumsum(np.hypot(*steps.T))])
        count = int(reached[-1] / apart_um)
        where = np.arange(count) * (reached[-1] / max(1, count))
        segment = np.searchsorted(reached, where, side="right") - 1
        part = (where - reached[segment]) / np.maximum(reached[segment + 1] - reached[segment], 1e-9)
        at = outline[segment] + part[:, None] * steps[segment]
        angle = np.arctan2(steps[segment, 1], steps[segment, 0]) + (0 if along else np.pi / 2)
        u = np.modf(where * 0.731 + outline[0, 0])[0]
        px, py = self._px(at).T
        self.rows.append(Rows(name, px, py, angle + 0.5 * (u - 0.5), u))

    def drop_nuclei(self, first: int, zones: tuple[int, ...]) -> None:
        """Drops the nuclei of the rows from `first` on that other structures have covered: outside the given zones."""
        height, width = self.zones.shape
        for i, row in enumerate(self.rows[first:], first):
            inside = (row.x >= 0) & (row.y >= 0) & (row.x < width) & (row.y < height)
            inside[inside] = np.isin(self.zones[row.y[inside], row.x[inside]], zones)
            self.rows[i] = Rows(row.name, *(values[inside] for values in (row.x, row.y, row.angle, row.size)))

    def _px(self, outline: np.ndarray) -> np.ndarray:
        return np.rint(outline / self.ground.mpp).astype(np.int32) - self.corner.astype(np.int32)


def oval(centre: np.ndarray, radius: float, flatness: float, u: np.ndarray, wobble: float) -> np.ndarray:
    """A closed irregular oval; its points are about 5 µm apart."""
    turn = np.linspace(0, 2 * np.pi, max(24, int(radius * 1.2)), endpoint=False)
    r = radius * (1 + wobble * (np.sin(2 * turn + 9 * u[0]) + np.sin(3 * turn + 7 * u[1]) + 0.6 * np.sin(5 * turn)))
    axis = direction(np.pi * u[1])
    across = np.array([-axis[1], axis[0]])
    return centre + (r * np.cos(turn))[:, None] * axis + (r * flatness * np.sin(turn))[:, None] * across


def shrunk(outline: np.ndarray, by_um: float) -> np.ndarray:
    """The outline moved inwards, to a quarter of its size at most."""
    centre = outline.mean(axis=0)
    ray = outline - centre
    radius = np.hypot(*ray.T)[:, None]
    return centre + ray * np.maximum(1 - by_um / radius, 0.25)


def direction(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)])


def hashed(seed: int, purpose: int, column: np.ndarray, row: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for every cell: a 64-bit mix of seed, purpose and place."""
    with np.errstate(over="ignore"):
        state = (
            np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
            + np.uint64(purpose) * np.uint64(0xBF58476D1CE4E5B9)
            + column.astype(np.int64).astype(np.uint64) * np.uint64(0x94D049BB133111EB)
            + row.astype(np.int64).astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        )
        numbers = []
        for _ in range(count):
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
            numbers.append((state >> np.uint64(11)).astype(np.float64) / float(1 << 53))
    return np.stack(numbers)
