"""Scores the pixels of tiles, and limits the tiles that a model may see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8

from crcjax.errors import InputError
from crcjax.slides.tiling.tissue_segmentation import TissueModel, blood, excess_green, ink, optical_density

QUALITY_NAMES = (
    "tissue",
    "sharpness",
    "focus",
    "pen",
    "bubble",
    "fold",
    "blood",
    "stain",
    "red",
    "blue",
    "dust",
    "pale",
)
# A pixel of the pictures that are scored, at any magnification of the tile. Colours come from a third picture of half the second's side.
_DETAIL_UM, _FOCUS_UM = 1.0, 2.0
_CELL_PX = 8  # of the second picture: focus and bubbles are scored in cells of 16 µm, a nucleus and its surroundings
_MOST_CELLS = 16  # along a side
_ROUNDING = 2.0  # Laplacian energy that rounding to whole intensities gives a smooth picture: 20 / 12 and a margin
# Laplacian energies below which JPEG's noise, not the tissue, decides their ratio; at 2 and at 4 µm per pixel.
_NOISE_FINE, _NOISE_COARSE = 10.0, 30.0
_BLURRED, _VEILED = 0.25, 0.8  # greatest focus of a blurred cell; greatest density of a veiled cell over the slide's
# Least density of debris and rims, and least ratios of blue and of red to green density, with the tissue below them:
# haematoxylin absorbs less blue, eosin and red cells less red.
_GREY, _GREY_BLUE, _GREY_RED = 0.15, 0.75, 0.5
# Greatest density, the channels' sum, of lumina and of faint stain; least ratio of red to green of mucin, which is as faint.
_BARE, _FAINT, _BLUISH = 0.12, 0.3, 0.7
_FOLD = np.ones((3, 3), np.uint8)  # a patch of 12 µm: wider than a nucleus or a capillary, narrower than a fold
_PATCHES, _DENSEST = 16, 6  # of 16 x 16 patches the sixth densest is the fold's: 2 % of the tile are as dense
NO_LIMIT = 99.0  # above every score


@dataclass(frozen=True)
class QualityLimits:
    """Limits on the scores of a tile (see `score_tiles`) and of a slide.

    A tile beyond a `max_` or `min_` limit is excluded. A tile beyond a `mark_` limit only is marked: it stays in the bag, and
    its scores say why. `max_fold` excludes nothing by default, because dense epithelium scores as high as a fold does.

    `min_tissue` is the least fraction of a tile that must lie within the tissue, lumina counted; tiles below it are not read.
    A slide is rejected if less than `min_coverage` of its tissue tiles were kept. It needs a review if less than
    `good_coverage` were kept, if its median `stain` is outside the limits for marking, or if one kind of fault has more than
    `max_fault` of its tiles, excluded or marked. Raises InputError for a limit that is not a number from 0 up, and for
    `min_tissue` that is 0 or above 1.
    """

    min_tissue: float = 0.25
    min_stained: float = 0.02
    max_pen: float = 0.2
    max_bubble: float = 0.3
    max_fold: float = NO_LIMIT
    max_blood: float = 0.7
    min_focus: float = 0.18
    min_sharpness: float = 0.005
    max_pale: float = 0.5
    min_stain: float = 0.1
    max_stain: float = 6.0
    mark_pen: float = 0.1
    mark_bubble: float = 0.15
    mark_fold: float = 1.75
    mark_blood: float = 0.5
    mark_focus: float = 0.22
    mark_sharpness: float = 0.01
    mark_pale: float = 0.25
    mark_min_stain: float = 0.2
    mark_max_stain: float = 4.0
    min_coverage: float = 0.25
    good_coverage: float = 0.75
    max_fault: float = 0.1

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not (np.isfinite(value) and value >= 0):
                raise InputError(f"{limit.name} {value}: must be a number from 0 up")
        if not 0 < self.min_tissue <= 1:
            raise InputError(f"min_tissue {self.min_tissue}: must be a fraction above 0 and up to 1")


@dataclass(frozen=True)
class StainLimits:
    """How far stains may be from the cohort's, in degrees.

    `max_stain_degrees` is for a slide's two stains against the cohort's medians. `max_tile_degrees` is for a tile's colour
    against every mixture of these medians. Synthetic tiles are 1 degree from their own site's stains, up to 8 from other
    sites', and 15 from a stain of no site. Raises InputError for
    an angle outside 0 to 180.
    """

    max_stain_degrees: float = 15.0
    max_tile_degrees: float = 10.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not 0 <= value <= 180:
                raise InputError(f"{limit.name} {value}: must be an angle from 0 to 180 degrees")


Limits = TypeVar("Limits", QualityLimits, StainLimits)


def parse_limits(texts: Sequence[str], kind: type[Limits]) -> Limits:
    """Parses limits such as max_pen=0.2; the others have their defaults. Raises InputError."""
    values = {}
    for text in texts:
        name, _, value = text.partition("=")
        known = [limit.name for limit in fields(kind)]
        if name not in known:
            raise InputError(f"limit {text!r}: write NAME=NUMBER; the names are {', '.join(known)}")
        try:
            values[name] = float(value)
        except ValueError:
            raise InputError(f"limit {text!r}: {value!r} is not a number") from None
    return kind(**values)


# Why a tile is excluded or not. `glass`: too little tissue; `absent`: finer than the slide.
REASONS = ("kept", "glass", "absent", "pen", "bubble", "fold", "blood", "blurred", "pale", "overstained")
KEPT, GLASS, ABSENT = range(3)
FAULTS = REASONS[3:]


def tile_reasons(scores: Float32[np.ndarray, "*tile score"], limits: QualityLimits) -> UInt8[np.ndarray, "*tile"]:
    """Why every tile is excluded, as an index into REASONS, the first below if it has several faults; 0 if it has none."""
    score = dict(zip(QUALITY_NAMES, np.moveaxis(scores, -1, 0), strict=True))
    faults = {
        "pen": score["pen"] > limits.max_pen,
        "glass": score["tissue"] < limits.min_stained,  # after pen: everything under ink would be glass too
        "bubble": score["bubble"] > limits.max_bubble,
        "blood": score["blood"] > limits.max_blood,  # before fold: blood is as dense as a fold
        "fold": score["fold"] > limits.max_fold,
        "blurred": (score["focus"] < limits.min_focus) | (score["sharpness"] < limits.min_sharpness),
        "pale": (score["pale"] > limits.max_pale) | (score["stain"] < limits.min_stain),
        "overstained": score["stain"] > limits.max_stain,
    }
    codes = [np.uint8(REASONS.index(name)) for name in faults]
    return np.select(list(faults.values()), codes, np.uint8(KEPT))


def tile_marks(scores: Float32[np.ndarray, "*tile score"], limits: QualityLimits) -> UInt8[np.ndarray, "*tile"]:
    """Like `tile_reasons`, but by the limits for marking: the reason of every tile that is beyond either limit."""
    stricter = {
        "max_pen": min(limits.max_pen, limits.mark_pen),
        "max_bubble": min(limits.max_bubble, limits.mark_bubble),
        "max_fold": min(limits.max_fold, limits.mark_fold),
        "max_blood": min(limits.max_blood, limits.mark_blood),
        "min_focus": max(limits.min_focus, limits.mark_focus),
        "min_sharpness": max(limits.min_sharpness, limits.mark_sharpness),
        "max_pale": min(limits.max_pale, limits.mark_pale),
        "min_stain": max(limits.min_stain, limits.mark_min_stain),
        "max_stain": min(limits.max_stain, limits.mark_max_stain),
    }
    return tile_reasons(scores, replace(limits, **stricter))


def slide_verdict(
    scores: Float32[np.ndarray, "region slot score"],
    reason: UInt8[np.ndarray, "region slot"],
    limits: QualityLimits,
    keep_all: bool = False,
) -> dict:
    """The QC result of a slide from its tiles with tissue: `verdict` (accept, review or reject), `reasons` and numbers.

    `coverage` is the fraction of these tiles that was kept. `faults` are the fractions beyond a limit for excluding, by
    reason; they were excluded unless `keep_all`. `marked` are the fractions beyond a limit for marking only. Medians are over
    all of these tiles, kept or not, and 0 if there are none.
    """
    tissue = (reason != GLASS) & (reason != ABSENT)
    marks = np.where(tissue & (reason == KEPT), tile_marks(scores, limits), np.uint8(KEPT))
    count = max(1, int(tissue.sum()))
    faults, marked = (
        {name: float(share) for name in FAULTS if (share := (codes == REASONS.index(name)).sum() / count) > 0}
        for codes in (reason, marks)
    )
    named = ("sharpness", "focus", "stain")
    columns = [QUALITY_NAMES.index(name) for name in named]
    medians = np.median(scores[tissue][:, columns], axis=0).tolist() if tissue.any() else [0.0] * len(named)
    stain, coverage = medians[-1], float((tissue if keep_all else reason == KEPT).sum() / count)
    fate = ", and kept" if keep_all else ""
    reasons = [
        f"{share:.0%} of the tissue is {name}{fate}" for name, share in faults.items() if share > limits.max_fault
    ]
    reasons += [
        f"{share:.0%} of the tissue is marked {name}, and kept"
        for name, share in marked.items()
        if share > limits.max_fault
    ]
    if coverage < limits.good_coverage:
        reasons.insert(0, f"only {coverage:.0%} of the tissue was kept")
    if not limits.mark_min_stain <= stain <= limits.mark_max_stain:
        reasons.append(f"the median density of the stain is {stain:.2f}")
    verdict = "reject" if coverage < limits.min_coverage else "review" if reasons else "accept"
    median_of = {f"median_{name}": median for name, median in zip(named, medians, strict=True)}
    return {
        "verdict": verdict,
        "reasons": reasons,
        "coverage": coverage,
        "faults": faults,
        "marked": marked,
        **median_of,
    }


def score_tiles(
    tiles: Sequence[UInt8[np.ndarray, "y x 3"]], model: TissueModel, mpp: float = 0.5
) -> Float32[np.ndarray, "tile score"]:
    """Scores square tiles of one size and `mpp` µm per pixel; the columns are QUALITY_NAMES.

    `tissue`: the stained fraction of the tile. `sharpness`: the variance of the Laplacian over the variance of the green
    channel, so that pale and dense tissue compare; about 0.5 to 3 in focus, towards 0 when blurred, 0 on a tile of one
    colour. `focus`: the energy of detail of 2 µm over that of 4 µm, a weighted mean over 48 µm, and of these the mean in the least
    sharp quarter of the tissue. Smooth mucin and stroma lack both details, and so does tissue blurred by more than 5 µm,
    which `sharpness` detects. `pen`: the fraction under ink. `bubble`: the fraction that is grey, as rims of bubbles and debris
    are, or blurred and veiled, as bubbles are within. `fold`: the stain in the densest patches wider than a nucleus, half
    the least and half the mean in each, over that of the slide's tissue; 2 where tissue lies double. `blood`: the fraction of red cells.
    `stain`: the mean optical density of the stained pixels, the three channels' sum; `red` and `blue`: these channels'
    shares of it, 0 without a stained pixel, which `tile_stain_degrees` compares with a cohort's stains. `dust`: the part of
    `bubble` that is grey. `pale`: the fraction that is hardly stained, and not bluish, as mucin is.
    """
    return score_digests([digest(tile, mpp) for tile in tiles], model)


class Digest(NamedTuple):
    """The data from which a tile is scored: green at 2 µm per pixel, colours at 4, and `sharpness`."""

    green: UInt8[np.ndarray, "y x"]
    coloured: UInt8[np.ndarray, "half_y half_x 3"]
    sharpness: float


def digest(tile: UInt8[np.ndarray, "y x 3"], mpp: float) -> Digest:
    """Digests a tile of `mpp` µm per pixel into a few kB, so that the digests of many tiles stay in the CPU's cache."""
    cells = min(max(2, round(len(tile) * mpp / _FOCUS_UM / _CELL_PX)), _MOST_CELLS)
    side, half = cells * _CELL_PX, cells * _CELL_PX // 2
    detail = _shrunk(tile, scoring_shrink(len(tile), mpp))
    green = cv2.extractChannel(detail, 1)
    small = cv2.resize(detail, (side, side), interpolation=cv2.INTER_AREA)
    return Digest(
        cv2.resize(green, (side, side), interpolation=cv2.INTER_AREA),
        cv2.resize(small, (half, half), interpolation=cv2.INTER_AREA),
        _sharpness(green),
    )


def score_digests(digests: Sequence[Digest], model: TissueModel) -> Float32[np.ndarray, "tile score"]:
    """Computes the scores of `score_tiles` from digests of tiles of one size and magnification."""
    count, half = len(digests), len(digests[0].coloured)
    cells = 2 * half // _CELL_PX
    # The pictures are stacked: on pictures this small NumPy's calls would take longer than its arithmetic.
    green = np.concatenate([tile.green for tile in digests])
    coloured = np.concatenate([tile.coloured for tile in digests])
    sharpness = np.array([tile.sharpness for tile in digests], np.float32)
    density = optical_density(coloured, model.white)
    total, excess, clear = density.sum(axis=0), excess_green(density), ~ink(density)
    stained = (excess > model.threshold) & clear
    red, absorbed, blue = density
    grey = (absorbed > _GREY) & (blue > _GREY_BLUE * absorbed) & (red > _GREY_RED * absorbed) & clear
    faint = (total > _BARE) & (total < _FAINT) & (red < _BLUISH * absorbed) & clear
    focus, tissue = _cell_focus(green, coloured, cells), _cell_means(stained, cells) > 0.3
    veiled = (focus < _BLURRED) & tissue & (_cell_means(total, cells) < _VEILED * model.density)
    ascending_focus = np.sort(np.where(tissue | ~tissue.any(axis=1, keepdims=True), focus, np.inf))
    quarter = np.where(tissue.any(axis=1), tissue.sum(axis=1), cells**2)[:, None] // 4 + 1
    least_sharp = np.where(np.arange(cells**2) < quarter, ascending_focus, 0).sum(axis=1) / quarter[:, 0]
    # A fold doubles both; dense epithelium and keratin exceed only the slide's density.
    layers = _least_and_mean(np.minimum(total / model.density, excess / model.excess), half)
    patches = cv2.resize(layers, (_PATCHES, count * _PATCHES), interpolation=cv2.INTER_NEAREST).reshape(count, -1)

    def share(pixels: np.ndarray) -> np.ndarray:
        return cv2.reduce(pixels.view(np.uint8).reshape(count, -1), 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F)[:, 0]

    covered, dust, weight = share(stained), share(grey), stained.reshape(count, -1).astype(np.float32) / half**2
    dense = [np.einsum("ij,ij->i", weight, channel.reshape(count, -1)) for channel in (total, red, blue)]
    return np.stack(
        [
            covered,
            sharpness,
            least_sharp,
            1 - share(clear),
            dust + share(veiled),
            np.partition(patches, -_DENSEST)[:, -_DENSEST],
            share(blood(density)),
            dense[0] / np.maximum(covered, 1e-9),
            *(channel / np.maximum(dense[0], 1e-9) for channel in dense[1:]),
            dust,
            share(faint),
        ],
        axis=1,
    ).astype(np.float32, copy=False)


def tile_stain_degrees(
    scores: Float32[np.ndarray, "*tile score"], stains: Float[np.ndarray, "2 3"]
) -> Float64[np.ndarray, "*tile"]:
    """The angle of each tile's mean optical density to the nearest mixture of two stains, in degrees; nan without tissue.

    `stains` are the unit vectors of haematoxylin and eosin, such as the cohort's. A tile may have too little of one stain to
    estimate its own vectors, but its mixture of both lies between them.
    """
    stain, red, blue = (scores[..., QUALITY_NAMES.index(name)] for name in ("stain", "red", "blue"))
    colour = np.stack([red, 1.0 - red - blue, blue], axis=-1).astype(np.float64)
    colour /= np.linalg.norm(colour, axis=-1, keepdims=True)
    amounts = colour @ np.linalg.pinv(stains.astype(np.float64))
    between = (amounts >= 0).all(axis=-1)
    cosine = np.where(between, np.linalg.norm(amounts @ stains, axis=-1), (colour @ stains.T).max(axis=-1))
    return np.where(stain > 0, np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))), np.nan)


def scoring_shrink(tile_px: int, mpp: float) -> int:
    """The power of two by which a tile may be shrunk before it is scored, to about 1 µm per pixel."""
    shrink = 1
    while mpp * 2 * shrink < _DETAIL_UM * 1.02 and tile_px // shrink >= 32:
        shrink *= 2
    return shrink


def _shrunk(tile: np.ndarray, shrink: int) -> np.ndarray:
    """Shrinks a tile by area means."""
    # Halving twice is twice as fast as shrinking to a quarter.
    while shrink > 1:
        tile = cv2.resize(tile, (len(tile) // 2, len(tile) // 2), interpolation=cv2.INTER_AREA)
        shrink //= 2
    return tile


def _sharpness(green: np.ndarray) -> float:
    contrast = float(cv2.meanStdDev(green)[1][0, 0]) ** 2
    energy = cv2.norm(cv2.Laplacian(green, cv2.CV_16S), cv2.NORM_L2SQR) / green.size
    return max(0.0, energy - _ROUNDING) / contrast if contrast > 1 else 0.0


def _cell_focus(green: np.ndarray, coloured: np.ndarray, cells: int) -> Float32[np.ndarray, "tile cell"]:
    energy = [_cell_means(_laplacians(picture) ** 2, cells) for picture in (green, coloured[..., 1])]
    focus = ((energy[0] + _NOISE_FINE) / (energy[1] + _NOISE_COARSE)).reshape(-1, cells, cells)
    # An area out of focus is larger than a cell; one smooth cell between sharp ones is not out of focus.
    for of_tile in focus:
        cv2.GaussianBlur(of_tile, (3, 3), 0, dst=of_tile, borderType=cv2.BORDER_REPLICATE)
    return focus.reshape(-1, cells**2)


def _laplacians(pictures: np.ndarray) -> np.ndarray:
    """Laplacians of stacked square pictures, each computed separately."""
    laplacians = np.empty(pictures.shape, np.float32)
    pictures, side = pictures.astype(np.float32), pictures.shape[1]  # cv2 takes twice as long on bytes
    for top in range(0, len(pictures), side):
        cv2.Laplacian(pictures[top : top + side], cv2.CV_32F, dst=laplacians[top : top + side])
    return laplacians


def _least_and_mean(pictures: np.ndarray, side: int) -> np.ndarray:
    """Half the least and half the mean within `_FOLD`, of stacked pictures, each computed separately.

    The least alone would score the gaps in loose tissue, folded or not; the mean alone would score crowded nuclei.
    """
    apart = np.full((len(pictures) // side, side + len(_FOLD) // 2, side), np.inf, np.float32)
    apart[:, :side] = pictures.reshape(-1, side, side)
    least, mean = cv2.erode(apart.reshape(-1, side), _FOLD).reshape(apart.shape)[:, :side], np.empty_like(pictures)
    for top in range(0, len(pictures), side):
        cv2.blur(pictures[top : top + side], _FOLD.shape, mean[top : top + side], borderType=cv2.BORDER_REPLICATE)
    return (least.reshape(-1, side) + mean) / 2


def _cell_means(values: np.ndarray, cells: int) -> Float32[np.ndarray, "tile cell"]:
    tiles = len(values) // values.shape[1]
    means = cv2.resize(values.astype(np.float32, copy=False), (cells, tiles * cells), interpolation=cv2.INTER_AREA)
    return means.reshape(tiles, -1)
