"""Writes the files that show where a prediction's evidence lies: attention/SLIDE_ID.npz and heatmaps/SLIDE_ID.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import UInt8

from crcjax.errors import writing
from crcjax.predict.attribution import Method
from crcjax.predict.heatmap import heatmap_png, overlay
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
      method: the method of the attribution.
      thumbnail: the slide's pixels; None for a slide that was imported without its file.
      digest: identifies the inputs of the prediction (`digest_of`), so that a later start recognises it.

    Raises:
      OutputError: the folder cannot be written.
    """
    maps = prediction.prediction
    arrays: dict[str, Any] = {
        "origin": prediction.origin,
        "region_px": prediction.region_px,
        "mpp": info.mpp[0],
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
    by_region, has_tiles = prediction.attribution.sum(axis=1), prediction.mask.any(axis=1)
    png = heatmap_png(
        thumbnail,
        overlay(thumbnail, prediction.origin[has_tiles], prediction.region_px, by_region[has_tiles], info.size),
        meaning=MEANING[method],
        title=f"{row.slide_id}: {row.call} {max(row.probs):.2f} · {DISCLAIMER}",
        um_per_px=info.mpp[0] * info.size[0] / thumbnail.shape[1],
        synthetic=info.synthetic,
    )
    with writing(out):
        png_path.parent.mkdir(parents=True, exist_ok=True)
        png_path.write_bytes(png)


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
