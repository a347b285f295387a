"""The scores of quality control against the painter's artefacts: AUROC, what the default limits reject, and the time."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from record import record
from sklearn.metrics import roc_auc_score

from crcjax.slides.architecture import SUBTYPES, Tissue
from crcjax.slides.painter import SITES, SlideSpec, load_truth, paint_slide, truth_path
from crcjax.slides.quality import QUALITY_NAMES, QualityLimits, judge, score_tiles
from crcjax.slides.reader import open_slide
from crcjax.slides.tiling import TilingParams, mpp_of, plan_tiles, region_tiles

# The limits were chosen on slides of seeds from 9000 on; those reported here are of other seeds.
FIRST_SEED = 100
SIZE_UM = (1536, 1280)
SCORE_OF = {"out_of_focus": ("focus", -1), "pen": ("pen", 1), "fold": ("fold", 1), "bubble": ("bubble", 1)}
SMOOTH = (Tissue.STROMA, Tissue.MUCIN, Tissue.NECROSIS)
QUARTER, HALF = 0.25, 0.5  # of a tile's tissue that is spoilt in a spoilt tile; a clean tile has no artefact at all


@dataclass(frozen=True)
class Tiles:
    """The tiles of some slides: scores, the spoilt fraction of each by artefact, and which are smooth tissue."""

    scores: np.ndarray
    spoilt: dict[str, np.ndarray]
    smooth: np.ndarray

    @property
    def clean(self) -> np.ndarray:
        return ~np.any(list(self.spoilt.values()), axis=0)

    def auroc(self, artefact: str, least: float, clean: np.ndarray) -> float | None:
        """Of an artefact's score, tiles that are spoilt in `least` of their tissue against clean ones; None without any."""
        name, sign = SCORE_OF[artefact]
        spoilt = self.spoilt[artefact] >= least
        if not spoilt.any():
            return None
        score = sign * self.scores[:, QUALITY_NAMES.index(name)]
        chosen = spoilt | clean
        return float(roc_auc_score(spoilt[chosen], score[chosen]))


def paint(folder: Path, count: int, mpp: float) -> list[Path]:
    """Slides of all sites and subtypes with two artefacts each."""
    paths = []
    for i in range(count):
        artefacts = ("out_of_focus", "fold") if i // len(SITES) % 2 else ("pen", "bubble")
        size_px = round(SIZE_UM[0] / mpp), round(SIZE_UM[1] / mpp)
        spec = SlideSpec(SUBTYPES[i % 3], FIRST_SEED + i, SITES[i % len(SITES)], size_px, mpp, artefacts)
        paths.append(paint_slide(folder / f"{mpp}-{i}.svs", spec, workers=len(os.sched_getaffinity(0))))
    return paths


def score(paths: list[Path], magnification: str) -> tuple[Tiles, float]:
    """Every tile of the slides' grids that is a quarter tissue, and the seconds that scoring one takes."""
    params, mpp = TilingParams((magnification,)), mpp_of(magnification)
    side = params.tile_px * mpp
    scores, spoilt, smooth, seconds = [], [], [], 0.0
    for path in paths:
        truth = load_truth(truth_path(path))
        with open_slide(path) as slide:
            plan = plan_tiles(slide, params)
            for y in np.arange(0, SIZE_UM[1] - side + 1, side):
                for x in np.arange(0, SIZE_UM[0] - side + 1, side):
                    if truth.tissue_share(x, y, side) < 0.25:
                        continue
                    corner = (round(x / slide.info.mpp[0]), round(y / slide.info.mpp[1]))
                    tile = region_tiles(slide, params, plan.scale, *corner)[0]
                    start = time.thread_time()
                    scores.append(score_tiles([tile], plan.tissue, mpp)[0])
                    seconds += time.thread_time() - start
                    spoilt.append([truth.spoilt_share(name, x, y, side) for name in SCORE_OF])
                    smooth.append(truth.tissue_share(x, y, side, SMOOTH) > 0.6)
    by_artefact = dict(zip(SCORE_OF, np.array(spoilt).T, strict=True))
    return Tiles(np.array(scores), by_artefact, np.array(smooth)), seconds / len(scores)


def main() -> None:
    cv2.setNumThreads(1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        at_20x = paint(Path(temporary), 16, 0.5)
        for magnification, slides in (("10x", at_20x), ("20x", at_20x), ("40x", paint(Path(temporary), 8, 0.25))):
            tiles, seconds = score(slides, magnification)
            rejected = judge(tiles.scores, QualityLimits()) > 0
            for artefact in SCORE_OF:
                spoilt, smooth = tiles.spoilt[artefact] >= QUARTER, tiles.clean & tiles.smooth
                rows.append(
                    {
                        "measure": f"{artefact} {magnification}",
                        "AUROC, a quarter spoilt": tiles.auroc(artefact, QUARTER, tiles.clean),
                        "AUROC, half spoilt": tiles.auroc(artefact, HALF, tiles.clean),
                        "a quarter, against smooth tissue": tiles.auroc(artefact, QUARTER, smooth),
                        "spoilt tiles": int(spoilt.sum()),
                        "rejected": float(rejected[spoilt].mean()),
                        "clean tiles": int(tiles.clean.sum()),
                        "clean rejected": float(rejected[tiles.clean].mean()),
                        "µs a tile": seconds * 1e6,
                    }
                )
    note = (
        "Painted slides of all four sites and three subtypes, two artefacts each, of other seeds than those on which the"
        " scores and limits were made. Spoilt tiles are so in a quarter or half of their tissue, soft edges of the artefact"
        " included; clean tiles have no artefact. `rejected`: what the default limits do to tiles that are spoilt in a"
        " quarter, and to clean ones. Smooth tissue: over 60 % stroma, mucin and necrosis."
    )
    record("quality", "python tools/bench_quality.py", rows, note)


if __name__ == "__main__":
    main()
