"""Compares attention with the ground truth of synthetic slides."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from crcjax.errors import InputError
from crcjax.slides.synthetic.truth import Truth, load_truth
from crcjax.slides.tiling.box_shares import box_shares
from crcjax.validation.ranking import auroc


def attention_auroc(truth: Truth, attention_file: Path) -> float:
    """AUROC of the attention for regions where at least half of the area is tissue that shows the slide's subtype.

    NaN if no region or every region is of that kind. Raises InputError if the file holds no attention.
    """
    try:
        with open(attention_file, "rb") as file, np.load(file) as saved:
            corner_um = saved["origin"].astype(float) * float(saved["mpp"])
            side_um = float(saved["region_px"]) * float(saved["mpp"])
            attention = saved["attention"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(
            f"{attention_file}: holds no attention of a slide ({error}); run crcjax predict again"
        ) from error
    start, end = corner_um / truth.um_per_px, (corner_um + side_um) / truth.um_per_px
    share = box_shares(truth.carriers, start, end, outside_counts=False)
    return auroc(share >= 0.5, attention)


def slide_truth(folder: Path, slide_id: str) -> Truth | None:
    """The ground truth of a slide in a folder of synthetic slides; None if it has none."""
    path = folder / f"{slide_id}.truth.npz"
    return load_truth(path) if path.exists() else None
