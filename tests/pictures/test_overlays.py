"""A planted mark lies within half a level-0 pixel of its place by every route."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
from pydicom.dataset import Dataset

from crcjax.errors import InputError
from crcjax.pictures.overlay_dicom import write_overlay_dicom
from crcjax.pictures.overlay_geojson import write_overlay_geojson
from crcjax.pictures.overlay_tiff import TISSUE, write_overlay_tiff
from crcjax.pictures.top_tiles import top_tiles
from crcjax.predict.evidence import SlideEvidence
from crcjax.validation.predictions_table import PredictionRow

SIZE, MPP, REGION_PX = (2220, 2967), (0.499, 0.499), 2 * 128 / 0.499
BOXES = np.array([(0, 0, 0.5), (0.5, 0, 0.5), (0, 0.5, 0.5), (0.5, 0.5, 0.5)], np.float32)
MARKED = (5, 2)  # region, slot
ROW = PredictionRow("s", "case", "ok", call="b", probs=(0.1, 0.9), model="m", slide_sha256="0" * 64)


@pytest.fixture
def evidence() -> SlideEvidence:
    """Four by five regions at places that are no whole pixels of any overlay; one tile is evidence for class b."""
    origin = np.stack(np.meshgrid(np.arange(4), np.arange(5)), axis=-1).reshape(-1, 2) * REGION_PX + (37, 141)
    value = np.zeros((20, 4, 2), np.float32)
    value[(*MARKED, 1)] = 3
    value[(*MARKED, 0)] = -2
    # Regions start on whole pixels.
    return SlideEvidence(
        *("gradient", ("a", "b"), value, np.rint(origin).astype(np.int32), REGION_PX, BOXES),
        *(np.ones((20, 4), bool), SIZE, (0, 0), MPP, False),
    )


def _mark(evidence: SlideEvidence) -> tuple[np.ndarray, float]:
    """The marked tile's corner and side in level-0 px."""
    region, slot = MARKED
    return evidence.origin[region] + BOXES[slot, :2] * REGION_PX, REGION_PX / 2


def _edges(channel: np.ndarray, first: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """Left, top, right and bottom of a mark by its half height; pixel i's middle is at first + i * pixel, in level-0 px."""
    ends = []
    for axis in (0, 1):
        profile = channel.max(axis=axis)
        above = np.flatnonzero(profile >= profile.max() / 2)
        for inside, outside in ((above[0], above[0] - 1), (above[-1], above[-1] + 1)):
            share = (profile.max() / 2 - profile[outside]) / (profile[inside] - profile[outside])
            ends.append(first[axis] + pixel[axis] * (outside + share * (inside - outside)))
    return np.array(ends)[[0, 2, 1, 3]]


def _assert_at_the_mark(edges: np.ndarray, evidence: SlideEvidence) -> None:
    corner, side = _mark(evidence)
    np.testing.assert_allclose(edges, [*corner, *(corner + side)], atol=0.5)


@pytest.mark.parametrize("corner", [(0, 0), (25, 60)])
def test_the_ome_tiff_shows_a_mark_at_its_place_in_every_level(
    evidence: SlideEvidence, tmp_path: Path, corner: tuple[int, int]
) -> None:
    path = tmp_path / "s.ome.tif"
    write_overlay_tiff(path, replace(evidence, corner=corner), "about")
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        series = tiff.series[0]
        assert (series.axes, series.dtype) == ("CYX", np.float32)
        root = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        assert [channel["Name"] for channel in root["Channel"]] == ["a", "b", TISSUE]
        size_um = float(root["PhysicalSizeX"]), float(root["PhysicalSizeY"])
        pixel = np.array(size_um) / MPP
        values = series.asarray()
    edges = _edges(values[1], corner + pixel / 2, pixel)
    _assert_at_the_mark(edges, evidence)
    assert values[1].max() == pytest.approx(3)
    assert values[0].min() == pytest.approx(-2)
    # The corners of the regions are at most half a pixel from those of a grid, so that they hardly overlap.
    assert values[2].sum() * pixel.prod() == pytest.approx(20 * REGION_PX**2, rel=5e-3)


def test_a_large_overlay_is_a_pyramid_whose_levels_agree(evidence: SlideEvidence, tmp_path: Path) -> None:
    cells = np.stack(np.meshgrid(np.arange(60), np.arange(70)), axis=-1).reshape(-1, 2)
    large = replace(
        evidence,
        value=np.random.default_rng(0).normal(size=(4200, 4, 2)).astype(np.float32),
        origin=np.rint(cells * REGION_PX).astype(np.int32),
        mask=np.ones((4200, 4), bool),
        size=(32000, 37000),
    )
    write_overlay_tiff(tmp_path / "s.ome.tif", large, "about")
    with tifffile.TiffFile(tmp_path / "s.ome.tif") as tiff:
        levels = [level.asarray() for level in tiff.series[0].levels]
    assert len(levels) >= 2
    assert max(levels[-1].shape[1:]) <= 512
    fine, coarse = levels[0], levels[1]
    rows, columns = fine.shape[1] // 2, fine.shape[2] // 2
    means = fine[:2, : 2 * rows, : 2 * columns].reshape(2, rows, 2, columns, 2).mean(axis=(2, 4))
    inside = coarse[2, :rows, :columns] == 1
    np.testing.assert_allclose(coarse[:2, :rows, :columns][:, inside], means[:, inside], atol=1e-5)


def test_the_geojson_has_every_tile_at_its_place_with_its_values_and_the_first_tiles_by_number(
    evidence: SlideEvidence, tmp_path: Path
) -> None:
    path = tmp_path / "s.geojson"
    write_overlay_geojson(path, replace(evidence, corner=(25, 60)), top_tiles(evidence, 3))
    features = json.loads(path.read_text())["features"]
    tiles = [feature for feature in features if feature["properties"]["objectType"] == "tile"]
    assert len(tiles) == 80
    marked = [feature for feature in tiles if feature["properties"]["measurements"] == {"a": -2, "b": 3}]
    assert len(marked) == 1
    ring = np.array(marked[0]["geometry"]["coordinates"][0]) + np.array([25, 60])
    _assert_at_the_mark(np.array([*ring.min(axis=0), *ring.max(axis=0)]), evidence)
    # Nothing is evidence for a, and one tile for b.
    annotations = [feature["properties"] for feature in features if feature["properties"]["objectType"] == "annotation"]
    assert [(one["name"], one["classification"]["name"]) for one in annotations] == [("b 1", "b")]


def test_attention_of_one_of_many_tiles_keeps_its_digits(evidence: SlideEvidence, tmp_path: Path) -> None:
    attention = replace(
        evidence, method="attention", maps=("attention",), value=np.full((20, 4, 1), 1.2345e-5, np.float32)
    )
    write_overlay_geojson(tmp_path / "s.geojson", attention, [])
    features = json.loads((tmp_path / "s.geojson").read_text())["features"]
    assert {feature["properties"]["measurements"]["attention"] for feature in features} == {1.234e-5}


@pytest.fixture
def complete_slide(real_data: Path, tmp_path: Path) -> Path:
    """The real DICOM slide with the fields of its header that it lacks."""
    folder = tmp_path / "slide"
    shutil.copytree(real_data / "slides" / "dicom_cmu-1-small-region", folder)
    for file in folder.iterdir():
        file.chmod(0o644)
        header = pydicom.dcmread(file)
        header.PatientID, header.PatientName = "P1", "P^1"
        origin = Dataset()
        origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 20.0, 40.0
        header.TotalPixelMatrixOriginSequence = [origin]
        header.save_as(file)
    return folder


def test_the_dicom_map_shows_a_mark_at_its_place_in_the_slides_frame_of_reference(
    evidence: SlideEvidence, complete_slide: Path, tmp_path: Path
) -> None:
    highdicom = pytest.importorskip("highdicom")
    path = tmp_path / "s.dcm"
    write_overlay_dicom(path, complete_slide, evidence, ROW)
    header = pydicom.dcmread(path, stop_before_pixels=True)
    source = pydicom.dcmread(complete_slide / "level-0-frames-0-30.dcm", stop_before_pixels=True)
    for name in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert header[name].value == source[name].value
    image = highdicom.imread(path)
    channel = _matrix(pydicom.dcmread(path), "b")
    to_slide = highdicom.spatial.PixelToReferenceTransformer.for_image(image, for_total_pixel_matrix=True)
    to_pixels = highdicom.spatial.ReferenceToPixelTransformer.for_image(
        source, for_total_pixel_matrix=True, round_output=False
    )
    places = to_pixels(to_slide(np.array([[0, 0], [1, 0], [0, 1]])))
    first, pixel = places[0, :2], np.array([places[1, 0] - places[0, 0], places[2, 1] - places[0, 1]])
    # A transformer counts from the middle of the slide's first pixel.
    _assert_at_the_mark(_edges(channel, first + 0.5, pixel), evidence)
    again = tmp_path / "again.dcm"
    write_overlay_dicom(again, complete_slide, evidence, ROW)
    assert pydicom.dcmread(again, stop_before_pixels=True).SOPInstanceUID == header.SOPInstanceUID


def _matrix(image: pydicom.Dataset, label: str) -> np.ndarray:
    """The total pixel matrix of a channel, put together from its frames."""
    frames = np.frombuffer(image.FloatPixelData, np.float32).reshape(-1, image.Rows, image.Columns)
    matrix = np.zeros((image.TotalPixelMatrixRows + 256, image.TotalPixelMatrixColumns + 256), np.float32)
    for frame, groups in zip(frames, image.PerFrameFunctionalGroupsSequence, strict=True):
        if groups.RealWorldValueMappingSequence[0].LUTLabel == label:
            place = groups.PlanePositionSlideSequence[0]
            top, left = place.RowPositionInTotalImagePixelMatrix - 1, place.ColumnPositionInTotalImagePixelMatrix - 1
            matrix[top : top + image.Rows, left : left + image.Columns] = frame
    return matrix[: image.TotalPixelMatrixRows, : image.TotalPixelMatrixColumns]


def test_slides_without_what_a_parametric_map_needs_are_refused_by_the_names_of_the_fields(
    evidence: SlideEvidence, real_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("highdicom")
    slides = real_data / "slides"
    with pytest.raises(InputError, match="header lacks PatientID, TotalPixelMatrixOriginSequence, which"):
        write_overlay_dicom(tmp_path / "s.dcm", slides / "dicom_cmu-1-small-region", evidence, ROW)
    with pytest.raises(InputError, match="is no DICOM slide"):
        write_overlay_dicom(tmp_path / "s.dcm", slides / "aperio_cmu-1-small-region.svs", evidence, ROW)
    assert not list(tmp_path.iterdir())
