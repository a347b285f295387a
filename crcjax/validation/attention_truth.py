"""Attention against the truth of painted slides."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import cv2
import numpy as np
from jaxtyping import Bool, Float

from crcjax.errors import InputError
from crcjax.slides.synthetic.truth import Truth, load_truth
from crcjax.validation.statistics import auroc


def region_shares(
    where: Bool[np.ndarray, "y x"], um_per_px: float, corner_um: Float[np.ndarray, "region 2"], side_um: float
) -> Float[np.ndarray, " region"]:
    """The share of each square region (its corner x, y and side in µm) that a map covers; outside the map is False."""
    integral = cv2.integral(where.astype(np.uint8))
    limit = np.array(where.shape[::-1])
    x0, y0 = np.clip(np.rint(corner_um / um_per_px), 0, limit).astype(int).T
    x1, y1 = np.clip(np.rint((corner_um + side_um) / um_per_px), 0, limit).astype(int).T
    inside = integral[y1, x1] - integral[y0, x1] - integral[y1, x0] + integral[y0, x0]
    return inside / np.maximum((x1 - x0) * (y1 - y0), 1)


def attention_auroc(truth: Truth, attention_file: Path) -> float:
    """AUROC of the regions' attention for being at least half tissue that carries the subtype.

    NaN where no region, or every region, is. Raises InputError if the attention file is not one.
    """
    try:
        with open(attention_file, "rb") as file, np.load(file) as saved:
            corner = saved["origin"] * float(saved["mpp"])
            side = float(saved["region_px"]) * float(saved["mpp"])
            attention = saved["attention"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(f"{attention_file}: no attention of a slide ({error}); run crcjax predict again") from error
    share = region_shares(truth.carriers, truth.um_per_px, corner.astype(float), side)
    return auroc(share >= 0.5, attention)


def truth_of(folder: Path, slide_id: str) -> Truth | None:
    """The truth of a slide in a folder of painted slides, or None if there is none."""
    path = folder / f"{slide_id}.truth.npz"
    return load_truth(path) if path.exists() else None
