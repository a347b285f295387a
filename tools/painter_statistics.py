"""Colour and texture of painted tissue beside those of real tiles of the same class, as a table and a figure.

CRCJAX_REAL_DATA=FOLDER python tools/painter_statistics.py
"""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
from bench_tissue import ARCHIVES, NOT_NORMALISED, PALE, POLYP
from jaxtyping import Float32, UInt8
from record import record

from crcjax.slides.stain.methods import fit_macenko
from crcjax.slides.synthetic.painter import SITES, SlideSpec, paint_block
from crcjax.slides.synthetic.patterns import PATTERNS, add_patterns
from crcjax.slides.synthetic.tissue_map import MAP_UM, SUBTYPES, Tissue, architecture
from crcjax.slides.wsi.slide import open_slide

UM_PER_PX = 1.0  # of the measurement
SIDE_UM = 112.0  # of a tile
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "painter_statistics.png"
STATISTICS = (
    "haematoxylin, first quartile",
    "haematoxylin, median",
    "haematoxylin, third quartile",
    "nuclei per mm²",
    "local contrast",
)
CLASSES = {
    "ADI": "fat",
    "DEB": "debris",
    "LYM": "lymphoid",
    "MUC": "mucin",
    "MUS": "muscle",
    "NORM": "normal mucosa",
    "STR": "stroma",
    "TUM": "tumour",
}
# The real class of each painted kind.
REAL_CLASS = {
    Tissue.STRATIFIED: "tumour",
    Tissue.VILLOUS: "tumour",
    Tissue.SERRATED: "normal mucosa",
    Tissue.FOLLICLES: "lymphoid",
    Tissue.MUCOSA: "normal mucosa",
    Tissue.MUSCLE: "muscle",
    Tissue.SUBMUCOSA: "pale stroma",
    Tissue.GLANDS: "tumour",
    Tissue.CRIBRIFORM: "tumour",
    Tissue.STROMA: "stroma",
    Tissue.DESMOPLASTIC: "stroma",
    Tissue.LYMPHOID: "lymphoid",
    Tissue.MUCIN: "mucin",
    Tissue.NECROSIS: "debris",
    Tissue.ADIPOSE: "fat",
}
SLIDES = 8  # painted for each kind
LEAST_SHARE = 0.85  # of a painted tile that must be of its kind
LEAST_TISSUE = 0.6  # of a tile of the polyp
ABOUT = (
    "Colour and texture of painted tissue beside real tiles of its class.\n\n"
    f"* Tiles of {SIDE_UM:.0f} µm at 1 µm per pixel. Haematoxylin: quartiles over a tile's pixels of the concentration, by the stains"
    " that Macenko's method finds in all tiles of one real source, or the true ones of a painted site. Nuclei: maxima of the haematoxylin that stand out from 6 µm around"
    " them. Local contrast: the standard deviation of the optical density within 16 µm, the tile's median.\n"
    "* `real` is the least to the greatest value over the real tiles of the class. Tumour includes the adenoma of the polyp. Pale"
    f" stroma is real stroma with {PALE} of its optical density.\n"
    "* `painted` is the median over tiles and, in brackets, the first to the ninth decile. `within` is the share of painted tiles"
    " within the real values.\n"
    "* The first seven kinds are the patterns of `SlideSpec.patterns`; the next eight are the other tissue of slides with patterns."
    " Default slides, without patterns, keep the pixels that they had: their stroma, lymphocytes, mucin and necrosis are paler and"
    " poorer in nuclei than real tissue."
)


def statistics(density: Float32[np.ndarray, "y x 3"], stains: Float32[np.ndarray, "2 3"]) -> list[float]:
    """STATISTICS of a tile of UM_PER_PX from its optical density and the unit vectors of its stains."""
    concentration = density @ np.linalg.pinv(stains)
    haematoxylin = np.ascontiguousarray(concentration[..., 0], np.float32)
    standing_out = cv2.GaussianBlur(haematoxylin, (0, 0), 1.2) - cv2.GaussianBlur(haematoxylin, (0, 0), 6.0)
    is_nucleus = (standing_out > 0.08) & (standing_out >= cv2.dilate(standing_out, np.ones((5, 5), np.uint8)))
    total = density.sum(axis=2).astype(np.float32)
    mean, square = cv2.blur(total, (16, 16)), cv2.blur(total**2, (16, 16))
    contrast = np.sqrt(np.maximum(square - mean**2, 0))
    area_mm2 = total.size * UM_PER_PX**2 * 1e-6
    quartiles = np.quantile(haematoxylin, (0.25, 0.5, 0.75)).tolist()
    return [*quartiles, float(is_nucleus.sum() / area_mm2), float(np.median(contrast))]


def optical_density(tile: UInt8[np.ndarray, "y x 3"], white: object, um_per_px: float) -> Float32[np.ndarray, "y x 3"]:
    """The optical density of a tile, at UM_PER_PX."""
    scale = um_per_px / UM_PER_PX
    small = cv2.resize(tile, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(np.float32)
    return np.maximum(-np.log(np.maximum(small, 1) / np.asarray(white, np.float32)), 0)


def stains_of(densities: list[np.ndarray]) -> Float32[np.ndarray, "2 3"]:
    """The stains that Macenko's method finds in all tiles of a source."""
    pixels = np.concatenate([255 * np.exp(-density.reshape(-1, 3)) for density in densities]).astype(np.uint8)
    return np.asarray(fit_macenko(pixels, np.ones(len(pixels), bool), np.full(3, 255.0)).vectors)


def real_tiles(folder: Path) -> Iterator[tuple[str, list[tuple[str, np.ndarray]]]]:
    """Each source with the (class, optical density) of its tiles."""
    nct: dict[str, list[tuple[str, np.ndarray]]] = defaultdict(list)
    with (folder / "tiles" / "nct_crc_he" / "labels.csv").open() as lines:
        for row in csv.DictReader(lines):
            if row["class"] in CLASSES:
                white = ARCHIVES["tiles/nct_crc_he"][1] if "TCGA" in row["file"] else NOT_NORMALISED
                pixels = cv2.imread(str(folder / "tiles" / "nct_crc_he" / row["file"]))[..., ::-1]
                if row["class"] == "ADI":
                    # Fat cells are empty: glass shows through most of the tile.
                    white = tuple(np.median(pixels, axis=(0, 1)))
                nct[row["source_set"]].append((CLASSES[row["class"]], optical_density(pixels, white, 0.5)))
    yield from nct.items()
    um_per_px, white = ARCHIVES["tiles/lc25000_colon"]
    lc25000 = []
    for path in sorted((folder / "tiles" / "lc25000_colon").glob("*.jpg")):
        tissue = "tumour" if path.name.startswith("aca") else "normal mucosa"
        pixels = cv2.imread(str(path))[..., ::-1]
        lc25000 += [(tissue, optical_density(tile, white, um_per_px)) for tile in cut(pixels, um_per_px)]
    yield "lc25000", lc25000
    with open_slide(folder / POLYP, fallback_mpp=0.5) as slide:
        pixels = slide.read(0, 0, *slide.info.size, 0)
    glass = np.quantile(pixels[::16, ::16].reshape(-1, 3), 0.99, axis=0)
    densities = [optical_density(tile, glass, 0.5) for tile in cut(pixels, 0.5)]
    yield (
        "polyp",
        [("tumour", density) for density in densities if (density.sum(axis=2) > 0.3).mean() > LEAST_TISSUE],
    )


def cut(pixels: np.ndarray, um_per_px: float) -> list[np.ndarray]:
    """Tiles of SIDE_UM that do not overlap."""
    side = round(SIDE_UM / um_per_px)
    places = product(*(range(0, length - side + 1, side) for length in pixels.shape[:2]))
    return [np.ascontiguousarray(pixels[y : y + side, x : x + side]) for y, x in places]


def painted_tiles(kind: Tissue, names: tuple[str, ...]) -> dict[str, list[np.ndarray]]:
    """Optical densities of tiles that are mostly of one kind, in slides with the named patterns, by site."""
    by_site: dict[str, list[np.ndarray]] = defaultdict(list)
    cells, side = round(SIDE_UM / MAP_UM), round(SIDE_UM / 0.5)
    for i in range(SLIDES):
        spec = SlideSpec(SUBTYPES[i % 3], 700 + i, SITES[i % len(SITES)], (2048, 1792), 0.5, patterns=names)
        pixels = paint_block(spec, 0, 0, *spec.size_px)
        kinds = add_patterns(
            architecture(spec.subtype, spec.seed, *(0.5 * px for px in spec.size_px)), names, spec.seed
        )
        for row, column in product(*(range(0, length - cells + 1, cells // 2) for length in kinds.shape)):
            if (kinds[row : row + cells, column : column + cells] == kind).mean() >= LEAST_SHARE:
                y, x = row * side // cells, column * side // cells
                tile = pixels[y : y + side, x : x + side]
                by_site[spec.site.name].append(optical_density(tile, spec.site.white, 0.5))
    return by_site


def site_stains(site: int) -> Float32[np.ndarray, "2 3"]:
    """The true stains of a painted site."""
    stains = np.array([SITES[site].haematoxylin, SITES[site].eosin], np.float32)
    return stains / np.linalg.norm(stains, axis=1, keepdims=True)


def real_statistics(folder: Path) -> dict[str, np.ndarray]:
    """STATISTICS of the real tiles of each class."""
    values: dict[str, list[list[float]]] = defaultdict(list)
    for _, tiles in real_tiles(folder):
        stains = stains_of([density for _, density in tiles])
        for tissue, density in tiles:
            values[tissue].append(statistics(density, stains))
            if tissue == "stroma":
                values["pale stroma"].append(statistics(PALE * density, stains))
    return {tissue: np.array(rows) for tissue, rows in values.items()}


def painted_statistics(kind: Tissue, names: tuple[str, ...]) -> np.ndarray:
    """STATISTICS of the painted tiles of a kind in slides with the named patterns."""
    stains = {site.name: site_stains(i) for i, site in enumerate(SITES)}
    by_site = painted_tiles(kind, names)
    return np.array([statistics(tile, stains[name]) for name, tiles in by_site.items() for tile in tiles])


def painted_kinds() -> dict[str, tuple[Tissue, tuple[str, ...]]]:
    """What is painted, by name: the kind and the slide's patterns."""
    patterns = {kind: (name,) for name, kind in PATTERNS.items()}
    with_patterns = {kind.name.lower(): (kind, patterns.get(kind, ("mucosa",))) for kind in REAL_CLASS}
    return with_patterns | {f"default {kind.name.lower()}": (kind, ()) for kind in REAL_CLASS if kind not in patterns}


def row_of(name: str, kind: Tissue, statistic: int, painted: np.ndarray, real: np.ndarray) -> dict:
    digits = 0 if STATISTICS[statistic].startswith("nuclei") else 2
    values, of_class = painted[:, statistic].round(digits) + 0.0, real[:, statistic].round(digits) + 0.0
    low, high = of_class.min(), of_class.max()
    tenth, median, ninth = np.quantile(values, (0.1, 0.5, 0.9))
    return {
        "measure": f"{name}: {STATISTICS[statistic]}",
        "real class": REAL_CLASS[kind],
        "real": f"{low:.{digits}f} to {high:.{digits}f}",
        "painted": f"{median:.{digits}f} ({tenth:.{digits}f} to {ninth:.{digits}f})",
        "median within": "yes" if low <= median <= high else "no",
        "within": f"{100 * ((values >= low) & (values <= high)).mean():.0f} %",
        "real tiles": len(real),
        "painted tiles": len(painted),
    }


def draw(painted: dict[str, np.ndarray], classes: list[str], real: dict[str, np.ndarray], path: Path) -> None:
    """One panel for each statistic; for each kind, all real tiles as dots, their range as a bar, painted deciles as a line."""
    figure, panels = plt.subplots(1, len(STATISTICS), figsize=(13, 7.5), sharey=True, layout="constrained")
    for index, (panel, name) in enumerate(zip(panels, STATISTICS, strict=True)):
        for y, (values, tissue) in enumerate(zip(painted.values(), classes, strict=True)):
            of_class = real[tissue][:, index]
            low, high = of_class.min(), of_class.max()
            panel.barh(y, high - low, left=low, height=0.6, color="#cfd8e3")
            panel.plot(of_class, np.full(len(of_class), y), "|", color="#5b7fa6", markersize=5, alpha=0.6)
            tenth, median, ninth = np.quantile(values[:, index], (0.1, 0.5, 0.9))
            inside = round(low, 2) <= round(median, 2) <= round(high, 2)
            panel.plot([tenth, ninth], [y, y], color="#222222", linewidth=1.2)
            panel.plot(median, y, "o", color="#222222" if inside else "#d62728", markersize=4.5)
        panel.set_title(name, fontsize=8.5)
        panel.tick_params(labelsize=7)
        panel.axhline(len(REAL_CLASS) - 0.5, color="#999999", linewidth=0.6, linestyle=":")
    names = [f"{name} / {tissue}" for name, tissue in zip(painted, classes, strict=True)]
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(
        "Painted kind / real class: range of the real tiles (bar, marks), painted median (dot; red outside) and deciles (line)",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    cv2.setNumThreads(1)
    real = real_statistics(Path(os.environ["CRCJAX_REAL_DATA"]))
    kinds = painted_kinds()
    painted = {name: painted_statistics(kind, patterns) for name, (kind, patterns) in kinds.items()}
    classes = [REAL_CLASS[kind] for kind, _ in kinds.values()]
    rows = [
        row_of(name, kind, statistic, painted[name], real[REAL_CLASS[kind]])
        for name, (kind, _) in kinds.items()
        for statistic in range(len(STATISTICS))
    ]
    draw(painted, classes, real, FIGURE)
    record("painter_statistics", "CRCJAX_REAL_DATA=… python tools/painter_statistics.py", rows, ABOUT)


if __name__ == "__main__":
    main()
