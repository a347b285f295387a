"""Mosaics of real colorectal tissue as slides, adenocarcinoma against benign, for docs/example_real_tissue.md.

    CRCJAX_REAL_DATA=FOLDER python tools/real_mosaics.py OUT          OUT/mosaics/*.tif and OUT/cohort.csv
    CRCJAX_REAL_DATA=FOLDER python tools/real_mosaics.py OUT --run    and the commands of that page, recorded as a benchmark

FOLDER/tiles holds nct_crc_he (224 px at 0.5 µm per pixel; NCT-CRC-HE-100K and CRC-VAL-HE-7K) and lc25000_colon (768 px; LC25000).
Every image is in one mosaic alone, and every mosaic is a case of its own.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
from jaxtyping import UInt8
from record import record

PAGE = Path(__file__).parents[1] / "docs" / "example_real_tissue.md"
MPP = 0.5
# LC25000 states no resolution. Its nuclei are about twice as large in pixels as those of nct_crc_he.
LC25000_MPP = 0.25
PATCH_PX, PATCHES, GLASS = 224, 8, 244
# Images of tissue that is in both classes, of nct_crc_he.
SHARED = ("ADI", "DEB", "LYM", "MUC", "MUS", "STR")
SHARED_IMAGES = 2


@dataclass(frozen=True)
class Mosaic:
    """A mosaic of images at `mpp`: those of its class, and those of tissue that both classes have."""

    slide_id: str
    subtype: str
    site: str
    images: tuple[Path, ...]
    shared: tuple[Path, ...]
    mpp: float


def mosaics(tiles: Path) -> Iterator[Mosaic]:
    """The mosaics of both sources. No image is in two of them."""
    folder = tiles / "nct_crc_he"
    # Tissues take turns, so that the images of a mosaic are of several tissues.
    by_tissue = [sorted(folder.glob(f"{name}-*.png")) for name in SHARED]
    shared = [images[i] for i in range(max(map(len, by_tissue))) for images in by_tissue if i < len(images)]
    number = 0
    for subtype, tissue in (("adenocarcinoma", "TUM"), ("benign", "NORM")):
        for i, image in enumerate(sorted(folder.glob(f"{tissue}-*.png"))):
            others = tuple(shared[SHARED_IMAGES * number : SHARED_IMAGES * (number + 1)])
            yield Mosaic(f"nct-{tissue.lower()}{i}", subtype, "nct", (image,), others, MPP)
            number += 1
    for subtype, name in (("adenocarcinoma", "aca"), ("benign", "n")):
        # LC25000 was augmented before it was published: 0 and 1, and 6 and 7, show the same tissue, so that pairs stay together.
        for i in range(5):
            pair = tuple(tiles / "lc25000_colon" / f"{name}{2 * i + j}.jpg" for j in (0, 1))
            yield Mosaic(f"lc-{name}{i}", subtype, "lc25000", pair, (), LC25000_MPP)


def mosaic_pixels(mosaic: Mosaic, seed: int) -> UInt8[np.ndarray, "y x 3"]:
    """PATCHES x PATCHES flipped and rotated crops on glass, at MPP; half of them are of shared tissue where there is any."""
    rng = np.random.default_rng(seed)
    images, shared = ([_image(path, mosaic.mpp) for path in paths] for paths in (mosaic.images, mosaic.shared))
    side = PATCH_PX * (PATCHES + 2)
    pixels = np.full((side, side, 3), GLASS, np.uint8)
    for y in range(PATCHES):
        for x in range(PATCHES):
            source = shared if shared and rng.random() < 0.5 else images
            image = source[rng.integers(len(source))]
            top, left = (rng.integers(length - PATCH_PX + 1) for length in image.shape[:2])
            patch = np.rot90(image[top : top + PATCH_PX, left : left + PATCH_PX], rng.integers(4))
            patch = patch[:, ::-1] if rng.random() < 0.5 else patch
            corner = PATCH_PX * (y + 1), PATCH_PX * (x + 1)
            pixels[corner[0] : corner[0] + PATCH_PX, corner[1] : corner[1] + PATCH_PX] = patch
    return pixels


def write_cohort(tiles: Path, out: Path) -> Path:
    """Writes all mosaics as tiled TIFFs, which state their resolution, and the table of the cohort."""
    rows = []
    for seed, mosaic in enumerate(mosaics(tiles)):
        path = out / "mosaics" / f"{mosaic.slide_id}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(
            path,
            mosaic_pixels(mosaic, seed),
            photometric="rgb",
            tile=(256, 256),
            compression="jpeg",
            compressionargs={"level": 90},
            resolution=(1e4 / MPP, 1e4 / MPP),
            resolutionunit="CENTIMETER",
        )
        rows.append([mosaic.slide_id, mosaic.slide_id, path.relative_to(out), mosaic.subtype, mosaic.site])
    with open(out / "cohort.csv", "w", newline="") as file:
        csv.writer(file).writerows([["slide_id", "case_id", "path", "subtype", "site"], *rows])
    return out / "cohort.csv"


def _image(path: Path, mpp: float) -> UInt8[np.ndarray, "y x 3"]:
    """An image at MPP."""
    pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    side = round(len(pixels) * mpp / MPP)
    return pixels if side == len(pixels) else cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)


def page_commands(out: Path) -> list[list[str]]:
    """The crcjax commands of the page, with OUT in place of EXAMPLE."""
    lines = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    crcjax ")]
    return [line.replace("EXAMPLE", str(out)).split() for line in lines]


def result(report: Path, evaluation: str, cpu_minutes: float) -> dict[str, str]:
    """The row of a report in the table of results."""
    statistics = json.loads((report / "metrics.json").read_text())["statistics"]

    def text(name: str) -> str:
        return "{value:.3f} ({ci_low:.3f} to {ci_high:.3f})".format(**statistics[name])

    measures = {name: text(name) for name in ("accuracy", "macro AUROC")}
    return {
        "evaluation": evaluation,
        "mosaics": str(statistics["accuracy"]["n"]),
        **measures,
        "CPU minutes": f"{cpu_minutes:.1f}",
    }


def cpu_minutes() -> float:
    """The CPU time of all processes that this one has started and waited for. Other programs on the machine do not change it."""
    times = os.times()
    return (times.children_user + times.children_system) / 60


def run_page(out: Path) -> None:
    """Runs the commands of the page one after another, and records the figures of its three reports."""
    evaluations = iter(("test cases of one run", "five folds of cases", "each source by a run on the other"))
    rows: list[dict] = []
    start = cpu_minutes()
    for command in page_commands(out):
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True, cwd=PAGE.parents[1])
        if command[1] == "validate":
            rows.append(result(Path(command[-1]), next(evaluations), cpu_minutes() - start))
            start = cpu_minutes()
    record(
        "real_mosaics",
        "CRCJAX_REAL_DATA=… python tools/real_mosaics.py OUT --run",
        rows,
        "Mosaics of real tissue through tile, train, predict and validate, adenocarcinoma against benign.\n\n"
        "* The commands are those of docs/example_real_tissue.md, which describes the mosaics. Mosaics are not slides.\n"
        "* Intervals are 95 %: Wilson for accuracy, the influence function (logit) for AUROC. CPU minutes are those of all processes; the first row includes tiling.",
    )


def main(out: Path, runs_page: bool) -> None:
    print(write_cohort(Path(os.environ["CRCJAX_REAL_DATA"]) / "tiles", out))
    if runs_page:
        run_page(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), "--run" in sys.argv[2:])
