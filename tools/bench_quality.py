"""The scores of quality control on synthetic artefacts: AUROC, the tiles that the default limits reject, and the time."""

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

# Scores and limits were developed on slides of seeds from 9000 and from 30000 to 33000 on. Earlier versions were reported on
# seeds from 700000 and 800000 on. The slides reported here have other seeds.
FIRST_SEED = 900_000
SIZE_UM = (1536, 1280)
# The artefacts of each slide. Stain is scored on slides without other artefacts.
ARTEFACTS = (("pen", "bubble"), ("out_of_focus", "fold"), ("blood", "dust"), ("pale",), ("dense",))
SMOOTH = (Tissue.STROMA, Tissue.MUCIN, Tissue.NECROSIS)
ABOUT = (
    "Scores of quality control on synthetic artefacts: AUROC, rejected tiles and time.\n\n"
    "* Synthetic slides of all four sites and three subtypes with one or two artefacts each. Their seeds differ from those on"
    " which scores and limits were developed. Measured once.\n"
    "* Corrupted tiles: an artefact covers a quarter, or half, of their tissue, including its soft edges and the gaps between"
    " specks of dust. Clean tiles have no artefact.\n"
    "* Pale tissue has a quarter of its stain, dense tissue three times its stain, on a fifth to a third of the slide.\n"
    "* Smooth tissue: more than 60 % stroma, mucin and necrosis.\n"
    "* `corrupted rejected`, `clean rejected`: the fraction of tiles that the default limits reject, of those corrupted in a"
    " quarter and of clean ones. Tiles that are only marked are not rejected, and a fold alone excludes no tile.\n"
    "* `mostly pale`: the pale slides again, with a tissue model from which most of the uncorrupted tissue was removed, so that"
    " four fifths of the rest are pale.\n\n"
    "All 24 scores are above the target of 0.95 from a quarter on, also against smooth tissue. Sets of slides differ. For folds at"
    " 40x:\n\n"
    "| slides | score of a patch | AUROC |\n|---|---|---|\n"
    "| 36 of those used in development | now | 0.969 (gain 0.004 to 0.025, 95 %, paired over slides) |\n"
    "| 36 of those used in development | its minimum alone | 0.956 |\n"
    "| those of the report before | its minimum alone | 0.933 |\n\n"
    "Since the scores of folds rose, so did their limit, from 1.6 to 1.75; it marks tiles now, and rejected them when this "
    "was measured. On the same 36 slides:\n\n"
    "| fraction rejected | limit 1.6 | limit 1.75 |\n|---|---|---|\n"
    "| folded tiles, 40x | 0.68 | 0.68 |\n| folded tiles, 20x | 0.79 | 0.81 |\n"
    "| clean tiles, 40x | 0.4 % | 0.6 %, most of them on one slide |\n| clean tiles, 20x | 0.2 % | 0.4 %, most of them on one slide |\n\n"
    "A quarter of a tile of 64 µm is hardly larger than the soft edge of an artefact. On the slides used in development, 40x tiles"
    " that count as 25 to 30 % out of focus are 8 % blurred; their AUROC against clean tiles is 0.54."
)
# The corrupted share of a tile's tissue from which on it counts as corrupted. A clean tile has no artefact at all.
QUARTER, HALF = 0.25, 0.5


@dataclass(frozen=True)
class Tiles:
    """The tiles of several slides: scores, the corrupted share of each by artefact, and which are smooth tissue."""

    scores: np.ndarray
    corrupted: dict[str, np.ndarray]
    smooth: np.ndarray

    @property
    def clean(self) -> np.ndarray:
        return ~np.any(list(self.corrupted.values()), axis=0)

    def auroc(self, artefact: str, least: float, clean: np.ndarray) -> float | None:
        """AUROC of an artefact's score for tiles corrupted in at least `least` of their tissue; None if there are none."""
        name, sign = SCORE_OF[artefact]
        corrupted = self.corrupted[artefact] >= least
        if not corrupted.any():
            return None
        score = sign * self.scores[:, QUALITY_NAMES.index(name)]
        chosen = corrupted | clean
        return float(roc_auc_score(corrupted[chosen], score[chosen]))


def paint(folder: Path, count: int, mpp: float) -> list[Path]:
    """Paints slides of all sites and subtypes with their artefacts."""
    paths = []
    for i in range(count):
        artefacts = ARTEFACTS[i // len(SITES) % len(ARTEFACTS)]
        size_px = round(SIZE_UM[0] / mpp), round(SIZE_UM[1] / mpp)
        spec = SlideSpec(SUBTYPES[i % 3], FIRST_SEED + i, SITES[i % len(SITES)], size_px, mpp, artefacts)
        paths.append(paint_slide(folder / f"{mpp}-{i}.svs", spec, workers=len(os.sched_getaffinity(0))))
    return paths


def model_if_mostly_pale(thumbnail: np.ndarray, truth: Truth) -> TissueModel:
    """The tissue model of a slide from which other tissue is removed until four fifths of the rest are pale."""
    size = thumbnail.shape[1::-1]
    tissue, pale = (
        cv2.resize(values.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        for values in (truth.kinds > 0, truth.artefacts["pale"])
    )
    other = tissue & ~pale
    removed = other & (other.cumsum().reshape(other.shape) > (tissue & pale).sum() / 4)
    return tissue_model(np.where(removed[..., None], np.uint8(truth.white), thumbnail))


def score(paths: list[Path], magnification: str, mostly_pale: bool = False) -> tuple[Tiles, float]:
    """The tiles of the slides with at least a quarter of tissue, and the seconds to score one."""
    params, mpp = TilingParams((magnification,)), mpp_of(magnification)
    side = params.tile_px * mpp
    scores, corrupted, smooth, seconds = [], [], [], 0.0
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
                    corrupted.append([truth.corrupted_share(name, x, y, side) for name in SCORE_OF])
                    smooth.append(truth.tissue_share(x, y, side, SMOOTH) > 0.6)
    by_artefact = dict(zip(SCORE_OF, np.array(corrupted).T, strict=True))
    return Tiles(np.array(scores), by_artefact, np.array(smooth)), seconds / len(scores)


def row(measure: str, tiles: Tiles, artefact: str, seconds: float) -> dict:
    rejected = tile_reasons(tiles.scores, QualityLimits()) > 0
    corrupted, smooth = tiles.corrupted[artefact] >= QUARTER, tiles.clean & tiles.smooth
    return {
        "measure": measure,
        "AUROC, a quarter corrupted": tiles.auroc(artefact, QUARTER, tiles.clean),
        "AUROC, half corrupted": tiles.auroc(artefact, HALF, tiles.clean),
        "AUROC, a quarter, against smooth tissue": tiles.auroc(artefact, QUARTER, smooth),
        "corrupted tiles": int(corrupted.sum()),
        "corrupted rejected": float(rejected[corrupted].mean()),
        "clean tiles": int(tiles.clean.sum()),
        "clean rejected": float(rejected[tiles.clean].mean()),
        "µs/tile": seconds * 1e6,
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
    record("quality", "python tools/bench_quality.py", rows, ABOUT)


if __name__ == "__main__":
    main()
