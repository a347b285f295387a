"""Ground truth of a synthetic slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, UInt8

from crcjax.errors import InputError
from crcjax.slides.synthetic.artefacts import SYNTHETIC_ARTEFACTS
from crcjax.slides.synthetic.tissue_map import CARRIER, Tissue


@dataclass(frozen=True)
class Truth:
    """The ground truth of a synthetic slide; maps have `um_per_px`, `kinds` index `names`, `spec` is its SlideSpec as text."""

    subtype: str
    kinds: UInt8[np.ndarray, "y x"]
    names: tuple[str, ...]
    um_per_px: float
    haematoxylin: tuple[float, ...]
    eosin: tuple[float, ...]
    white: tuple[int, ...]
    artefacts: dict[str, Bool[np.ndarray, "y x"]]
    seed: int
    spec: str
    inked: Bool[np.ndarray, "y x"] | None = None  # surgical ink on the margin of the tissue; None without

    @property
    def carriers(self) -> Bool[np.ndarray, "y x"]:
        """The tissue that shows the slide's subtype."""
        return self.kinds == CARRIER[self.subtype]

    def tissue_share(self, x_um: float, y_um: float, side_um: float, kinds: Sequence[int] = tuple(Tissue)[1:]) -> float:
        """The fraction of a square box that is tissue, or tissue of the given kinds."""
        return float(np.isin(self._box(self.kinds, x_um, y_um, side_um), kinds).mean())

    def corrupted_share(self, artefact: str, x_um: float, y_um: float, side_um: float) -> float:
        """The fraction of a square box's tissue that the artefact corrupts.

        Fold and dense do not corrupt fat and mucin, where twice or three times the stain is not visible.
        """
        kinds = self._box(self.kinds, x_um, y_um, side_um)
        if artefact not in self.artefacts or not kinds.any():
            return 0.0
        is_corrupted = self._box(self.artefacts[artefact], x_um, y_um, side_um) & (kinds > 0)
        if artefact in ("fold", "dense"):
            is_corrupted &= ~np.isin(kinds, (Tissue.ADIPOSE, Tissue.MUCIN))
        return float(is_corrupted.sum() / (kinds > 0).sum())

    def _box(self, values: np.ndarray, x_um: float, y_um: float, side_um: float) -> np.ndarray:
        top, left, bottom, right = np.rint(np.array([y_um, x_um, y_um + side_um, x_um + side_um]) / self.um_per_px)
        return values[int(top) : int(bottom), int(left) : int(right)]


def truth_path(slide: str | Path) -> Path:
    """The path of the ground truth of a synthetic slide."""
    return Path(slide).with_suffix(".truth.npz")


def load_truth(path: str | Path) -> Truth:
    """Reads a `.truth.npz`. Raises InputError if it is not one."""
    try:
        # Opened here, because np.load does not close a file that is not a zip.
        with open(path, "rb") as file, np.load(file) as saved:
            artefacts = {name: saved[f"artefact_{name}"] for name in SYNTHETIC_ARTEFACTS if f"artefact_{name}" in saved}
            return Truth(
                str(saved["subtype"]),
                saved["kinds"],
                tuple(saved["names"].tolist()),
                float(saved["um_per_px"]),
                tuple(saved["haematoxylin"].tolist()),
                tuple(saved["eosin"].tolist()),
                tuple(saved["white"].tolist()),
                artefacts,
                int(saved["seed"]),
                str(saved["spec"]),
                saved.get("inked"),
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(
            f"{path}: no truth of a synthetic slide ({error}); delete it and paint the slide again"
        ) from error
