"""Writes a page about the slides of a store: kept and rejected tiles with the reasons, as pictures and a table."""

from __future__ import annotations

import errno
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from jaxtyping import Float64, UInt8
from matplotlib.figure import Figure
from PIL import Image

import crcjax
from crcjax.errors import InputError, writing
from crcjax.slides.preprocess.manifest import REFUSALS, without_tiles
from crcjax.slides.store.tile_store import TileStore, open_store, tiled_slides
from crcjax.slides.store.zarr_arrays import store_path
from crcjax.slides.tiling.qc_result import REFUSED
from crcjax.slides.tiling.quality_control import (
    ABSENT,
    GLASS,
    KEPT,
    QUALITY_NAMES,
    REASONS,
    StainLimits,
    tile_marks,
    tile_stain_degrees,
)
from crcjax.slides.tiling.regions_of_interest import write_area
from crcjax.slides.tiling.tissue_segmentation import ink, optical_density

# In the order of the page.
VERDICTS = (REFUSED, "failed", "reject", "review", "accept")
STAIN_LIMITS = StainLimits()
# Okabe and Ito's colours, which colour-blind readers can distinguish.
_COLOURS = {
    "kept": (0, 158, 115),
    "pen": (0, 114, 178),
    "bubble": (86, 180, 233),
    "fold": (213, 94, 0),
    "blood": (150, 0, 24),
    "blurred": (240, 228, 66),
    "pale": (204, 121, 167),
    "overstained": (60, 20, 110),
}
_SHEET_PX = 480  # width of each of a sheet's three panels
_GAP_PX, _LEGEND_PX = 10, 24
Stains = dict[str, Float64[np.ndarray, "stain 3"]]  # haematoxylin's and eosin's unit vectors by slide


def write_overview(
    store: str | Path,
    places: Mapping[str, str] | None = None,
    limits: StainLimits = STAIN_LIMITS,
    on_fault: Callable[[str, str], None] = lambda slide_id, reason: None,
) -> Path:
    """Writes STORE/overview/index.html and, beside it, each slide's contact sheet and its tissue as PNG and GeoJSON.

    Slides that tiling refused, or failed to tile, are listed with the reason.

    Args:
      store: the tile store.
      places: site and scanner by slide id. If given, the page shows only these slides, also counted by place, and lists the
        ids that neither the store nor its manifest has.
      limits: a slide whose stain exceeds them needs a review.
      on_fault: called with the id of each slide that cannot be shown, and the reason; the others are shown.

    Returns:
      The path of the page.

    Raises:
      InputError: no slide of the store can be shown.
      OutputError: the page cannot be written.
    """
    store, tiled = store_path(store), tiled_slides(store)
    shown = [slide_id for slide_id in tiled if places is None or slide_id in places]
    outcomes = {name: outcome for name, outcome in without_tiles(store).items() if places is None or name in places}
    if not shown and not outcomes:
        raise InputError(f"{store}: holds none of the slides; name the --out of crcjax tile, and its cohort")
    folder, faults = store / "overview", dict[str, str]()
    slides, stains = _opened(store, shown, faults)
    degrees, centre = stain_degrees(stains), _centre(stains)
    synthetic = any(slide.info.synthetic for slide in slides)
    lines = []
    with writing(folder, "ask for permission to write into the store"):
        folder.mkdir(exist_ok=True)
        for slide in slides:
            try:
                place, off = places[slide.slide_id] if places else "", tiles_off(slide, centre, limits)
                line = _line(slide, place, degrees.get(slide.slide_id), off, limits)
                _write_pictures(slide, folder)
                lines.append(line)
            except InputError as error:
                faults[slide.slide_id] = str(error)
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                faults[slide.slide_id] = (
                    "its name is too long for the files of its pictures; rename its file, tile it again"
                )
        for slide_id, reason in faults.items():
            on_fault(slide_id, reason)
        if not lines and not outcomes:
            raise InputError(f"{store}: none of its slides can be shown ({next(iter(faults.values()))})")
        _stain_picture(stains, places or {}, synthetic).savefig(folder / "stains.png", dpi=110)
        lines += [_line_without_tiles(outcome, (places or {}).get(name, "")) for name, outcome in outcomes.items()]
        lines.sort(key=lambda line: (VERDICTS.index(line["verdict"]), line["coverage"], line["slide_id"]))
        absent = sorted(set(places or ()) - set(tiled) - set(outcomes))
        page = _page(lines, absent, faults, synthetic, limits)
        (folder / "index.html").write_text(page)
    return folder / "index.html"


def _opened(store: Path, slide_ids: Iterable[str], faults: dict[str, str]) -> tuple[list[TileStore], Stains]:
    """Opens the slides that can be read and their stains; adds the others to `faults` with the reason."""
    slides, stains = [], Stains()
    for slide_id in slide_ids:
        try:
            slide = open_store(store, slide_id)
            stains |= stain_vectors([slide])
            slides.append(slide)
        except InputError as error:
            faults[slide_id] = str(error)
    return slides, stains


def _write_pictures(slide: TileStore, folder: Path) -> None:
    Image.fromarray(contact_sheet(slide)).save(folder / f"{slide.slide_id}.jpg", quality=85)
    stem = folder / f"{slide.slide_id}.tissue"
    write_area(stem, slide.thumbnail()[1], slide.info.size, "Tissue", slide.info.corner)


def _line(slide: TileStore, place: str, degrees: float | None, off: float | None, limits: StainLimits) -> dict:
    """One slide's line of the page; a stain far from the cohort's requires a review."""
    qc_result = slide.attributes["verdict"]
    line = qc_result | {"slide_id": slide.slide_id, "place": place, "degrees": degrees, "kept": int(slide.mask.sum())}
    line |= {"off": off, "has_tiles": True}
    if degrees is not None and degrees > limits.max_stain_degrees:
        line["reasons"] = [*qc_result["reasons"], f"the stain is {degrees:.0f} degrees from the cohort's"]
        line["verdict"] = "reject" if qc_result["verdict"] == "reject" else "review"
    return line


def _line_without_tiles(outcome: Mapping[str, Any], place: str) -> dict:
    """The page's line of a slide that tiling refused, or failed to tile, from its outcome in the manifest."""
    verdict = REFUSED if outcome["status"] in REFUSALS else "failed"
    return {
        "slide_id": outcome["slide_id"],
        "place": place,
        "verdict": verdict,
        "reasons": [f"{outcome['status']}: {outcome['reason']}"],
        "coverage": 0.0,
        "kept": 0,
        "degrees": None,
        "off": None,
        "has_tiles": False,
    }


def _page(lines: list[dict], absent: list[str], faults: Mapping[str, str], synthetic: bool, limits: StainLimits) -> str:
    by_place: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        by_place[line["place"]][line["verdict"]] += 1
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crcjax.slides.preprocess", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("qc_report.html").render(
        lines=lines,
        absent=absent,
        faults=faults,
        synthetic=synthetic,
        with_stain=any(line["degrees"] is not None for line in lines),
        limits=limits,
        by_place=dict(sorted(by_place.items())),
        verdicts=VERDICTS,
        colours={name: f"rgb{colour}" for name, colour in _COLOURS.items()},
        version=crcjax.__version__,
    )


def contact_sheet(slide: TileStore) -> UInt8[np.ndarray, "y x 3"]:
    """Draws the slide, its tissue outlined, and its tiles by reason: kept ones framed, excluded ones filled.

    The frame of a kept tile has the colour of the reason for which it is marked.

    Ink is shown wherever it lies. Of several magnifications the coarsest is shown; the legend counts the tiles of each.
    """
    thumbnail, tissue = slide.thumbnail()
    size = _SHEET_PX, max(1, round(_SHEET_PX * thumbnail.shape[0] / thumbnail.shape[1]))
    picture = cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA)
    mask = cv2.resize(tissue.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    outlined = np.where(mask[..., None] > 0, picture, (picture * 0.35 + 160 * 0.65).astype(np.uint8))
    cv2.drawContours(outlined, cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0], -1, (0, 0, 0), 1)
    tiles = _tile_panel(slide, picture)
    gap = np.full((size[1], _GAP_PX, 3), 255, np.uint8)
    panels = np.concatenate([picture, gap, outlined, gap, tiles], axis=1)
    return np.concatenate([panels, _legend(slide, panels.shape[1])])


def _tile_panel(slide: TileStore, picture: np.ndarray) -> np.ndarray:
    white = tuple(slide.attributes["white"])
    tiles = picture // 2 + 127
    tiles[ink(optical_density(picture, white))] = _COLOURS["pen"]
    filled = tiles.copy()
    scale = picture.shape[1] / slide.info.size[0]
    corners = np.rint(slide.origin * scale).astype(int)
    ends = np.rint((slide.origin + slide.region_px) * scale).astype(int) - 1
    marks = _marks(slide)
    for (x, y), (right, bottom), code, mark in zip(
        corners.tolist(), ends.tolist(), slide.reason[:, 0], marks, strict=True
    ):
        if REASONS[code] == "kept":
            cv2.rectangle(filled, (x, y), (right, bottom), _COLOURS[REASONS[mark]], 1)
        elif REASONS[code] in _COLOURS:
            cv2.rectangle(filled, (x, y), (right, bottom), _COLOURS[REASONS[code]], cv2.FILLED)
    return cv2.addWeighted(filled, 0.7, tiles, 0.3, 0)


def _marks(slide: TileStore) -> UInt8[np.ndarray, " region"]:
    """The mark of each tile of the coarsest magnification; none for tiles without scores and stores with fewer scores."""
    scores = slide.quality[:, 0]
    if slide.attributes["quality"] != list(QUALITY_NAMES):
        return np.zeros(len(scores), np.uint8)
    marks = tile_marks(scores, slide.params.quality)
    return np.where(scores.any(axis=-1) & (marks > ABSENT), marks, np.uint8(KEPT))


def tile_counts(slide: TileStore) -> dict[str, dict[str, int]]:
    """The number of tiles by magnification and by reason; tiles without tissue and absent ones do not count."""
    counts = {}
    for magnification in slide.params.magnifications:
        codes = slide.reason[:, slide.params.slots_of((magnification,))].ravel()
        numbers = np.bincount(codes, minlength=len(REASONS)).tolist()
        counts[magnification] = {
            name: numbers[code] for code, name in enumerate(REASONS) if code not in (GLASS, ABSENT)
        }
    return counts


def _legend(slide: TileStore, width: int) -> np.ndarray:
    """One row for each magnification: its tiles by reason."""
    rows = [_legend_row(name, counts, width) for name, counts in tile_counts(slide).items()]
    return np.concatenate(rows)


def _legend_row(magnification: str, counts: Mapping[str, int], width: int) -> np.ndarray:
    legend = np.full((_LEGEND_PX, width, 3), 255, np.uint8)
    cv2.putText(legend, magnification, (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    x = 56
    for name, count in counts.items():
        cv2.rectangle(legend, (x, 6), (x + 12, 18), _COLOURS[name], 2 if name == "kept" else cv2.FILLED)
        text = f"{name} {count}"
        cv2.putText(legend, text, (x + 18, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        x += 32 + cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)[0][0]
    return legend


def stain_vectors(slides: Iterable[TileStore]) -> Stains:
    """Macenko's stain vectors of every slide with reliable stains; slides whose pixels are missing are left out.

    Raises InputError for a damaged estimate.
    """
    from crcjax.slides.stain.normalisation import stored_estimate  # loads JAX

    stains = {}
    for slide in slides:
        try:
            slide.check_slide()
        except InputError:
            continue
        estimate = stored_estimate(slide, "macenko")  # of the scanned tiles, even where normalised ones are stored
        if bool(estimate.reliable):
            stains[slide.slide_id] = np.asarray(estimate.vectors, np.float64)  # type: ignore[union-attr]
    return stains


def stain_degrees(stains: Stains) -> dict[str, float]:
    """The larger of the two angles, in degrees, between each slide's stains and the medians of all these slides.

    Empty for fewer than three slides.
    """
    centre = _centre(stains)
    return {} if centre is None else {name: float(_angle(vectors, centre).max()) for name, vectors in stains.items()}


def tiles_off(
    slide: TileStore, centre: Float64[np.ndarray, "stain 3"] | None, limits: StainLimits = STAIN_LIMITS
) -> float | None:
    """The fraction of the kept tiles further than `max_tile_degrees` from any mixture of the cohort's stains."""
    scored = slide.mask & slide.quality.any(axis=-1)
    if centre is None or "blue" not in slide.attributes["quality"] or not scored.any():
        return None  # no cohort, a store older than these scores, or tiles without scores
    return float((tile_stain_degrees(slide.quality[scored], centre) > limits.max_tile_degrees).mean())


def _centre(stains: Stains) -> Float64[np.ndarray, "stain 3"] | None:
    if len(stains) < 3:
        return None
    centre = np.median(list(stains.values()), axis=0)
    return centre / np.linalg.norm(centre, axis=1, keepdims=True)


def _stain_picture(stains: Stains, places: Mapping[str, str], synthetic: bool) -> Figure:
    """Plots the shares of red and of blue in each slide's unit vectors, by place."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for place in sorted(set(places.values()) or {""}):
        of_place = np.array([vectors for slide_id, vectors in stains.items() if places.get(slide_id, "") == place])
        if not len(of_place):
            continue
        points = axis.plot(of_place[:, 0, 0], of_place[:, 0, 2], "o", alpha=0.7, label=place or "all slides")
        axis.plot(of_place[:, 1, 0], of_place[:, 1, 2], "^", alpha=0.7, color=points[0].get_color())
    axis.set(xlabel="red share of the stain's optical density", ylabel="blue share", title="Stains of the slides")
    axis.plot([], [], "ko", label="haematoxylin")
    axis.plot([], [], "k^", label="eosin")
    axis.legend(fontsize=8)
    if synthetic:
        figure.text(0.99, 0.01, "synthetic slides", ha="right", va="bottom", fontsize=7, color="crimson")
    return figure


def _angle(one: Float64[np.ndarray, "stain 3"], other: Float64[np.ndarray, "stain 3"]) -> Float64[np.ndarray, " stain"]:
    cosine = (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))
