"""Tissue segmentation of real tissue that is pasted with ragged outlines onto real glass, and of painted pale tissue.

Reads the real images of CRCJAX_REAL_DATA. `--part development` prints the figures on the images with which the segmentation
was developed, and records nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from record import record
from scipy.ndimage import gaussian_filter

from crcjax.slides.synthetic.painter import SITES, SlideSpec, paint_block
from crcjax.slides.synthetic.patterns import add_patterns
from crcjax.slides.synthetic.tissue_map import MAP_UM, SUBTYPES, Tissue, architecture
from crcjax.slides.tiling.tissue_segmentation import METHODS, THUMBNAIL_UM_PER_PX, tissue_mask, tissue_model
from crcjax.slides.wsi.discovery import find_slides
from crcjax.slides.wsi.slide import open_slide

UM_PER_PX = THUMBNAIL_UM_PER_PX
FINE_UM = 2.0  # outlines are cut at this resolution
ZOOM = round(UM_PER_PX / FINE_UM)
SIDE_PX = 416  # of a picture: 3.3 mm
OPENING_UM2 = 150_000.0  # smaller openings within painted tissue belong to it
ROUNDS = 3  # pictures of each glass and class
PATTERNS = ("submucosa", "mucosa")  # of the painted slides: pale and ordinary tissue
ABOUT = (
    "Tissue segmentation of real tissue on real glass: recall and precision.\n\n"
    "* Real tissue is pasted with ragged outlines onto real glass at 8 µm per pixel. Crops are mirrored to fill the outlines. The"
    " light that each picture transmits is its intensity over that of its own glass.\n"
    "* Images were divided by slide into a development part and this part before anything was tuned. This part was measured once.\n"
    "* `recall` and `precision` count pixels. Intervals: 95 %, bootstrap over pictures. Gaps and openings count as tissue.\n"
    "* Pale stroma and pale mucosa are real tissue with 0.35 of its optical density.\n"
    "* Synthetic: painted slides with loose submucosa and mucin. Tissue is what the painter's map of 16 µm per pixel or the"
    " painted stain shows, with openings up to 0.15 mm²."
)
CLASSES = {
    "ADI": "fat",
    "DEB": "debris",
    "LYM": "lymphoid",
    "MUC": "mucin",
    "MUS": "muscle",
    "NORM": "mucosa",
    "STR": "stroma",
    "TUM": "tumour",
    "aca": "tumour",
    "n": "mucosa",
}


@dataclass(frozen=True)
class Crop:
    """A box of a slide (level-0 px) or of a picture."""

    part: str
    path: str
    um_per_px: float
    box: tuple[int, int, int, int]  # x, y, width, height
    tissue: str = ""


CMU, POLYP = "slides/aperio_cmu-1-small-region.svs", "slides_crc/tiff_crc_polyp_part.tif"
TCGA, PROSTATE = "slides/aperio_tcga-cr-7395-01a-01-ts1_jp2k.svs", "slides/dicom_tcga-prad_penmarks"
# Slides and their parts were chosen before anything was tuned, boxes by eye. Glass comes first: it tells a slide's white.
GLASS = (
    Crop("development", CMU, 0.5, (0, 1300, 480, 1600)),
    Crop("development", POLYP, 0.5, (2200, 0, 1900, 1700)),
    Crop("development", "tiles/artefacts/histolab_no-tissue2.png", 8.0, (0, 0, 512, 440)),
    Crop("development", "tiles/artefacts/histolab_almost-white-2.png", 8.0, (0, 140, 512, 372)),
    Crop("report", TCGA, 0.5, (1200, 3230, 1100, 330)),
    Crop("report", PROSTATE, 8.0, (0, 1700, 900, 900)),
    Crop("report", "tiles/artefacts/histolab_no-tissue-line.png", 8.0, (0, 0, 512, 512)),
    Crop("report", "tiles/artefacts/histolab_high-nuclei-score-level2.png", 8.0, (0, 200, 512, 312)),
)
TISSUE = (
    Crop("development", CMU, 0.5, (800, 1500, 300, 1300), "stroma"),
    Crop("development", POLYP, 0.5, (2000, 2800, 1400, 2000), "mucosa"),
    Crop("report", TCGA, 0.5, (1700, 1400, 900, 1000), "tumour"),
    Crop("report", PROSTATE, 8.0, (2200, 1600, 450, 800), "stroma"),
)
# Archives of tiles: µm per pixel and the intensity of glass, as their openings show it. LC25000 states no scale; its lymphocytes
# are as wide as those of the others at 0.3. Of nct_crc_he, only the tiles of TCGA have normalised colours.
ARCHIVES = {
    "tiles/nct_crc_he": (0.5, (252, 247, 250)),
    "tiles/lc25000_colon": (0.3, (255, 255, 255)),
    "tiles/tcga_crc": (0.5, (251, 243, 249)),
}
NOT_NORMALISED = (245, 245, 245)
PALE = 0.35  # the part of the stain that remains in pale stroma and pale mucosa


@dataclass(frozen=True)
class Sample:
    """Real tissue as the fraction of light that it transmits, at FINE_UM per pixel."""

    name: str
    tissue: str
    light: Float32[np.ndarray, "y x 3"]


def part_of(path: str, index: int) -> str:
    """The part of a tile: every second of its class, but all tiles of one slide belong to one part."""
    if "TCGA-3X-AAVA" in path or "TCGA-AD-6964" in path:
        return "development" if "TCGA-3X-AAVA" in path else "report"
    return ("development", "report")[index % 2]


def read(folder: Path, crop: Crop, um_per_px: float) -> Float32[np.ndarray, "y x 3"]:
    """A crop at a resolution that is not finer than its own."""
    x, y, width, height = crop.box
    if crop.path.startswith("slides"):
        with open_slide(find_slides([folder / crop.path])[0], mpp=crop.um_per_px) as slide:
            picture = slide.read(x, y, width, height)
    else:
        picture = cv2.imread(str(folder / crop.path))[y : y + height, x : x + width, ::-1]
    return resized(picture, crop.um_per_px / um_per_px)


def resized(picture: np.ndarray, scale: float) -> Float32[np.ndarray, "y x 3"]:
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(picture.astype(np.float32), size, interpolation=way)


def samples(folder: Path, part: str) -> list[Sample]:
    """The real tissue of a part; stroma and mucosa a second time with PALE of their density."""
    crops = []
    for name, (um_per_px, white) in ARCHIVES.items():
        counts: dict[str, int] = {}
        for path in sorted((folder / name).glob("*.[jp][pn]g")):
            letters = path.name.split("-")[0].rstrip("0123456789.jpg") if name != "tiles/tcga_crc" else "TUM"
            index = counts[letters] = counts.get(letters, -1) + 1
            if letters in CLASSES and part_of(path.name, index) == part:
                picture = cv2.imread(str(path))[..., ::-1]
                glass = white if "nct" not in name or "TCGA" in path.name else NOT_NORMALISED
                if letters == "ADI":
                    # Fat cells are empty: glass shows through most of the tile.
                    glass = tuple(np.median(picture, axis=(0, 1)))
                crops.append((path.stem, CLASSES[letters], resized(picture, um_per_px / FINE_UM), glass))
    for crop in TISSUE:
        if crop.part == part:
            glass = [other for other in GLASS if other.path == crop.path]
            white = np.median(read(folder, glass[0], UM_PER_PX), axis=(0, 1)) if glass else (245, 245, 245)
            crops.append((Path(crop.path).name, crop.tissue, read(folder, crop, FINE_UM), white))
    tissue = [Sample(name, kind, light_through(pixels, white)) for name, kind, pixels, white in crops]
    pale = [s for s in tissue if s.tissue in ("stroma", "mucosa")]
    return tissue + [Sample(f"pale {s.name}", f"pale {s.tissue}", s.light**PALE) for s in pale]


def light_through(pixels: np.ndarray, white: object) -> Float32[np.ndarray, "y x 3"]:
    return np.clip(pixels / np.asarray(white, np.float32), 0.003, 1).astype(np.float32)


def mirrored(picture: np.ndarray, rng: np.random.Generator, side: int) -> np.ndarray:
    """A square of that side: the picture in a random orientation, repeated as its mirror images."""
    picture = np.rot90(picture[:, ::-1] if rng.random() < 0.5 else picture, rng.integers(4))
    rows, columns = (
        np.abs((np.arange(side) + rng.integers(2 * n)) % (2 * n) - n + 0.5).astype(int).clip(0, n - 1)
        for n in picture.shape[:2]
    )
    return picture[np.ix_(rows, columns)]


def outline(rng: np.random.Generator, side: int, um_per_px: float) -> Bool[np.ndarray, "y x"]:
    """One to three pieces of tissue with ragged borders, none touching the edge of the picture."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    field = np.full((side, side), -np.inf)
    for _ in range(rng.integers(1, 4)):
        at, turn, radius = rng.uniform(-0.45, 0.45, 2), rng.uniform(0, np.pi), rng.uniform(0.25, 0.5)
        along = (x - at[0]) * np.cos(turn) + (y - at[1]) * np.sin(turn)
        across = (y - at[1]) * np.cos(turn) - (x - at[0]) * np.sin(turn)
        field = np.maximum(field, radius - np.hypot(along, across / rng.uniform(0.5, 1.0)))
    for sigma_um, amplitude in ((200.0, 0.08), (50.0, 0.02), (12.0, 0.008)):
        field += amplitude * noise(rng, side, sigma_um / um_per_px)
    return (field > 0) & (np.maximum(np.abs(x), np.abs(y)) < 0.94)


def noise(rng: np.random.Generator, side: int, sigma_px: float) -> np.ndarray:
    """Smooth noise of unit deviation."""
    shrink = max(1, int(sigma_px / 4))
    small = gaussian_filter(rng.standard_normal((side // shrink + 1,) * 2), sigma_px / shrink)
    return cv2.resize(small / small.std(), (side, side), interpolation=cv2.INTER_CUBIC)


@dataclass(frozen=True)
class Picture:
    """A thumbnail with its truth: the index of every pixel's sample, or -1 on glass."""

    glass: str
    pixels: UInt8[np.ndarray, "y x 3"]
    truth: np.ndarray


def compose(rng: np.random.Generator, glass: np.ndarray, chosen: list[Sample], name: str = "") -> Picture:
    """Pastes the samples, each on a part of the same pieces, onto glass."""
    side = SIDE_PX * ZOOM
    inside = outline(rng, side, FINE_UM)
    which = np.argmax([noise(rng, side, 250.0 / FINE_UM) for _ in chosen], axis=0)
    light = np.ones((side, side, 3), np.float32)
    for i, sample in enumerate(chosen):
        here = inside & (which == i)
        light[here] = mirrored(sample.light, rng, side)[here]
    small = cv2.resize(light, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
    pixels = np.clip(mirrored(glass, rng, SIDE_PX) * small, 0, 255).round().astype(np.uint8)
    covered = cv2.resize(inside.astype(np.float32), (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA) >= 0.5
    nearest = cv2.resize(which.astype(np.uint8), (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_NEAREST)
    return Picture(name, pixels, np.where(covered, nearest.astype(int), -1))


def pictures(folder: Path, part: str, rounds: int) -> Iterator[tuple[Picture, list[Sample]]]:
    """`rounds` pictures for every glass and class of tissue: a sample of that class beside two others."""
    tissue = samples(folder, part)
    glasses = [(crop.path, read(folder, crop, UM_PER_PX)) for crop in GLASS if crop.part == part]
    classes = sorted({sample.tissue for sample in tissue})
    rng = np.random.default_rng(0 if part == "development" else 1)
    for (name, glass), kind, _ in product(glasses, classes, range(rounds)):
        first = [sample for sample in tissue if sample.tissue == kind]
        chosen = [first[rng.integers(len(first))], *(tissue[i] for i in rng.choice(len(tissue), 2, replace=False))]
        yield compose(rng, glass, chosen, name), chosen


def painted(seed: int, tissue: str) -> Picture:
    """A painted slide with pale submucosa; its truth is 0 on the named kind, 1 on other tissue, -1 on glass."""
    side = round(SIDE_PX * UM_PER_PX)
    subtype = SUBTYPES[seed % len(SUBTYPES)]
    # At 2 µm per pixel, so that structures are painted before they are shrunk.
    spec = SlideSpec(subtype, seed, SITES[seed % len(SITES)], (side // 2, side // 2), FINE_UM, patterns=PATTERNS)
    pixels = cv2.resize(paint_block(spec, 0, 0, *spec.size_px), (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
    kinds = add_patterns(architecture(subtype, seed, side, side), PATTERNS, seed)
    zoom = round(MAP_UM / UM_PER_PX)
    kinds = np.kron(kinds, np.ones((zoom, zoom), np.uint8))[:SIDE_PX, :SIDE_PX]
    # Glands reach beyond their place on the map.
    tissue_px = (kinds > 0) | (pixels < np.array(spec.site.white) - 8).any(axis=2)
    _, labels, statistics, _ = cv2.connectedComponentsWithStats((~tissue_px).astype(np.uint8))
    tissue_px |= (statistics[:, cv2.CC_STAT_AREA] < OPENING_UM2 / UM_PER_PX**2)[labels]
    return Picture("painted", pixels, np.where(tissue_px, (kinds != Tissue[tissue.upper()]).astype(int), -1))


@dataclass
class Counts:
    """Pixels of each picture: of the truth, of the mask, and of both."""

    truth: list[int]
    mask: list[int]
    both: list[int]

    def add(self, truth: np.ndarray, mask: np.ndarray) -> None:
        for values, pixels in ((self.truth, truth), (self.mask, mask), (self.both, truth & mask)):
            values.append(int(pixels.sum()))

    def share(self, of: str) -> tuple[float, str]:
        """The share of both among the truth (recall) or the mask (precision), and its interval."""
        both, whole = np.array(self.both), np.array(getattr(self, of))
        again = np.random.default_rng(0).integers(len(both), size=(1000, len(both)))
        low, high = np.quantile(both[again].sum(axis=1) / np.maximum(whole[again].sum(axis=1), 1), (0.025, 0.975))
        return float(both.sum() / max(1, whole.sum())), f"{low:.3f} to {high:.3f}"


def measure(composed: list[tuple[Picture, list[str]]], method: str, prefix: str) -> list[dict]:
    """Rows of all pictures, of every glass, and of every class of tissue, for which precision has no meaning."""
    counts: dict[str, Counts] = {}
    for picture, kinds in composed:
        mask = tissue_mask(picture.pixels, tissue_model(picture.pixels), UM_PER_PX, method)
        for name in ("all", f"on {Path(picture.glass).name}"):
            counts.setdefault(name, Counts([], [], [])).add(picture.truth >= 0, mask)
        for i, kind in enumerate(kinds):
            counts.setdefault(kind, Counts([], [], [])).add(picture.truth == i, mask)
    rows = []
    for name, count in counts.items():
        recall, interval = count.share("truth")
        precise = name == "all" or name.startswith("on ")
        precision, of_precision = count.share("mask") if precise else (None, "")
        rows.append(
            {
                "measure": f"{prefix}{method}: {name}",
                "recall": recall,
                "recall, 95 %": interval,
                "precision": precision,
                "precision, 95 %": of_precision,
                "pictures": len(count.both),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("development", "report"), default="report")
    part = parser.parse_args().part
    folder = Path(os.environ["CRCJAX_REAL_DATA"])
    composed = [(picture, [sample.tissue for sample in chosen]) for picture, chosen in pictures(folder, part, ROUNDS)]
    first = 500_000 if part == "development" else 600_000
    pale = [(painted(first + i, kind), [kind, "other tissue"]) for i in range(12) for kind in ("submucosa", "mucin")]
    rows = [row for method in METHODS for row in measure(composed, method, "")]
    rows += [row for row in measure(pale, "robust", "synthetic, ") if "painted" not in row["measure"]]
    if part == "report":
        record("tissue", "python tools/bench_tissue.py", rows, ABOUT)
    else:
        for row in rows:
            print(row)


if __name__ == "__main__":
    main()
