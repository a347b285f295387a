"""Evidence as a DICOM parametric map, in the frame of reference of a DICOM slide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

import crcjax
from crcjax.environment import require_extra
from crcjax.errors import InputError, writing
from crcjax.pictures.overlay_tiff import overlay_channels, overlay_grid
from crcjax.predict.evidence import SlideEvidence
from crcjax.predict.evidence_map import PixelGrid, merged
from crcjax.slides.wsi.discovery import dicom_files, first_file
from crcjax.validation.predictions_table import PredictionRow

# Fields of the slide's header that a parametric map copies. Scanners' files may lack them.
_REQUIRED = (
    "PatientID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "TotalPixelMatrixOriginSequence",
    "ImageOrientationSlide",
    "SharedFunctionalGroupsSequence",
)
# Fields that a file must have and may leave empty; some writers leave them out.
_MAY_BE_EMPTY = (
    *("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"),
    "ReferringPhysicianName",
)
_FRAME_PX = 256


def write_overlay_dicom(path: Path, slide: Path, evidence: SlideEvidence, row: PredictionRow) -> None:
    """Writes a parametric map of the slide's evidence (DICOM PS3.3, A.75), atomically: one float32 channel for each map.

    The map has the pixels of the OME-TIFF's first level (`overlay_grid`). Its origin is the middle of its first pixel, as the
    origin of the slide is the middle of the slide's.

    Args:
      path: the file.
      slide: the slide's file or folder.
      evidence: the slide's evidence, with at least one tile.
      row: the slide's prediction. The same prediction of the same slide gives the same UIDs.

    Raises:
      InputError: the slide is no DICOM slide, its header lacks what the map needs, or the extra `dicom` is missing.
      OutputError: the file cannot be written.
    """
    highdicom = require_extra("highdicom", "dicom", "--dicom")
    header = _header(slide)
    layer = merged(evidence.layers)
    grid = overlay_grid(evidence, layer)
    try:
        parametric_map = _parametric_map(highdicom, header, grid, overlay_channels(layer, grid)[:-1], evidence, row)
    except (AttributeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{slide}: its DICOM header lacks what a parametric map needs ({error}); use the OME-TIFF or the GeoJSON"
        ) from error
    partial = path.with_suffix(".partial")
    with writing(path):
        parametric_map.save_as(partial)
        partial.replace(path)


def _header(slide: Path) -> pydicom.Dataset:
    """The header of the slide's finest level. Raises InputError for a slide that is not DICOM, or lacks a field."""
    first = first_file(slide)
    try:
        series = pydicom.dcmread(first, stop_before_pixels=True).SeriesInstanceUID
        headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in dicom_files(first.parent)]
        levels = [header for header in headers if header.get("SeriesInstanceUID") == series]
    except (InvalidDicomError, AttributeError) as error:
        raise InputError(
            f"{slide}: is no DICOM slide, and a parametric map needs one; use the OME-TIFF or the GeoJSON"
        ) from error
    header = max(levels, key=lambda level: level.get("TotalPixelMatrixColumns") or 0)
    if lacking := [name for name in _REQUIRED if name not in header]:
        raise InputError(
            f"{slide}: its DICOM header lacks {', '.join(lacking)}, which a parametric map needs; export the slide again with "
            "them, or use the OME-TIFF or the GeoJSON"
        )
    for name in _MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, None)
    return header


def _parametric_map(
    highdicom: Any,
    header: pydicom.Dataset,
    grid: PixelGrid,
    channels: np.ndarray,
    evidence: SlideEvidence,
    row: PredictionRow,
) -> Any:
    origin = header.TotalPixelMatrixOriginSequence[0]
    start = np.array(
        [
            float(origin.XOffsetInSlideCoordinateSystem),
            float(origin.YOffsetInSlideCoordinateSystem),
            float(origin.get("ZOffsetInSlideCoordinateSystem", 0.0)),
        ]
    )
    measures = header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    # DICOM states the distance of rows first.
    spacing_y, spacing_x = (float(value) for value in measures.PixelSpacing)
    orientation = np.array([float(value) for value in header.ImageOrientationSlide])
    along_x, along_y = orientation[:3] * spacing_x, orientation[3:] * spacing_y
    # The middle of the map's first pixel, in px of the slide from the middle of the slide's first pixel.
    middle = np.array(grid.corner) + np.array(grid.pixel) / 2 - 0.5
    position = start + middle[0] * along_x + middle[1] * along_y
    # The same for the same evidence of the same image.
    identity = [row.slide_sha256, row.model, row.pipeline_id, evidence.method, str(header.SOPInstanceUID)]
    largest = float(np.abs(channels).max()) or 1.0
    smallest = -largest if evidence.is_signed else 0.0
    mappings = [
        [
            highdicom.pm.RealWorldValueMapping(
                lut_label=name[:16],
                lut_explanation=f"{'evidence for ' if evidence.is_signed else ''}{name}"[:64],
                unit=codes.UCUM.NoUnits,
                value_range=(float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)),
                slope=1.0,
                intercept=0.0,
            )
        ]
        for name in evidence.maps
    ]
    return highdicom.pm.ParametricMap(
        source_images=[header],
        pixel_array=np.moveaxis(channels, 0, -1)[None],
        series_instance_uid=generate_uid(entropy_srcs=["series", *identity]),
        series_number=9000,
        sop_instance_uid=generate_uid(entropy_srcs=["instance", *identity]),
        instance_number=1,
        manufacturer="crcjax",
        manufacturer_model_name="crcjax",
        software_versions=crcjax.__version__,
        device_serial_number=row.model[:64] or "unknown",
        contains_recognizable_visual_features=False,
        real_world_value_mappings=mappings,
        voi_lut_transformations=[
            highdicom.VOILUTTransformation(window_center=(largest + smallest) / 2, window_width=largest - smallest)
        ],
        content_description="Evidence of a model, research use only",
        content_label="EVIDENCE",
        pixel_measures=highdicom.PixelMeasuresSequence(
            pixel_spacing=(spacing_y * grid.pixel[1], spacing_x * grid.pixel[0]),
            slice_thickness=float(measures.get("SliceThickness", 0.0)),
        ),
        plane_orientation=highdicom.PlaneOrientationSequence("SLIDE", orientation.tolist()),
        plane_positions=[highdicom.PlanePositionSequence("SLIDE", position.tolist(), (1, 1))],
        tile_pixel_array=True,
        tile_size=(_FRAME_PX, _FRAME_PX),
    )
