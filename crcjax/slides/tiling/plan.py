"""Plans which regions of a slide to read (`plan_tiles`) and at which magnifications (`TilingParams`)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from crcjax.errors import InputError, SlideError
from crcjax.slides.tiling.box_shares import box_shares
from crcjax.slides.tiling.quality_control import QualityLimits
from crcjax.slides.tiling.regions_of_interest import Areas
from crcjax.slides.tiling.tissue_segmentation import (
    METHODS,
    MOST_THUMBNAIL_PX,
    SMALLEST_UM2,
    THUMBNAIL_UM_PER_PX,
    NotBrightfieldError,
    TissueModel,
    largest_piece_um2,
    tissue_mask,
    tissue_model,
)
from crcjax.slides.wsi.slide import Slide, SlideInfo

EVERYWHERE = Areas()
# A smaller picture, such as a single tile, may show tissue alone and no background.
_MAY_LACK_BACKGROUND_MM2 = 1.0
SAME_SCALE = 0.02  # a level within 2 % of the wanted mpp is read as it is


def mpp_of(magnification: str) -> float:
    """Micrometres per pixel of a magnification: 40x is 0.25, 20x is 0.5. Raises InputError if it is not `NUMBERx`."""
    try:
        power = float(magnification.removesuffix("x"))
        if not magnification.endswith("x") or not 0 < power <= 100:
            raise ValueError
    except ValueError:
        raise InputError(f"magnification {magnification!r}: write a number and x, such as 20x or 10x,20x,40x") from None
    return 10.0 / power


@dataclass(frozen=True)
class TilingParams:
    """The parameters that decide which tiles a slide gives.

    `magnifications` are ordered from coarse to fine and differ by powers of two; a region is one tile of the first.
    `quality` limits a tile's share of tissue and the scores of its pixels. `tissue` is the method of tissue segmentation, one
    of tissue_segmentation.METHODS. With `icc`, colours are converted to sRGB by the slide's ICC profile. `stain` is a
    StainNormaliser's `to_json`: kept tiles are normalised to its reference after quality control. Pieces of tissue below
    `min_tissue_mm2`, or below a quarter of a picture that is smaller than four times that, are dropped.
    With `keep_all`, every tile with tissue is kept, and quality control only states the tiles that it would exclude.
    Raises InputError.
    """

    magnifications: tuple[str, ...] = ("20x",)
    tile_px: int = 256
    quality: QualityLimits = field(default_factory=QualityLimits)
    tissue: str = "robust"
    icc: bool = False
    stain: dict | None = None
    min_tissue_mm2: float = SMALLEST_UM2 * 1e-6
    keep_all: bool = False

    def __post_init__(self) -> None:
        ordered = tuple(sorted(dict.fromkeys(self.magnifications), key=mpp_of, reverse=True))
        object.__setattr__(self, "magnifications", ordered)
        if not ordered:
            raise InputError("no magnification: give one such as 20x")
        for magnification, factor in zip(ordered, self.factors, strict=True):
            if abs(factor * mpp_of(magnification) / mpp_of(ordered[0]) - 1) > 1e-6 or factor & (factor - 1):
                raise InputError(f"{ordered[0]} and {magnification} do not differ by a power of two")
        if not 16 <= self.tile_px <= 4096:
            raise InputError(f"tile_px {self.tile_px} is outside 16 to 4096")
        if self.tissue not in METHODS:
            raise InputError(f"tissue method {self.tissue!r}: choose {', '.join(METHODS)}")
        if not 0 < self.min_tissue_mm2 <= 1000:
            raise InputError(
                f"min_tissue_mm2 must be an area above 0 and up to 1000 mm², got {self.min_tissue_mm2:g}; try 0.02"
            )

    @property
    def factors(self) -> tuple[int, ...]:
        """Tiles along a region's side, per magnification."""
        coarsest = mpp_of(self.magnifications[0])
        return tuple(round(coarsest / mpp_of(magnification)) for magnification in self.magnifications)

    @property
    def slots(self) -> int:
        """Instances per region."""
        return sum(factor**2 for factor in self.factors)

    def slots_of(self, magnifications: Collection[str]) -> Bool[np.ndarray, " slot"]:
        """True for the slots of these magnifications; for all slots if none is given."""
        shown = [not magnifications or name in magnifications for name in self.magnifications]
        return np.repeat(shown, np.square(self.factors))

    def to_json(self) -> dict:
        """Plain values for stores and runs."""
        return asdict(self) | {"magnifications": list(self.magnifications)}

    @classmethod
    def from_json(cls, values: dict) -> TilingParams:
        """The inverse of `to_json`; it also reads older stores, where `min_tissue` was not one of the limits."""
        values = dict(values)
        before = {name: values.pop(name) for name in ("min_tissue",) if name in values}
        magnifications, quality = tuple(values["magnifications"]), QualityLimits(**before | values["quality"])
        return cls(**values | {"magnifications": magnifications, "quality": quality})


@dataclass(frozen=True)
class Scale:
    """How a slide is read: the `level`, and level-0 px per tile pixel at the finest magnification of the slide.

    `missing` magnifications (the last ones) are finer than the slide and stay masked.
    """

    level: int
    downsample: float
    finest: int  # index into params.magnifications
    missing: int


@dataclass(frozen=True)
class TilePlan:
    """The regions of a slide with tissue, row by row.

    `origin` and the region's side `region_px` are in level-0 px; `rejected` counts the slide's other tiles by reason.
    `thumbnail` is the picture in which `tissue_mask` was found (`thumbnail_px`).
    """

    params: TilingParams
    scale: Scale
    region_px: float
    tissue: TissueModel
    origin: Int32[np.ndarray, "region 2"]
    mask: Bool[np.ndarray, "region slot"]
    thumbnail: UInt8[np.ndarray, "y x 3"]
    tissue_mask: Bool[np.ndarray, "y x"]
    rejected: dict[str, int] = field(default_factory=dict)
    areas_id: str = ""


def slide_scale(info: SlideInfo, params: TilingParams) -> Scale:
    """Chooses the level to read and its scale. Raises SlideError (`too_coarse`) if the slide has none of the magnifications."""
    mpp = (info.mpp[0] + info.mpp[1]) / 2
    wanted = [mpp_of(magnification) / mpp for magnification in params.magnifications]
    present = [scale for scale in wanted if scale >= 1 - SAME_SCALE]
    if not present:
        raise SlideError(
            info.path,
            "too_coarse",
            f"has {mpp:.3g} µm per pixel, too coarse for {params.magnifications[0]}",
            "ask for a lower magnification: nothing is upsampled",
        )
    finest = len(present) - 1
    for level, downsample in enumerate(info.level_downsamples):
        # The same tolerance as for `present`, so that some level always fits, level 0 at the latest.
        if 1 - SAME_SCALE <= present[-1] / downsample <= 1 / (1 - SAME_SCALE):
            return Scale(level, downsample, finest, len(wanted) - len(present))
    finer = [level for level, downsample in enumerate(info.level_downsamples) if downsample < present[-1]]
    return Scale(finer[-1], present[-1], finest, len(wanted) - len(present))


def slot_boxes(params: TilingParams) -> Float32[np.ndarray, "slot 3"]:
    """(x, y, side) of every slot as fractions of the region's side; coarse to fine, row-major within each."""
    boxes = [
        (column / factor, row / factor, 1 / factor)
        for factor in params.factors
        for row in range(factor)
        for column in range(factor)
    ]
    return np.array(boxes, np.float32)


def plan_tiles(slide: Slide, params: TilingParams, areas: Areas = EVERYWHERE) -> TilePlan:
    """Finds the regions with tissue, within the areas that may be tiled, on a thumbnail (`thumbnail_px`).

    Raises SlideError: `too_coarse`, `no_tissue`, `unsupported` (not a brightfield picture), `corrupt`; InputError if a
    region file is not usable.
    """
    if params.icc:
        slide.apply_icc()
    info = slide.info
    scale = slide_scale(info, params)
    region_px = params.tile_px * params.factors[scale.finest] * scale.downsample
    thumbnail = slide.thumbnail(thumbnail_px(info))
    try:
        model = tissue_model(thumbnail, may_lack_background=_area_mm2(info) < _MAY_LACK_BACKGROUND_MM2)
    except NotBrightfieldError as error:
        raise SlideError(info.path, "unsupported", str(error), "give the H&E scan itself") from error
    shrink = max(info.size) / max(thumbnail.shape[:2])
    um_per_px = info.mpp[0] * shrink
    mask = tissue_mask(thumbnail, model, um_per_px, params.tissue, _smallest_mm2(info, params) * 1e6)
    if not mask.any():
        any_tissue = tissue_mask(thumbnail, model, um_per_px, params.tissue, 0.0)
        raise _without_tissue(info, params, largest_piece_um2(any_tissue, um_per_px) * 1e-6)
    mask &= areas.mask((mask.shape[0], mask.shape[1]), info.size, info.corner)
    columns, rows = (max(1, int(np.ceil(side / region_px - 0.01))) for side in info.size)
    fraction = _tile_fractions(mask, region_px / shrink, rows, columns, params)
    enough = fraction >= params.quality.min_tissue
    present = sum(factor**2 for factor in params.factors[: scale.finest + 1])
    enough[:, :, present:] = False  # finer than the slide
    has_tissue = enough.any(axis=-1)
    if not has_tissue.any() and mask.any():
        raise SlideError(
            info.path,
            "no_tissue",
            f"its tissue covers at most {fraction.max():.2g} of a tile, below the limit min_tissue={params.quality.min_tissue:g}",
            "try smaller tiles, a higher magnification, or a lower --limit min_tissue",
        )
    if not has_tissue.any():
        raise SlideError(
            info.path, "no_tissue", "no stained tissue was found", "look at the slide; leave it out if empty"
        )
    row, column = np.nonzero(has_tissue)
    origin = np.rint(np.stack([column, row], axis=1) * region_px).astype(np.int32)
    rejected = {"glass": int((fraction[:, :, :present] < params.quality.min_tissue).sum())}
    return TilePlan(params, scale, region_px, model, origin, enough[has_tissue], thumbnail, mask, rejected, areas.id)


def _area_mm2(info: SlideInfo) -> float:
    return info.size[0] * info.mpp[0] * info.size[1] * info.mpp[1] * 1e-6


def _smallest_mm2(info: SlideInfo, params: TilingParams) -> float:
    """The least area of a piece of tissue on a slide."""
    return min(params.min_tissue_mm2, _area_mm2(info) / 4)


def _without_tissue(info: SlideInfo, params: TilingParams, largest_mm2: float) -> SlideError:
    """The error of a slide without a piece of tissue above the limit; its largest piece has `largest_mm2`."""
    limit = _smallest_mm2(info, params)
    # Less than a thousandth of the limit is noise of the background.
    if largest_mm2 < limit / 1000:
        return SlideError(
            info.path, "no_tissue", "no stained tissue was found", "look at the slide; leave it out if empty"
        )
    if limit < params.min_tissue_mm2:
        reason = f"a quarter of the picture's {_area_mm2(info):.3g} mm²"
    else:
        reason = "--min-tissue-mm2 of crcjax tile"
    return SlideError(
        info.path,
        "no_tissue",
        f"its largest piece of stained tissue has {largest_mm2:.3g} mm², below the limit of {limit:.3g} mm² ({reason})",
        f"look at the slide; if it is tissue, try --min-tissue-mm2 {0.9 * largest_mm2:.2g}",
    )


def thumbnail_px(info: SlideInfo) -> int:
    """The longer side, in px, of the picture for tissue segmentation.

    The picture has 8 µm per pixel, or coarser ones if it would exceed MOST_THUMBNAIL_PX, so that memory does not grow with
    the slide.
    """
    width, height = (side * info.mpp[0] / THUMBNAIL_UM_PER_PX for side in info.size)
    return max(1, round(max(width, height) * min(1.0, (MOST_THUMBNAIL_PX / (width * height)) ** 0.5)))


def _tile_fractions(
    mask: np.ndarray, region: float, rows: int, columns: int, params: TilingParams
) -> Float32[np.ndarray, "row column slot"]:
    """Tissue fraction of every tile; the area outside the slide counts as background."""
    boxes = slot_boxes(params) * region
    row, column = np.mgrid[:rows, :columns]
    start = np.stack([column, row], axis=-1)[:, :, None] * region + boxes[:, :2]
    return box_shares(mask, start, start + boxes[:, 2:], outside_counts=True).astype(np.float32)


Transform = Callable[[UInt8[np.ndarray, "tile y x 3"]], UInt8[np.ndarray, "tile y x 3"]]
