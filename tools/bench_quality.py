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

from crcjax.slides.synthetic.artefacts import SCORE_OF
from crcjax.slides.synthetic.painter import SITES, SlideSpec, paint_slide
from crcjax.slides.synthetic.tissue_map import SUBTYPES, Tissue
from crcjax.slides.synthetic.truth import Truth, load_truth, truth_path
from crcjax.slides.tiling.plan import TilingParams, mpp_of, plan_tiles
from crcjax.slides.tiling.quality_control import QUALITY_NAMES, QualityLimits, score_tiles, tile_reasons
from crcjax.slides.tiling.read import region_tiles
from crcjax.slides.tiling.tissue_segmentation import TissueModel, tissue_model
from crcjax.slides.wsi.slide import open_slide

# Scores and limits were made on slides of seeds from 9000, and 30000 to 33000 on, and what they were before that was
# reported on those from 700000 and 800000 on; those reported here are of other seeds.
FIRST_SEED = 900_000
SIZE_UM = (1536, 1280)
# Together on one slide; stain is judged apart from what lies on the tissue.
TOGETHER = (("pen", "bubble"), ("out_of_focus", "fold"), ("blood", "dust"), ("pale",), ("dense",))
SMOOTH = (Tissue.STROMA, Tissue.MUCIN, Tissue.NECROSIS)
NOTE = (
    "Painted slides of all four sites and three subtypes, one or two artefacts each, of other seeds than those on which the"
    " scores and limits were made, and measured once. Spoilt tiles are so in a quarter or half of their tissue, soft edges"
    " of the artefact and the gaps between specks of dust included; clean tiles have no artefact. Pale tissue has a quarter"
    " of its stain, dense tissue thrice as much, on a fifth to a third of the slide. `rejected`: what the default limits do"
    " to tiles that are spoilt in a quarter, and to clean ones. Smooth tissue: over 60 % stroma, mucin and necrosis.\n\n"
    "Mostly pale: the pale slides again, judged by a model of the slide for which most of their unspoilt tissue was cut"
    " away, so that four fifths of what is left is pale.\n\n"
    "All 24 scores are above the target of 0.95 from a quarter spoilt, over smooth tissue too. Sets of slides differ: on 36 of"
    " those on which the scores were made fold 40x is 0.969, and was 0.956 when a patch was judged by its least alone (the gain,"
    " paired over slides: 0.004 to 0.025, 95 %); on the slides reported before, that was 0.933. The limit on folds rose with"
    " their scores, from 1.6 to 1.75: on those 36 slides as many folded tiles are rejected as were at 40x (0.68), more at"
    " 20x (0.81 after 0.79), and of clean tiles 0.6 % after 0.4 % at 40x, 0.4 % after 0.2 % at 20x, most of them on one slide.\n\n"
    "A quarter of a tile of 64 µm is hardly more than an artefact's soft edge: on the slides on which the scores were made,"
    " tiles at 40x of which 25 to 30 % count as out of focus hold 8 % of blur, and are told from clean ones at 0.54."
)
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
    """Slides of all sites and subtypes with their artefacts."""
    paths = []
    for i in range(count):
        artefacts = TOGETHER[i // len(SITES) % len(TOGETHER)]
        size_px = round(SIZE_UM[0] / mpp), round(SIZE_UM[1] / mpp)
        spec = SlideSpec(SUBTYPES[i % 3], FIRST_SEED + i, SITES[i % len(SITES)], size_px, mpp, artefacts)
        paths.append(paint_slide(folder / f"{mpp}-{i}.svs", spec, workers=len(os.sched_getaffinity(0))))
    return paths


def model_if_mostly_pale(thumbnail: np.ndarray, truth: Truth) -> TissueModel:
    """The slide's model if only so much of its tissue were not pale that it makes up a fifth."""
    size = thumbnail.shape[1::-1]
    tissue, pale = (
        cv2.resize(values.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        for values in (truth.kinds > 0, truth.artefacts["pale"])
    )
    unspoilt = tissue & ~pale
    cut = unspoilt & (unspoilt.cumsum().reshape(unspoilt.shape) > (tissue & pale).sum() / 4)
    return tissue_model(np.where(cut[..., None], np.uint8(truth.white), thumbnail))


def score(paths: list[Path], magnification: str, mostly_pale: bool = False) -> tuple[Tiles, float]:
    """Every tile of the slides' grids that is a quarter tissue, and the seconds that scoring one takes."""
    params, mpp = TilingParams((magnification,)), mpp_of(magnification)
    side = params.tile_px * mpp
    scores, spoilt, smooth, seconds = [], [], [], 0.0
    for path in paths:
        truth = load_truth(truth_path(path))
        with open_slide(path) as slide:
            plan = plan_tiles(slide, params)
            model = model_if_mostly_pale(plan.thumbnail, truth) if mostly_pale else plan.tissue
            for y in np.arange(0, SIZE_UM[1] - side + 1, side):
                for x in np.arange(0, SIZE_UM[0] - side + 1, side):
                    if truth.tissue_share(x, y, side) < 0.25:
                        continue
                    corner = (round(x / slide.info.mpp[0]), round(y / slide.info.mpp[1]))
                    tile = region_tiles(slide, params, plan.scale, *corner)[0]
                    start = time.thread_time()
                    scores.append(score_tiles([tile], model, mpp)[0])
                    seconds += time.thread_time() - start
                    spoilt.append([truth.corrupted_share(name, x, y, side) for name in SCORE_OF])
                    smooth.append(truth.tissue_share(x, y, side, SMOOTH) > 0.6)
    by_artefact = dict(zip(SCORE_OF, np.array(spoilt).T, strict=True))
    return Tiles(np.array(scores), by_artefact, np.array(smooth)), seconds / len(scores)


def row(measure: str, tiles: Tiles, artefact: str, seconds: float) -> dict:
    rejected = tile_reasons(tiles.scores, QualityLimits()) > 0
    spoilt, smooth = tiles.spoilt[artefact] >= QUARTER, tiles.clean & tiles.smooth
    return {
        "measure": measure,
        "AUROC, a quarter spoilt": tiles.auroc(artefact, QUARTER, tiles.clean),
        "AUROC, half spoilt": tiles.auroc(artefact, HALF, tiles.clean),
        "a quarter, against smooth tissue": tiles.auroc(artefact, QUARTER, smooth),
        "spoilt tiles": int(spoilt.sum()),
        "rejected": float(rejected[spoilt].mean()),
        "clean tiles": int(tiles.clean.sum()),
        "clean rejected": float(rejected[tiles.clean].mean()),
        "µs a tile": seconds * 1e6,
    }


def main() -> None:
    cv2.setNumThreads(1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        at_20x, at_40x = paint(Path(temporary), 40, 0.5), paint(Path(temporary), 40, 0.25)
        by_magnification = {"10x": at_20x, "20x": at_20x, "40x": at_40x}
        for magnification, slides in by_magnification.items():
            tiles, seconds = score(slides, magnification)
            rows += [row(f"{artefact} {magnification}", tiles, artefact, seconds) for artefact in SCORE_OF]
        for magnification, slides in by_magnification.items():
            pale = [path for path in slides if "pale" in load_truth(truth_path(path)).artefacts]
            tiles, seconds = score(pale, magnification, mostly_pale=True)
            rows.append(row(f"mostly pale {magnification}", tiles, "pale", seconds))
    record("quality", "python tools/bench_quality.py", rows, NOTE)


if __name__ == "__main__":
    main()
