"""The files that show where a prediction's evidence lies: attention/SLIDE_ID.npz and heatmaps/SLIDE_ID.png."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import UInt8

from crcjax.errors import writing
from crcjax.predict.attribution import Method
from crcjax.predict.heatmap import overlay, write_heatmap
from crcjax.predict.predictor import SlidePrediction
from crcjax.slides.wsi.slide import SlideInfo
from crcjax.validation.predictions_table import PredictionRow

DISCLAIMER = "research use only"
MEANING: dict[Method, str] = {
    "attention": "attention (attention, not evidence)",
    "gradient": "evidence for the predicted class, by integrated gradients,",
    "occlusion": "evidence for the predicted class, by occlusion,",
    "region_occlusion": "evidence for the predicted class, by its occlusion,",
}
_ATTENTION, _HEATMAPS = "attention", "heatmaps"


def attention_file(out: Path, slide_id: str) -> Path:
    """Where a slide's attention and attribution are written."""
    return out / _ATTENTION / f"{slide_id}.npz"


def heatmap_file(out: Path, slide_id: str) -> Path:
    """Where a slide's heatmap is written."""
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
      method: what the attribution shows.
      thumbnail: the slide; None for a slide that was imported without its file.
      digest: what the prediction was made from (`digest_of`), so that a later start recognises it.

    Raises:
      OutputError: the folder cannot be written.
    """
    arrays, picture = attention_file(out, row.slide_id), heatmap_file(out, row.slide_id)
    by_region, is_used = prediction.attribution.sum(axis=1), prediction.mask.any(axis=1)
    with writing(out):
        arrays.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            arrays,
            origin=prediction.origin,
            region_px=prediction.region_px,
            mpp=info.mpp[0],
            attention=np.asarray(prediction.prediction.region_attention[0]),
            slot_attention=np.asarray(prediction.prediction.slot_attention[0]),
            class_attention=np.asarray(prediction.prediction.class_attention[0]),
            attribution=prediction.attribution,
            made_from=digest,
            has_heatmap=thumbnail is not None,
        )
        if thumbnail is None:
            return
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_heatmap(
            picture,
            thumbnail,
            overlay(thumbnail, prediction.origin[is_used], prediction.region_px, by_region[is_used], info.size),
            meaning=MEANING[method],
            title=f"{row.slide_id}: {row.subtype} {max(row.probs):.2f} · {DISCLAIMER}",
            um_per_px=info.mpp[0] * info.size[0] / thumbnail.shape[1],
            synthetic=info.synthetic,
        )


def evidence_digest(out: Path, slide_id: str) -> str | None:
    """What a slide's evidence was made from; empty if its heatmap is absent, None without an attention file of crcjax."""
    try:
        with open(attention_file(out, slide_id), "rb") as file, np.load(file) as saved:
            has_heatmap = bool(saved["has_heatmap"])
            digest = str(saved["made_from"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return digest if heatmap_file(out, slide_id).exists() or not has_heatmap else ""


def remove_evidence(out: Path, slide_id: str) -> None:
    """Removes a slide's evidence, if it has any. Raises OSError."""
    if "/" in slide_id:  # a table from elsewhere; crcjax writes no such file
        return
    for path in (attention_file(out, slide_id), heatmap_file(out, slide_id)):
        path.unlink(missing_ok=True)


def slides_with_evidence(out: Path) -> set[str]:
    """The ids of all slides with an attention file of crcjax."""
    names = {path.stem for path in (out / _ATTENTION).glob("*.npz")}
    return {slide_id for slide_id in names if evidence_digest(out, slide_id) is not None}
