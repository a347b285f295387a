"""Synthetic H&E slides with known ground truth, because real cohorts cannot be distributed.

A slide is a pyramidal JPEG TIFF with an Aperio description, so that OpenSlide opens it like a scanner's. Its ground
truth is stored next to it as `NAME.truth.npz`. Colours follow Beer and Lambert from stain vectors and concentrations.
"""

from __future__ import annotations

import csv
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from jaxtyping import Float32, UInt8

from crcjax.errors import InputError, writing
from crcjax.slides.jobs.usable_cores import usable_cores
from crcjax.slides.jobs.worker_pool import check_main_guard, run_jobs
from crcjax.slides.synthetic.artefacts import SYNTHETIC_ARTEFACTS, artefact_mask, corrupt_picture, corrupt_section
from crcjax.slides.synthetic.ink_and_glass import LOOKS, glass_tint, ink_density, inked_margin, not_scanned
from crcjax.slides.synthetic.patterns import PATTERNS, add_patterns
from crcjax.slides.synthetic.structures import Ground
from crcjax.slides.synthetic.tissue_map import MAP_UM, SUBTYPES, Tissue, architecture
from crcjax.slides.synthetic.tissue_textures import REACH_UM, draw_particles, draw_stains
from crcjax.slides.synthetic.truth import load_truth, truth_path
from crcjax.slides.wsi.slide import PAINTED

TILE_PX = 256
BLOCK_PX = 1024  # a block at a quarter of its side is one tile of the next level
# How far the optics' blur reaches, and how far it reaches with an artefact's blur.
_OPTICS_UM, _CORRUPT_UM = 2.0, 10.0


@dataclass(frozen=True)
class Site:
    """A laboratory and its scanner: directions of the stains in optical density (RGB), the light, and the optics.

    `blur_um` is the standard deviation of a Gaussian.
    """

    name: str
    scanner: str
    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    white: tuple[int, int, int]
    blur_um: float
    jpeg_quality: int


SITES = (
    Site("synthetic-north", "synthetic-A", (0.65, 0.70, 0.29), (0.09, 0.95, 0.29), (245, 244, 246), 0.30, 85),
    Site("synthetic-south", "synthetic-B", (0.56, 0.72, 0.41), (0.20, 0.90, 0.39), (238, 236, 232), 0.45, 80),
    Site("synthetic-east", "synthetic-C", (0.70, 0.66, 0.27), (0.13, 0.94, 0.31), (250, 248, 250), 0.25, 90),
    Site("synthetic-west", "synthetic-B", (0.60, 0.74, 0.31), (0.07, 0.93, 0.36), (233, 235, 238), 0.55, 75),
)


@dataclass(frozen=True)
class SlideSpec:
    """One slide to paint; the same spec gives the same bytes.

    `artefacts` are names of SYNTHETIC_ARTEFACTS. `patterns` are names of `patterns.PATTERNS` or `ink_and_glass.LOOKS`; without
    them, slides are as they were before patterns existed.
    """

    subtype: str
    seed: int
    site: Site = SITES[0]
    size_px: tuple[int, int] = (3072, 2560)
    mpp: float = 0.5
    artefacts: tuple[str, ...] = ()
    patterns: tuple[str, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        """The text by which a slide's truth names its spec; that of slides without patterns never changes."""
        return repr(self) + (f" with {', '.join(self.patterns)}" if self.patterns else "")


def paint_slide(path: str | Path, spec: SlideSpec, workers: int = 1) -> Path:
    """Writes the slide and its ground truth; `workers` processes paint its blocks.

    Memory: a row of encoded blocks, one level's encoded tiles (about 17 bytes per 1000 px of level 0) and the slide at
    a sixteenth, whatever the size. Raises InputError for an unknown subtype, artefact or pattern, OutputError if the disk is full.
    """
    path = Path(path)
    if spec.subtype not in SUBTYPES or not set(spec.artefacts) <= set(SYNTHETIC_ARTEFACTS):
        raise InputError(
            f"cannot paint {spec.subtype} with {spec.artefacts}: know {SUBTYPES} with {SYNTHETIC_ARTEFACTS}"
        )
    if not set(spec.patterns) <= {*PATTERNS, *LOOKS}:
        raise InputError(f"patterns must be among {(*PATTERNS, *LOOKS)}, got {spec.patterns}")
    scene, partial = _scene(spec), path.with_suffix(".partial")
    with writing(path, "choose another folder"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_pyramid(partial, spec, workers)
            partial.rename(path)
            with open(partial, "wb") as file:
                np.savez_compressed(file, **_truth_arrays(spec, scene))
            partial.rename(truth_path(path))
        finally:
            partial.unlink(missing_ok=True)
    return path


def _truth_arrays(spec: SlideSpec, scene: _Scene) -> dict[str, Any]:
    arrays = {
        "spec": str(spec),
        "subtype": spec.subtype,
        "seed": spec.seed,
        "kinds": scene.ground.kinds,
        # Default slides have the kinds up to ADIPOSE; their truth stays the same bytes.
        "names": [kind.name.lower() for kind in Tissue if spec.patterns or kind <= Tissue.ADIPOSE],
        "um_per_px": MAP_UM,
        "haematoxylin": _unit(spec.site.haematoxylin),
        "eosin": _unit(spec.site.eosin),
        "white": spec.site.white,
    }
    if scene.ink is not None:
        arrays["inked"] = scene.ink > 0
    return arrays | {f"artefact_{name}": mask > 0 for name, mask in scene.artefacts.items()}


def paint_cohort(
    folder: str | Path,
    cases: dict[str, int],
    *,
    seed: int = 0,
    size_px: tuple[int, int] = (3072, 2560),
    mpp: float = 0.5,
    workers: int | None = None,
    on_slide: Callable[[], None] = lambda: None,
) -> Path:
    """Paints one slide a case, `cases` of each split (such as train 60, val 15, test 30), and their cohort.csv.

    Subtypes and sites are balanced within each split and independent of each other. Existing slides are not painted
    again. `on_slide` is called for every slide that is painted. Returns the CSV's path.
    """
    folder = Path(folder)
    rng = np.random.default_rng([seed, 5])
    rows: list[list[str]] = []
    jobs: list[tuple[Path, SlideSpec]] = []
    for split, count in cases.items():
        pairs = list(itertools.islice(itertools.cycle(itertools.product(SITES, SUBTYPES)), count))
        for site, subtype in pairs:
            name = f"synthetic-{len(rows):04d}"
            relative = f"slides/{name}.svs"
            spec = SlideSpec(subtype, int(rng.integers(1 << 31)), site, size_px, mpp)
            rows.append([name, name, relative, subtype, site.name, site.scanner, split])
            if not _is_painted(folder / relative, spec):
                jobs.append((folder / relative, spec))
    for done in run_jobs(_paint_job, jobs, workers or usable_cores()):
        if isinstance(done.result, Exception):
            raise done.result
        on_slide()
    with writing(folder), open(folder / "cohort.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide_id", "case_id", "path", "subtype", "site", "scanner", "split"])
        table.writerows(rows)
    return folder / "cohort.csv"


def _is_painted(path: Path, spec: SlideSpec) -> bool:
    truth = truth_path(path)  # written after the slide
    return path.exists() and truth.exists() and load_truth(truth).spec == str(spec)


def _pool(workers: int) -> ProcessPoolExecutor:
    check_main_guard()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # OpenCV's own threads would only compete with the other workers.
    return ProcessPoolExecutor(workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(1,))


def _paint_job(job: tuple[Path, SlideSpec]) -> Path:
    return paint_slide(*job)


@dataclass(frozen=True)
class _Scene:
    """Everything that determines a block's colours."""

    ground: Ground
    site: Site
    stain: tuple[float, float]  # the case's strength of haematoxylin and eosin
    # All of these on the map's grid. Masks are between 0 and 1.
    artefacts: dict[str, Float32[np.ndarray, "y x"]]
    ink: Float32[np.ndarray, "y x"] | None = None
    tint: Float32[np.ndarray, "y x channel"] | None = None
    not_scanned: Float32[np.ndarray, "y x"] | None = None


@lru_cache(maxsize=1)
def _scene(spec: SlideSpec) -> _Scene:
    """Computed once in each process, so that maps are not sent with every block."""
    kinds = architecture(spec.subtype, spec.seed, *(side * spec.mpp for side in spec.size_px))
    rng = np.random.default_rng([spec.seed, 6])
    haematoxylin, eosin = np.exp(rng.normal(0, 0.25, 2)).tolist()
    artefacts = {name: artefact_mask(name, kinds.shape, rng) for name in spec.artefacts}
    tissue_patterns = tuple(name for name in spec.patterns if name in PATTERNS)
    if tissue_patterns:
        kinds = add_patterns(kinds, tissue_patterns, spec.seed)
    ground = Ground(kinds, spec.seed, spec.mpp, bool(tissue_patterns))
    ink = inked_margin(kinds, spec.seed) if "inked_margin" in spec.patterns else None
    tinted = "tinted_glass" in spec.patterns
    glass = (glass_tint(kinds, spec.seed), not_scanned(kinds).astype(np.float32)) if tinted else (None, None)
    return _Scene(ground, spec.site, (haematoxylin, eosin), artefacts, ink, *glass)


def paint_block(spec: SlideSpec, x: int, y: int, width: int, height: int) -> UInt8[np.ndarray, "y x 3"]:
    """RGB of a block at (x, y) in level-0 px, identical whether painted alone or with its neighbours."""
    scene, site = _scene(spec), spec.site
    margin = int(np.ceil((REACH_UM + (_CORRUPT_UM if spec.artefacts else _OPTICS_UM)) / spec.mpp))
    box = (x - margin, y - margin, width + 2 * margin, height + 2 * margin)
    haematoxylin, eosin = draw_stains(scene.ground, *box)
    masks = {name: _block_of(mask, spec.mpp, *box) for name, mask in scene.artefacts.items()}
    layers = corrupt_section(scene.ground, masks, haematoxylin, eosin, *box[:2])
    if scene.ink is not None:
        grains = draw_particles(scene.ground, ("speck", "grain"), 6.0, *box)
        ink = np.maximum(grains, np.float32(0.4)) * _block_of(scene.ink, spec.mpp, *box)
        layers.append((ink, ink_density(spec.seed)))
    vectors = scene.stain[0] * _unit(site.haematoxylin), scene.stain[1] * _unit(site.eosin)
    channels = []
    for i, (white, h, e) in enumerate(zip(site.white, *vectors, strict=True)):
        exponent = cv2.addWeighted(haematoxylin, -h, eosin, -e, 0)
        for amount, density in layers:
            exponent = exponent - density[i] * amount
        channels.append(cv2.convertScaleAbs(cv2.exp(exponent), alpha=white))
    pixels = cv2.GaussianBlur(cv2.merge(channels), (0, 0), site.blur_um / spec.mpp)
    picture = corrupt_picture(pixels, masks, site.white, spec.mpp)[margin:-margin, margin:-margin]
    if scene.tint is None or scene.not_scanned is None:
        return picture
    light = np.exp(-_block_of(scene.tint, spec.mpp, x, y, width, height))
    is_filled = _block_of(scene.not_scanned, spec.mpp, x, y, width, height) > 0.5
    return np.where(is_filled[..., None], 255, picture * light).astype(np.uint8)


def _block_of(mask: np.ndarray, mpp: float, x: int, y: int, width: int, height: int) -> Float32[np.ndarray, "y x ..."]:
    """A window of a map at level-0 px; 0 outside the map, except for maps of channels, which continue."""
    step = MAP_UM / mpp
    columns = ((np.arange(x, x + width) + 0.5) / step - 0.5).astype(np.float32)
    rows = ((np.arange(y, y + height) + 0.5) / step - 0.5).astype(np.float32)
    border = cv2.BORDER_CONSTANT if mask.ndim == 2 else cv2.BORDER_REPLICATE
    return cv2.remap(mask, *np.meshgrid(columns, rows), cv2.INTER_LINEAR, borderMode=border)


def _unit(vector: tuple[float, float, float]) -> np.ndarray:
    return np.asarray(vector) / np.linalg.norm(vector)


def _write_pyramid(path: Path, spec: SlideSpec, workers: int) -> None:
    width, height = spec.size_px
    sixteenth = np.full((-(-height // BLOCK_PX) * 64, -(-width // BLOCK_PX) * 64, 3), 255, np.uint8)
    quarter: list[bytes] = []
    description = (
        f"Aperio {PAINTED}\r\n{width}x{height} (256x256) JPEG|AppMag = {10 / spec.mpp:g}|"
        f"MPP = {spec.mpp:g}|ScanScope ID = {spec.site.scanner}"
    )
    options: dict[str, Any] = {
        "dtype": np.uint8,
        "photometric": "ycbcr",
        "subsampling": (2, 2),
        "compression": "jpeg",
        "tile": (TILE_PX, TILE_PX),
        "metadata": None,
        "software": False,
        "description": description,
    }
    with (
        _pool(workers) if workers > 1 else nullcontext() as executor,
        tifffile.TiffWriter(path, bigtiff=width * height > 1 << 31) as tiff,
    ):
        mapped = executor.map if executor else map
        tiles = _level_0(spec, mapped, quarter, sixteenth)
        tiff.write(tiles, shape=(height, width, 3), **options)
        if min(width, height) > BLOCK_PX:
            tiff.write(iter(quarter), shape=(-(-height // 4), -(-width // 4), 3), **options)
        level = sixteenth[: -(-height // 16), : -(-width // 16)]
        while min(level.shape[:2]) > TILE_PX:
            encoded = [_encode(tile, spec.site) for row in _tiles(level) for tile in row]
            tiff.write(iter(encoded), shape=level.shape, **options)
            level = _shrunk(level, (level.shape[1] // 4, level.shape[0] // 4))


def _level_0(spec: SlideSpec, mapped: object, quarter: list[bytes], sixteenth: np.ndarray) -> Iterator[bytes]:
    """Yields encoded tiles row by row; also fills in the tiles of the next level and the pixels of the level after it."""
    width, height = spec.size_px
    columns = range(0, width, BLOCK_PX)
    for y in range(0, height, BLOCK_PX):
        blocks = list(mapped(_encoded_block, [(spec, x, y) for x in columns]))  # type: ignore[operator]
        for x, (_, shrunk, smallest) in zip(columns, blocks, strict=True):
            quarter.append(shrunk)
            sixteenth[y // 16 : y // 16 + 64, x // 16 : x // 16 + 64] = smallest
        for row in range(len(blocks[0][0])):
            for rows, _, _ in blocks:
                yield from rows[row]


def _encoded_block(job: tuple[SlideSpec, int, int]) -> tuple[list[list[bytes]], bytes, np.ndarray]:
    spec, x, y = job
    width, height = (min(BLOCK_PX, side - at) for side, at in zip(spec.size_px, (x, y), strict=True))
    pixels = paint_block(spec, x, y, width, height)
    rows = [[_encode(tile, spec.site) for tile in row] for row in _tiles(pixels)]
    block = np.full((BLOCK_PX, BLOCK_PX, 3), spec.site.white, np.uint8)
    block[:height, :width] = pixels
    quarter = _shrunk(block, (TILE_PX, TILE_PX))
    return rows, _encode(quarter, spec.site), _shrunk(quarter, (TILE_PX // 4, TILE_PX // 4))


def _shrunk(pixels: np.ndarray, size: tuple[int, int]) -> UInt8[np.ndarray, "y x 3"]:
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def _tiles(pixels: np.ndarray) -> list[list[np.ndarray]]:
    """Cuts whole tiles; those at the border are padded with their edge."""
    height, width = pixels.shape[:2]
    pad = ((0, -height % TILE_PX), (0, -width % TILE_PX), (0, 0))
    padded = np.pad(pixels, pad, mode="edge")
    return [
        [padded[y : y + TILE_PX, x : x + TILE_PX] for x in range(0, padded.shape[1], TILE_PX)]
        for y in range(0, padded.shape[0], TILE_PX)
    ]


def _encode(tile: np.ndarray, site: Site) -> bytes:
    pixels = np.ascontiguousarray(tile)
    level = site.jpeg_quality
    return bytes(imagecodecs.jpeg8_encode(pixels, level, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"))
