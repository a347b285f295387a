"""Segments stained tissue on a brightfield slide.

Eosin and haematoxylin absorb green more than red and blue. Background, dust and black borders absorb all three equally.
Pen ink (blue, green, black) absorbs red most. So tissue is where the optical density of green exceeds the lesser of red
and blue, measured against the slide's own background.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from crcjax.errors import CrcjaxError

THUMBNAIL_UM_PER_PX = 8.0
# Tissue segmentation takes 40 to 55 bytes per pixel; above 770 mm², half of a glass slide, the picture is coarser. A whole
# glass slide would have 13 µm per pixel, where every method finds the same tissue (a test).
MOST_THUMBNAIL_PX = 12_000_000
_FAINTEST, _FIRMEST = 0.03, 0.06  # bounds of Otsu's threshold: slides that are all tissue, or faint beside dense
_INK_RATIO = 1.2  # of red over green density; haematoxylin has at most about 1.06
_WARM = 0.72  # of blue over green density: red ink and blood have more
_CLEAR = 0.14  # of red over green density: red ink has less, blood more
_DARKEST = 2.0  # optical density in every channel: borders, black ink, folds of foil
# Greatest density, the channels' sum, of pale tissue. Slides' medians are 0.64 to 1.8, and 0.25 to 0.47 at a quarter of
# their stain. If a tenth of the tissue is above it, that part alone gives the slide's density, however much is pale.
_PALE, _LEAST_ORDINARY = 0.5, 0.1
# Smaller pieces of tissue on a slide are dust or loose cell clusters.
SMALLEST_UM2 = 20_000.0
# Intensity of the background of pictures that show none, as most scanners give it.
_ASSUMED_WHITE = 240
_FILLED = 254  # least intensity of the white with which scanners fill what they did not scan
# Faint tissue, such as mucin, is found by means over _FAINT_UM (standard deviation) outside firmer tissue. Its excess green
# density is above the background's by _FAINT_NOISE deviations and by _LEAST_FAINT; its density is above _LEAST_DENSITY.
_FAINT_UM, _FAINT_NOISE, _LEAST_FAINT, _LEAST_DENSITY = 16.0, 4.0, 0.016, 0.04
_LEAST_PEAK = 0.25  # of the highest peak of the histogram
# The greatest excess green density of tinted background, and its greatest variation over the slide, as over _SHADE_UM.
_MOST_TINT, _MOST_SHADE, _SHADE_UM = 0.03, 0.012, 400.0
_LEAST_FIRM = 0.05  # of a piece of tissue; pieces with less are stained background
# Where between _SPARSE[0] and _SPARSE[1] of the surroundings are stained, over _SPARSE_UM (standard deviation), lie the walls of
# fat cells. They are closed over twice _FAT_UM, so that opened cells at the border of the tissue belong to it; smaller pieces
# than _LEAST_FAT_UM2 are not, as they may be shreds.
_SPARSE, _SPARSE_UM, _FAT_UM, _LEAST_FAT_UM2 = (0.03, 0.4), 60.0, 75.0, 200_000.0
_HOLE_UM2 = 150_000.0  # smaller holes are lumina, mucin and fat, which belong to the tissue
_CLOSING_UM = 50.0  # width of the gaps between fat cells
METHODS = ("robust", "otsu", "entropy")
_LEAST_SATURATION = 12  # of 255: on a slide that is only background, Otsu's threshold would halve its noise
_GREYS, _WINDOW_PX = 16, 9  # grey levels and side of the square over which the entropy is computed
_ENTROPY_BITS = (0.5, 1.5)  # bounds of Otsu's threshold: the noise of background, and a slide that is all tissue


class NotBrightfieldError(CrcjaxError):
    """The background of the picture is not that of a brightfield scan."""


@dataclass(frozen=True)
class TissueModel:
    """A slide's background (`white`, RGB intensities) and the excess green density above which a pixel is tissue.

    `density` and `excess` are medians over its tissue: of the optical density, the three channels' sum, and of the excess
    green density. Pale tissue is left out unless nearly all of the tissue is pale.
    """

    white: tuple[float, float, float]
    threshold: float
    density: float = 1.0
    excess: float = 0.3


def tissue_model(thumbnail: UInt8[np.ndarray, "y x 3"], may_lack_background: bool = False) -> TissueModel:
    """Estimates the model of a slide from a picture of it.

    With `may_lack_background`, as for a single tile, a neutral background is assumed if even the brightest pixels have the
    colour of stained tissue.

    Raises NotBrightfieldError if the background is dark (fluorescence) or coloured (wrong colour space).
    """
    white = _brightest(thumbnail)
    only_tissue = may_lack_background and _is_stained(white)
    if white.max() < 150 and not only_tissue:
        raise NotBrightfieldError(f"the background is dark ({_rgb(white)}): fluorescence, or not a brightfield scan")
    if only_tissue:
        white = np.full(3, max(_ASSUMED_WHITE, white.max()))
    if white.min() < 0.7 * white.max():
        raise NotBrightfieldError(f"the background is coloured ({_rgb(white)}): wrong colour space, or not H&E")
    light = (float(white[0]), float(white[1]), float(white[2]))
    density = optical_density(thumbnail, light)
    plausible, sharp = _plausible(density), excess_green(density)
    excess = cv2.GaussianBlur(sharp, (0, 0), 1.0)
    usable = excess[plausible]
    if usable.size == 0:
        return TissueModel(light, _FIRMEST)
    levels = np.clip(usable / 0.5 * 255, 0, 255).astype(np.uint8)
    otsu, _ = cv2.threshold(levels.reshape(1, -1), 0, 255, cv2.THRESH_OTSU)
    # Otsu halves the tissue when half of it is faint; half of its value keeps the faint half.
    threshold = float(np.clip(otsu / 255 * 0.5 / 2, _FAINTEST, _FIRMEST))
    tissue = (excess > threshold) & plausible
    if not tissue.any():
        return TissueModel(light, threshold)
    total = density.sum(axis=0)
    ordinary = tissue & (total > _PALE)
    if ordinary.sum() < _LEAST_ORDINARY * tissue.sum():
        ordinary = tissue
    return TissueModel(light, threshold, *(float(np.median(values[ordinary])) for values in (total, sharp)))


def tissue_mask(
    thumbnail: UInt8[np.ndarray, "y x 3"],
    model: TissueModel,
    um_per_px: float,
    method: str = "robust",
    smallest_um2: float = SMALLEST_UM2,
) -> Bool[np.ndarray, "y x"]:
    """Segments the tissue of a thumbnail; closes small gaps, fills lumina, removes specks; `um_per_px` is the thumbnail's.

    Pieces below `smallest_um2` are specks.

    The METHODS: `robust` uses the model. `otsu` is Otsu's threshold on the saturation, as in CLAM (Lu et al. 2021), and
    loses faint tissue beside dense. `entropy` is a threshold on the local entropy of grey, as in HistoQC (Janowczyk et al.
    2019), and loses tissue without texture. No method takes ink and black for tissue.
    """
    smooth = cv2.GaussianBlur(thumbnail, (0, 0), 1.0)
    density = optical_density(smooth, model.white)
    plausible = _plausible(density)
    stained = {
        "robust": lambda: _stained(thumbnail, density, plausible, model, um_per_px),
        "otsu": lambda: _saturated(smooth),
        "entropy": lambda: _textured(thumbnail, model.white),
    }
    mask = _closed(stained[method](), _CLOSING_UM / um_per_px / 2)
    mask = _without_small(mask, smallest_um2 / um_per_px**2)
    # The frame joins all background that touches the border, so that small pieces of it are not filled.
    background = cv2.copyMakeBorder(1 - mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    filled = 1 - _without_small(background, _HOLE_UM2 / um_per_px**2, always=(0, 0))[1:-1, 1:-1]
    return filled.astype(bool) & plausible


def largest_piece_um2(mask: Bool[np.ndarray, "y x"], um_per_px: float) -> float:
    """The area of the largest connected piece of a mask; 0 if it is empty."""
    statistics = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)[2]
    return float(statistics[1:, cv2.CC_STAT_AREA].max(initial=0)) * um_per_px**2


def _brightest(thumbnail: np.ndarray) -> np.ndarray:
    """The 99th percentile of every channel, without the white of what was not scanned: the scanned background may be darker."""

    def percentile(pixels: np.ndarray) -> np.ndarray:
        counts = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])
        return (counts.cumsum(axis=1) < 0.99 * counts[:1].sum()).sum(axis=1)

    white = percentile(thumbnail)
    if white.min() < _FILLED:
        return white
    scanned = thumbnail[thumbnail.min(axis=2) < _FILLED]
    return percentile(scanned) if len(scanned) else white


def _is_stained(white: np.ndarray) -> bool:
    """Whether the brightest pixels have the colour of stained tissue, which absorbs green most and lets red and blue through."""
    red, green, blue = white.tolist()
    return green < 0.7 * max(red, blue) and min(red, blue) > 0.6 * max(red, blue) and green < min(red, blue)


def _stained(
    thumbnail: np.ndarray, density: np.ndarray, plausible: np.ndarray, model: TissueModel, um_per_px: float
) -> np.ndarray:
    """Pixels above the model's threshold, and fainter tissue: mucin, loose stroma, and fat at the border of the tissue."""
    excess = excess_green(density)
    scanned = plausible & ((thumbnail.min(axis=2) < _FILLED) | (min(model.white) >= _FILLED))
    tint, _ = _background(excess[scanned])
    firm = (excess > model.threshold + np.clip(tint, 0, _MOST_TINT)) & plausible
    faint, rather_firm = _faint(thumbnail, firm, scanned, model, um_per_px)
    joined = _closed(firm | faint, _CLOSING_UM / um_per_px / 2)
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    firm_px = np.bincount(labels[firm | rather_firm], minlength=len(statistics))
    is_tissue = firm_px >= _LEAST_FIRM * statistics[:, cv2.CC_STAT_AREA]
    is_tissue[0] = False
    is_large = is_tissue & (statistics[:, cv2.CC_STAT_AREA] >= _LEAST_FAT_UM2 / um_per_px**2)
    pieces = is_tissue[labels]
    stained = cv2.GaussianBlur(((firm | faint) & pieces).astype(np.float32), (0, 0), _SPARSE_UM / um_per_px)
    is_sparse = (stained > _SPARSE[0]) & (stained < _SPARSE[1])
    return pieces | (is_sparse & (_closed(is_large[labels], _FAT_UM / um_per_px) > 0))


def _faint(
    thumbnail: np.ndarray, firm: np.ndarray, scanned: np.ndarray, model: TissueModel, um_per_px: float
) -> tuple[np.ndarray, np.ndarray]:
    """Faint tissue outside the firm, and the part of it that is as strongly stained as the faintest firm tissue may be."""
    # One pixel beyond firm tissue, ink and black is partly covered by them.
    outside = cv2.dilate((firm | ~scanned).astype(np.uint8), np.ones((3, 3), np.uint8)) == 0
    if not outside.any():
        return outside, outside
    sharp = optical_density(thumbnail, model.white)
    excess, total = (
        _mean_outside(values, outside, _FAINT_UM / um_per_px) for values in (excess_green(sharp), sharp.sum(axis=0))
    )
    background, noise = _background(excess[outside])
    shade = _mean_outside(
        np.clip(excess, background - _MOST_SHADE, background + _MOST_SHADE), outside, _SHADE_UM / um_per_px
    )
    faint = outside & (total > _LEAST_DENSITY) & (excess - shade > max(_LEAST_FAINT, _FAINT_NOISE * noise))
    return faint, faint & (excess - shade > _FAINTEST)


def _background(excess: np.ndarray) -> tuple[float, float]:
    """The excess green density of the background and its standard deviation.

    The background is the first peak of the histogram, even where faint tissue covers more.
    """
    counts, edges = np.histogram(excess, bins=100, range=(-0.1, 0.1))
    counts = np.convolve(counts, np.ones(5), mode="same")
    peak = int(np.argmax(counts >= _LEAST_PEAK * counts.max()))
    while peak + 1 < len(counts) and counts[peak + 1] > counts[peak]:
        peak += 1
    mode = float(edges[peak] + edges[peak + 1]) / 2
    below = excess[excess <= mode]
    return mode, 1.4826 * float(np.median(mode - below)) if below.size else 0.0


def _mean_outside(values: np.ndarray, outside: np.ndarray, sigma_px: float) -> np.ndarray:
    """Means of the values that lie outside, weighted by a Gaussian; wide ones are computed on a coarser grid."""
    shrink = max(1, int(sigma_px / 4))
    size = [-(-side // shrink) for side in values.shape[::-1]]
    weight, weighted = (
        cv2.GaussianBlur(cv2.resize(part, size, interpolation=cv2.INTER_AREA), (0, 0), sigma_px / shrink)
        for part in (outside.astype(np.float32), values * outside)
    )
    return cv2.resize(weighted / np.maximum(weight, 1e-3), values.shape[::-1], interpolation=cv2.INTER_LINEAR)


def _closed(mask: np.ndarray, radius_px: float) -> np.ndarray:
    """The mask closed with a disc; beyond its edge the mask continues."""
    radius = max(1, round(radius_px))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), radius, radius, radius, radius, cv2.BORDER_REPLICATE)
    return cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disc)[radius:-radius, radius:-radius]


def _saturated(pixels: np.ndarray) -> np.ndarray:
    saturation = cv2.medianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[..., 1], 7)
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_OTSU)
    return saturation > max(otsu, _LEAST_SATURATION)


def _textured(pixels: np.ndarray, white: tuple[float, float, float]) -> np.ndarray:
    """Pixels darker than background whose neighbourhood has a grey level entropy, in bits, above Otsu's threshold."""
    step = 256 // _GREYS
    background = float(np.mean(white))
    # Background is the middle of a level, so that its noise does not cross into another.
    level = np.clip((background - pixels.mean(axis=2) + step / 2) // step, 0, _GREYS - 1)
    level[~_plausible(optical_density(pixels, white))] = 0  # the edges of ink and of black are no texture
    darker = background - cv2.GaussianBlur(pixels, (0, 0), 1.0).mean(axis=2) > step / 2
    bits = np.zeros(level.shape, np.float32)
    for grey in range(_GREYS):
        share = cv2.boxFilter((level == grey).astype(np.float32), -1, (_WINDOW_PX, _WINDOW_PX)).clip(1e-6, 1)
        bits -= share * np.log2(share)
    scale = 255 / np.log2(_GREYS)
    otsu, _ = cv2.threshold((bits * scale).clip(0, 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    return darker & (bits > np.clip(otsu / scale, *_ENTROPY_BITS))


def _without_small(mask: np.ndarray, smallest_px: float, always: tuple[int, int] | None = None) -> np.ndarray:
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    large = statistics[:, cv2.CC_STAT_AREA] >= smallest_px
    if always is not None:
        large[labels[always]] = True
    large[0] = False
    return large[labels].astype(np.uint8)


def optical_density(
    pixels: UInt8[np.ndarray, "y x 3"], white: tuple[float, float, float]
) -> Float32[np.ndarray, "channel y x"]:
    """-ln of the transmitted light relative to the background `white`: 0 on background, about 0.1 to 2 in tissue."""
    density = np.empty((3, *pixels.shape[:2]), np.float32)
    for channel, (plane, table) in enumerate(zip(cv2.split(pixels), _density_tables(white), strict=True)):
        cv2.LUT(plane, table, dst=density[channel])
    return density


@lru_cache(maxsize=64)
def _density_tables(white: tuple[float, float, float]) -> list[np.ndarray]:
    intensity = np.arange(256, dtype=np.float32)
    return [-np.log((intensity + 1) / np.float32(light + 1)) for light in white]


def excess_green(density: Float32[np.ndarray, "channel y x"]) -> Float32[np.ndarray, "y x"]:
    """The density of green above the lesser of red and blue, which is positive in stained tissue."""
    red, green, blue = density
    return green - np.minimum(red, blue)


def ink(density: Float32[np.ndarray, "channel y x"]) -> Bool[np.ndarray, "y x"]:
    """Pixels of pen ink, by their colour: green, blue or red."""
    # Beyond the edge of a slide the picture is white, which is brighter than tinted background, in green more than in red.
    red, green, blue = np.maximum(density, 0)
    cold_ink = (red > _INK_RATIO * green + 0.05) | ((red > 0.3) & (blue > _INK_RATIO * green))
    # Haematoxylin lets less blue through: at least 0.38 of its red density is absorbed there.
    blue_ink = (red > 0.3) & (red > green) & (blue < 0.35 * red)
    # Eosin lets blue through, which red ink and blood absorb; ink absorbs less red than blood.
    red_ink = (green > 0.5) & (blue > _WARM * green) & (red < _CLEAR * green)
    return cold_ink | blue_ink | red_ink


def blood(density: Float32[np.ndarray, "channel y x"]) -> Bool[np.ndarray, "y x"]:
    """Pixels of red cells, by their colour; tissue under red ink looks the same."""
    red, green, blue = density
    return (green > 0.5) & (blue > _WARM * green) & (red >= _CLEAR * green) & (red < 0.45 * green)


def _plausible(density: Float32[np.ndarray, "channel y x"]) -> Bool[np.ndarray, "y x"]:
    """False for ink and for black."""
    return ~(ink(density) | (density.min(axis=0) > _DARKEST))


def _rgb(white: np.ndarray) -> str:
    return "RGB " + " ".join(f"{value:.0f}" for value in white)
