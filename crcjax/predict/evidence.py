"""The files that show where a prediction's evidence lies: attention/SLIDE_ID.npz and heatmaps/SLIDE_ID.png."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8

from crcjax.errors import InputError, writing
from crcjax.predict.attribution_method import Method
from crcjax.predict.evidence_map import TileLayer, merged, tile_layers
from crcjax.predict.heatmap import heatmap_png, overlay, to_heatmap_size
from crcjax.predict.predictor import SlidePrediction
from crcjax.slides.wsi.slide import SlideInfo
from crcjax.validation.predictions_table import PredictionRow

DISCLAIMER = "research use only"
# The quantity that a heatmap's colours show, by method.
MEANING: dict[Method, str] = {
    "attention": "attention (attention, not evidence)",
    "gradient": "evidence for the predicted class, by integrated gradients,",
    "occlusion": "evidence for the predicted class, by occlusion,",
    "region_occlusion": "evidence for the predicted class, by its occlusion,",
}
_ATTENTION, _HEATMAPS = "attention", "heatmaps"


@dataclass(frozen=True)
class SlideEvidence:
    """Where the evidence of a slide's prediction lies, as its attention file states it.

    Attributes:
      method: the method of the attribution.
      maps: the names of the maps: the classes, or "attention" alone.
      value: the contribution of each tile to every class (nats), or its attention.
      origin, region_px, slot_boxes, mask: the tiles, as in `tile_layers`.
      size: the slide's (width, height) in level-0 px.
      corner: the corner of the scanned part (SlideInfo.corner).
      mpp: µm per level-0 px in (x, y).
      synthetic: whether the slide is a synthetic one.
    """

    method: Method
    maps: tuple[str, ...]
    value: Float[np.ndarray, "region slot map"]
    origin: Int[np.ndarray, "region 2"]
    region_px: float
    slot_boxes: Float32[np.ndarray, "slot 3"]
    mask: Bool[np.ndarray, "region slot"]
    size: tuple[int, int]
    corner: tuple[int, int]
    mpp: tuple[float, float]
    synthetic: bool

    @property
    def layers(self) -> list[TileLayer]:
        """The tiles by size, the largest first."""
        return tile_layers(self.origin, self.region_px, self.slot_boxes, self.mask, self.value)

    @property
    def is_signed(self) -> bool:
        """Whether values below zero are evidence against a class; attention has no such values."""
        return self.method != "attention"


def attention_file(out: Path, slide_id: str) -> Path:
    """The file of a slide's attention and attribution."""
    return out / _ATTENTION / f"{slide_id}.npz"


def heatmap_file(out: Path, slide_id: str) -> Path:
    """The file of a slide's heatmap."""
    return out / _HEATMAPS / f"{slide_id}.png"


def write_evidence(
    out: Path,
    row: PredictionRow,
    info: SlideInfo,
    prediction: SlidePrediction,
    classes: Sequence[str],
    method: Method,
    thumbnail: UInt8[np.ndarray, "y x 3"] | None,
    digest: str,
) -> None:
    """Writes a slide's attention file, and its heatmap if there is a thumbnail.

    Args:
      out: the folder of predictions.csv.
      row: the slide's row with its prediction.
      info: the slide's size and µm per pixel.
      prediction: the slide's attention and attribution.
      classes: the classes in the order of the probabilities.
      method: the method of the attribution.
      thumbnail: the slide's pixels; None for a slide that was imported without its file.
      digest: identifies the inputs of the prediction (`result_key`), so that a later start recognises it.

    Raises:
      OutputError: the folder cannot be written.
    """
    maps = prediction.prediction
    arrays: dict[str, Any] = {
        "origin": prediction.origin,
        "region_px": prediction.region_px,
        "slot_boxes": prediction.slot_boxes,
        "mask": prediction.mask,
        "mpp": info.mpp[0],
        "mpp_xy": info.mpp,
        "size": info.size,
        "corner": info.corner,
        "synthetic": info.synthetic,
        "method": method,
        "maps": ["attention"] if method == "attention" else list(classes),
        "attribution_maps": prediction.attribution_maps,
        "attention": np.asarray(maps.region_attention[0]),
        "slot_attention": np.asarray(maps.slot_attention[0]),
        "class_attention": np.asarray(maps.class_attention[0]),
        "attribution": prediction.attribution,
        "made_from": digest,
        "has_heatmap": thumbnail is not None,
    }
    npz_path, png_path = attention_file(out, row.slide_id), heatmap_file(out, row.slide_id)
    with writing(out):
        npz_path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(npz_path, **arrays)
    if thumbnail is None:
        return
    thumbnail = to_heatmap_size(thumbnail)
    layers = tile_layers(
        *(prediction.origin, prediction.region_px, prediction.slot_boxes, prediction.mask),
        prediction.attribution[..., None],
    )
    png = heatmap_png(
        thumbnail,
        overlay(thumbnail, merged(layers), info.size),
        meaning=MEANING[method],
        title=f"{row.slide_id}: {f'{row.call} {max(row.probs):.2f}' if row.call else 'not evaluable'} · {DISCLAIMER}",
        um_per_px=info.mpp[0] * info.size[0] / thumbnail.shape[1],
        synthetic=info.synthetic,
    )
    with writing(out):
        png_path.parent.mkdir(parents=True, exist_ok=True)
        png_path.write_bytes(png)


def read_evidence(out: Path, slide_id: str) -> SlideEvidence:
    """Reads the attention file of a slide. Raises InputError if there is none, or it is damaged or of an earlier version."""
    path = attention_file(out, slide_id)
    try:
        with open(path, "rb") as file, np.load(file) as saved:
            arrays = dict(saved)
        return SlideEvidence(
            str(arrays["method"]),  # type: ignore[arg-type]
            tuple(map(str, arrays["maps"])),
            arrays["attribution_maps"],
            arrays["origin"],
            float(arrays["region_px"]),
            arrays["slot_boxes"],
            arrays["mask"],
            tuple(map(int, arrays["size"])),  # type: ignore[arg-type]
            tuple(map(int, arrays["corner"])),  # type: ignore[arg-type]
            tuple(map(float, arrays["mpp_xy"])),  # type: ignore[arg-type]
            bool(arrays["synthetic"]),
        )
    except FileNotFoundError as error:
        raise InputError(f"{path}: does not exist; predict {slide_id} first") from error
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(
            f"{path}: is damaged, or of an earlier version of crcjax ({error}); delete it and predict {slide_id} again"
        ) from error


def evidence_digest(out: Path, slide_id: str) -> str | None:
    """The digest that a slide's evidence was written with; empty if its heatmap is missing, None without an attention file."""
    try:
        with open(attention_file(out, slide_id), "rb") as file, np.load(file) as saved:
            has_heatmap = bool(saved["has_heatmap"])
            digest = str(saved["made_from"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return digest if heatmap_file(out, slide_id).exists() or not has_heatmap else ""


def remove_evidence(out: Path, slide_id: str) -> None:
    """Removes a slide's evidence files if they exist. Raises OSError."""
    # The ids come from a table that another program may have written; crcjax writes no such file.
    if "/" in slide_id:
        return
    for path in (attention_file(out, slide_id), heatmap_file(out, slide_id)):
        path.unlink(missing_ok=True)


def slides_with_evidence(out: Path) -> set[str]:
    """The ids of all slides with an attention file that crcjax wrote."""
    names = {path.stem for path in (out / _ATTENTION).glob("*.npz")}
    return {slide_id for slide_id in names if evidence_digest(out, slide_id) is not None}
