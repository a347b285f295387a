"""Estimates how long slides take to be predicted, from their tiles and from the stages of slides that were predicted before.

Prediction is bounded by two threads: that of the encoder, which waits for the slide's tiles (`read`) and for the device
(`encode`), and the main thread, which pools the slide and writes its pictures (`finish`). What a slide costs in each stage is
taken to be linear in its tiles, the pixels that are decoded for them, and their compressed size.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float
from scipy.optimize import nnls

from crcjax.errors import SlideError
from crcjax.predict.engine import SlideSource
from crcjax.slides.tiling.plan import TilingParams, slide_scale
from crcjax.slides.tiling.tissue_segmentation import NotBrightfieldError, tissue_mask, tissue_model
from crcjax.slides.wsi.discovery import bytes_of
from crcjax.slides.wsi.slide import open_slide

STAGES = ("read", "encode", "finish")
# Slides whose stages are remembered for one model and machine.
_REMEMBERED = 400
# The longer side of the picture in which tissue is counted.
_OVERVIEW_PX = 512
# Seconds of a stage that weigh as much as the relative error of a longer one, so that short slides do not rule the fit.
_SMALL_S = 0.1


@dataclass(frozen=True)
class SlideSize:
    """How much of a slide, or of the slides of a bag, is predicted.

    Attributes:
      slides: their number.
      tiles: the instances of its regions with tissue.
      megapixels: the pixels that are decoded for them (10⁶).
      megabytes: the compressed size of the level that is decoded (10⁶ bytes).
    """

    slides: int
    tiles: int
    megapixels: float
    megabytes: float

    def __add__(self, other: SlideSize) -> SlideSize:
        return SlideSize(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))

    def share(self, share: float) -> SlideSize:
        """The size of a share of the regions."""
        return SlideSize(self.slides, round(share * self.tiles), share * self.megapixels, share * self.megabytes)


NOTHING = SlideSize(0, 0, 0.0, 0.0)


def slide_size(path: Path, mpp: float | None, fallback_mpp: float | None, params: TilingParams) -> SlideSize:
    """Estimates the size of a slide from its headers and a small picture, in some hundredths of a second.

    Raises SlideError.
    """
    with open_slide(path, mpp, fallback_mpp) as slide:
        info, scale = slide.info, slide_scale(slide.info, params)
        thumbnail = slide.thumbnail(_OVERVIEW_PX)
    um_per_px = info.mpp[0] * max(info.size) / max(thumbnail.shape[:2])
    try:
        tissue = tissue_mask(thumbnail, tissue_model(thumbnail, may_lack_background=True), um_per_px, smallest_um2=0.0)
    except NotBrightfieldError:
        return NOTHING
    factor = params.factors[scale.finest]
    side_px = params.tile_px * factor
    width, height = info.size
    columns, rows = (max(1, round(length / (side_px * scale.downsample))) for length in info.size)
    share = cv2.resize(tissue.astype(np.float32), (columns * factor, rows * factor), interpolation=cv2.INTER_AREA)
    has_tissue = share >= params.quality.min_tissue
    regions = int(has_tissue.reshape(rows, factor, columns, factor).any(axis=(1, 3)).sum())
    level_px = [width * height / downsample**2 for downsample in info.level_downsamples]
    read_share = level_px[scale.level] / sum(level_px)
    rescaled = (scale.downsample / info.level_downsamples[scale.level]) ** 2
    megapixels, megabytes = regions * side_px**2 * rescaled * 1e-6, bytes_of(path) * read_share * 1e-6
    return SlideSize(1, regions * params.slots, megapixels, megabytes)


def sizes_of_bags(bags: Sequence[Sequence[SlideSource]], params: TilingParams, threads: int) -> list[SlideSize]:
    """Estimates the sizes of bags; a slide that cannot be read has none."""

    def of_bag(sources: Sequence[SlideSource]) -> SlideSize:
        size = NOTHING
        for source in sources:
            with suppress(SlideError):
                size += slide_size(source.path, source.mpp, source.fallback_mpp, params)
        return size

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(of_bag, bags))


@dataclass(frozen=True)
class MeasuredSlide:
    """A slide or bag that was predicted, and the seconds of each of STAGES."""

    size: SlideSize
    seconds: tuple[float, ...]


class CostModel:
    """Estimates the seconds of slides by stage.

    Args:
      measured: slides that were predicted; without them, estimates have no unit and only tell which slide takes longer.
    """

    def __init__(self, measured: Sequence[MeasuredSlide] = ()):
        self.has_seconds = bool(measured)
        # Decoding at about the rate of libjpeg-turbo, and an encoder that takes as long for tiles of 256 px.
        self._rates = np.array([[0.1, 0.0, 0.01, 0.01], [0.0, 0.005, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]])
        if measured:
            sizes = np.array([astuple(slide.size) for slide in measured], np.float64)
            seconds = np.array([slide.seconds for slide in measured])
            self._rates = np.stack([_fitted(sizes, of_stage) for of_stage in seconds.T])

    def stages(self, size: SlideSize) -> Float[np.ndarray, " stage"]:
        """The estimated seconds of each of STAGES."""
        return self._rates @ np.array(astuple(size))

    def seconds(self, size: SlideSize) -> float:
        """The estimated seconds of a slide or bag that is predicted alone."""
        return float(self.stages(size).sum())

    def seconds_of_command(self, size: SlideSize) -> float:
        """The estimated seconds of one command that predicts slides of this size in all: its two threads overlap."""
        read, encode, finish = self.stages(size)
        return float(max(read + encode, finish))


def _fitted(terms: Float[np.ndarray, "slide term"], seconds: Float[np.ndarray, " slide"]) -> Float[np.ndarray, " term"]:
    """The non-negative coefficients of the terms with the least relative errors."""
    weights = 1 / (seconds + _SMALL_S)
    scale = np.maximum(terms.max(axis=0), 1e-9)
    return nnls(terms / scale * weights[:, None], seconds * weights)[0] / scale


class CostHistory:
    """The slides that a model predicted on this machine, in a file of the user's cache that every command adds to.

    Args:
      model_id: the id of what predicts.
      attribution: the method of the heatmap.
      executor: what runs the stages.
      threads: threads that decode tiles.
    """

    def __init__(self, model_id: str, attribution: str, executor: str, threads: int):
        name = "-".join((model_id, attribution, executor, str(threads), socket.gethostname()))
        self._path = _cache_folder() / f"{name}.json"

    def measured(self) -> list[MeasuredSlide]:
        """The slides that are remembered, the newest last; none if the file is missing or damaged."""
        try:
            values = json.loads(self._path.read_bytes())
            return [MeasuredSlide(SlideSize(*size), tuple(seconds)) for size, seconds in values]
        except (OSError, ValueError, TypeError):
            return []

    def add(self, slides: Sequence[MeasuredSlide]) -> None:
        """Remembers slides. A cache that cannot be written costs only the estimate."""
        if not slides:
            return
        newest = [*self.measured(), *slides][-_REMEMBERED:]
        text = json.dumps([[astuple(slide.size), slide.seconds] for slide in newest])
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, self._path)


def _cache_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crcjax" / "seconds"
    except RuntimeError:
        # Accounts of services may have no home.
        return Path(tempfile.gettempdir()) / f"crcjax-{os.getuid()}" / "seconds"
