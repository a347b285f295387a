"""Writes the pictures of a folder of predictions: overlays, contact sheets and case reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from crcjax.errors import InputError, SlideError, writing
from crcjax.pictures.case_report import Figure, SlidePage, case_report
from crcjax.pictures.overlay_dicom import write_overlay_dicom
from crcjax.pictures.overlay_geojson import write_overlay_geojson
from crcjax.pictures.overlay_tiff import write_overlay_tiff
from crcjax.pictures.top_tiles import contact_sheet, tile_picture, top_tiles
from crcjax.predict.engine import SlideSource
from crcjax.predict.evidence import DISCLAIMER, MEANING, SlideEvidence, read_evidence
from crcjax.predict.evidence_map import TileLayer, merged
from crcjax.predict.heatmap import evidence_scale, overlay
from crcjax.slides.wsi.slide import Slide, open_slide
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.predictions_table import PredictionRow

# The longer side of a slide's pictures in a case report.
_FIGURE_PX = 700


@dataclass(frozen=True)
class PictureOutcome:
    """The files that were written for a slide, and why others were not; `fault` is empty if all were."""

    slide_id: str
    paths: tuple[Path, ...] = ()
    fault: str = ""


def write_pictures(
    predictions: Path,
    slides: Mapping[str, SlideSource],
    *,
    tiles: int = 8,
    dicom: bool = False,
    on_slide: Callable[[PictureOutcome], None] = lambda outcome: None,
) -> list[PictureOutcome]:
    """Writes, into the folder of predictions.csv, the pictures of every slide and the report of every case.

    | file | content |
    |---|---|
    | overlays/SLIDE_ID.ome.tif | the evidence as channels of true values (`write_overlay_tiff`) |
    | overlays/SLIDE_ID.geojson | every tile with its evidence, for QuPath (`write_overlay_geojson`) |
    | overlays/SLIDE_ID.dcm | a parametric map, with `dicom` (`write_overlay_dicom`) |
    | sheets/SLIDE_ID.jpg | the tiles with the most evidence for each class |
    | reports/CASE_ID.html | the case on one page |

    Args:
      predictions: the --out of crcjax predict.
      slides: the files of the slides by id. A slide of the table without a file gets no pictures, and its case a report
        without them.
      tiles: tiles of each class on the contact sheet and in the report.
      dicom: whether parametric maps are written.
      on_slide: called with each outcome.

    Returns:
      The outcome of every slide that has a prediction, in the order of the table.

    Raises:
      InputError: predictions.csv cannot be read.
      OutputError: a file cannot be written.
    """
    table = load_predictions(predictions / "predictions.csv")
    cases: dict[str, list[PredictionRow]] = {}
    for row in table.rows:
        cases.setdefault(row.case_id, []).append(row)
    outcomes: dict[str, PictureOutcome] = {}
    for case_id, rows in cases.items():
        pages = []
        for row in rows:
            page = SlidePage(row)
            if row.has_prediction:
                page, outcome = _slide_pictures(predictions, row, slides.get(row.slide_id), tiles, dicom)
                outcomes[row.slide_id] = outcome
                on_slide(outcome)
            pages.append(page)
        # A case id may hold characters that a file name cannot.
        path = predictions / "reports" / f"{quote(case_id, safe=' ')}.html"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            path.write_text(case_report(case_id, pages, table.classes))
    return [outcomes[row.slide_id] for row in table.rows if row.slide_id in outcomes]


def _slide_pictures(
    predictions: Path, row: PredictionRow, source: SlideSource | None, count: int, dicom: bool
) -> tuple[SlidePage, PictureOutcome]:
    """Writes the pictures of a slide and returns its part of the report; without pictures if they cannot be made."""
    page, paths = SlidePage(row), list[Path]()
    try:
        if source is None:
            raise InputError(f"{row.slide_id}: its file is not among the slides; name it, or give its cohort")
        evidence = read_evidence(predictions, row.slide_id)
        if not evidence.mask.any():
            raise InputError(f"{row.slide_id}: has no tile; there is nothing to show")
        with open_slide(source.path, source.mpp, source.fallback_mpp) as slide:
            if row.slide_sha256 and slide.info.content_hash != row.slide_sha256:
                raise InputError(f"{source.path}: is not the file that was predicted; name that one, or predict again")
            page = _write_slide(predictions, row, slide, evidence, count, paths)
        if dicom:
            path = predictions / "overlays" / f"{row.slide_id}.dcm"
            write_overlay_dicom(path, source.path, evidence, row)
            paths.append(path)
    except (InputError, SlideError) as error:
        return page, PictureOutcome(row.slide_id, tuple(paths), str(error))
    return page, PictureOutcome(row.slide_id, tuple(paths))


def _write_slide(
    predictions: Path, row: PredictionRow, slide: Slide, evidence: SlideEvidence, count: int, paths: list[Path]
) -> SlidePage:
    """Writes the overlays and the contact sheet of a slide, adds their paths, and returns its part of the report."""
    layer, meaning = merged(evidence.layers), f"{_meaning(evidence)}. {DISCLAIMER.capitalize()}."
    top = top_tiles(evidence, count)
    pictures = [tile_picture(slide, tile) for tile in top]
    um_per_tile = layer.side * evidence.mpp[0]
    for folder in ("overlays", "sheets"):
        with writing(predictions / folder):
            (predictions / folder).mkdir(exist_ok=True)
    tiff, geojson = (predictions / "overlays" / f"{row.slide_id}{suffix}" for suffix in (".ome.tif", ".geojson"))
    write_overlay_tiff(tiff, evidence, f"crcjax, {row.slide_id}: {row.call or 'not evaluable'}. {meaning}")
    write_overlay_geojson(geojson, evidence, top)
    sheet = predictions / "sheets" / f"{row.slide_id}.jpg"
    with writing(sheet):
        Image.fromarray(contact_sheet(top, pictures, um_per_tile, count)).save(sheet, quality=90)
    paths += [tiff, geojson, sheet]
    captioned = [
        (tile, Figure(f"{tile.number}: {tile.value:.3g}", picture)) for tile, picture in zip(top, pictures, strict=True)
    ]
    return SlidePage(row, _figures(slide, evidence, layer), captioned, meaning, um_per_tile)


def _figures(slide: Slide, evidence: SlideEvidence, layer: TileLayer) -> list[Figure]:
    """The slide, and its heatmap of every map."""
    thumbnail = slide.thumbnail(_FIGURE_PX)
    width_mm = slide.info.size[0] * slide.info.mpp[0] / 1000
    figures = [Figure(f"the slide, {width_mm:.1f} mm wide", thumbnail)]
    scale = evidence_scale(layer.value) if evidence.is_signed else None
    for index, name in enumerate(evidence.maps):
        of_map = TileLayer(layer.corner, layer.side, layer.value[:, [index]])
        if scale is None:
            caption = f"{name}: dark is the least, yellow the most in this slide"
        else:
            caption = f"{name}: red is evidence for it, blue against it, full colour from {scale:.2g} nats on"
        figures.append(Figure(caption, overlay(thumbnail, of_map, slide.info.size, scale)))
    return figures


def _meaning(evidence: SlideEvidence) -> str:
    """Explains the maps in a sentence without its full stop."""
    if not evidence.is_signed:
        return (
            "The map shows attention: where the model looked, not the evidence for a class. For evidence, predict with "
            "--attribution gradient"
        )
    method = MEANING[evidence.method].strip(",").replace("the predicted class", "each class")
    return f"The maps show the {method}, in nats of log-odds per tile of {evidence.layers[0].side * evidence.mpp[0]:.0f} µm"
