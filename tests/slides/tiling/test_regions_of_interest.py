import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from crcjax.errors import InputError
from crcjax.slides.interchange.exporter import export_store
from crcjax.slides.preprocess.manifest import read_manifest
from crcjax.slides.preprocess.qc_report import write_overview
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.tile_store import StoreWriter, open_store
from crcjax.slides.tiling.plan import TilingParams, plan_tiles
from crcjax.slides.tiling.read import read_regions
from crcjax.slides.tiling.regions_of_interest import Areas, areas_of, read_area, read_classes, write_area
from crcjax.slides.wsi.slide import open_slide

SHAPE, SIZE = (120, 160), (1600, 1200)
PARAMS = TilingParams(("20x",), tile_px=32)


def _geojson(path: Path, *geometries: dict) -> Path:
    features = [{"type": "Feature", "geometry": geometry, "properties": {}} for geometry in geometries]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def _box(x0: int, y0: int, x1: int, y1: int) -> list[list[int]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def test_polygons_are_in_level_0_pixels_with_their_holes(tmp_path: Path) -> None:
    holed = {"type": "Polygon", "coordinates": [_box(200, 100, 800, 900), _box(400, 300, 600, 500)]}
    many = {"type": "MultiPolygon", "coordinates": [[_box(1000, 100, 1200, 300)], [_box(1400, 900, 1600, 1200)]]}
    found = read_area(_geojson(tmp_path / "a.geojson", holed, many), SHAPE, SIZE)
    wanted = np.zeros(SHAPE, bool)
    wanted[10:90, 20:80], wanted[30:50, 40:60] = True, False
    wanted[10:30, 100:120] = wanted[90:120, 140:160] = True
    off = found != wanted
    assert not cv2.erode(off.astype(np.uint8), np.ones((3, 3))).any()  # at most the outline
    assert off.mean() < 0.03


def test_a_mask_written_is_the_mask_read_as_geojson_and_as_png(tmp_path: Path) -> None:
    noise = cv2.GaussianBlur(np.random.default_rng(0).normal(size=SHAPE), (0, 0), 6)
    mask = noise > 0
    write_area(tmp_path / "a", mask, SIZE, "Tissue")
    np.testing.assert_array_equal(read_area(tmp_path / "a.png", SHAPE, SIZE), mask)
    assert (read_area(tmp_path / "a.geojson", SHAPE, SIZE) == mask).mean() > 0.96
    written = json.loads((tmp_path / "a.geojson").read_text())["features"][0]
    assert written["properties"]["objectType"] == "annotation"
    rings = [ring for polygon in written["geometry"]["coordinates"] for ring in polygon]
    assert all(ring[0] == ring[-1] and len(ring) >= 4 for ring in rings)


def test_geojson_counts_from_the_corner_of_the_scanned_part_and_an_image_from_the_slides(tmp_path: Path) -> None:
    corner = (400, 300)
    box = _geojson(tmp_path / "a.geojson", {"type": "Polygon", "coordinates": [_box(-100, 0, 400, 300)]})
    found = read_area(box, SHAPE, SIZE, corner)
    wanted = np.zeros(SHAPE, bool)
    wanted[30:60, 30:80] = True
    assert (found != wanted).mean() < 0.02
    np.testing.assert_array_equal(Areas(include=box).mask(SHAPE, SIZE, corner), found)
    write_area(tmp_path / "b", wanted, SIZE, "Tissue", corner)
    ring = np.array(json.loads((tmp_path / "b.geojson").read_text())["features"][0]["geometry"]["coordinates"][0][0])
    assert ring.min(axis=0) == pytest.approx((-100, 0), abs=5)
    for suffix in (".geojson", ".png"):
        assert (read_area(tmp_path / f"b{suffix}", SHAPE, SIZE, corner) != wanted).mean() < 0.02


def test_what_is_no_area_of_the_slide_is_refused(tmp_path: Path) -> None:
    point = _geojson(tmp_path / "point.geojson", {"type": "Point", "coordinates": [1, 2]})
    empty, text = _geojson(tmp_path / "empty.geojson"), tmp_path / "text.geojson"
    text.write_text("no json")
    Image.new("L", (100, 100)).save(tmp_path / "square.png")
    (tmp_path / "broken.png").write_text("no picture")
    for path, words in [
        (point, "holds a Point"),
        (empty, "holds no area"),
        (text, "is not GeoJSON"),
        (tmp_path / "square.png", "no picture of the whole slide"),
        (tmp_path / "broken.png", "cannot be read as a picture"),
        (tmp_path / "absent.geojson", "cannot be read"),
    ]:
        with pytest.raises(InputError, match=words):
            read_area(path, SHAPE, SIZE)


def test_each_slides_files_are_found_by_its_name(tmp_path: Path) -> None:
    file = _geojson(tmp_path / "s1.geojson", {"type": "Polygon", "coordinates": [_box(0, 0, 9, 9)]})
    assert areas_of("s1", tmp_path, None) == Areas(include=file)
    assert areas_of("s2", None, tmp_path) == Areas()
    with pytest.raises(InputError, match=r"holds no s2\.geojson"):
        _ = areas_of("s2", tmp_path, None).id
    with pytest.raises(InputError, match="name a folder"):
        areas_of("s1", file, None)
    Image.new("L", (16, 12)).save(tmp_path / "s1.png")
    with pytest.raises(InputError, match="leave one"):
        _ = areas_of("s1", None, tmp_path).id


def test_a_region_file_that_is_lacking_or_bad_fails_its_slide_alone(small_slide: Path, tmp_path: Path) -> None:
    folder, store = tmp_path / "areas", tmp_path / "store"
    folder.mkdir()
    names = ("good", "lacking", "text", "point", "double")
    slides = [shutil.copy(small_slide, tmp_path / f"{name}.svs") for name in names]
    for name in ("good", "double"):
        _geojson(folder / f"{name}.geojson", {"type": "Polygon", "coordinates": [_box(0, 0, 1500, 1300)]})
    (folder / "double.png").touch()
    (folder / "text.geojson").write_text("no json")
    _geojson(folder / "point.geojson", {"type": "Point", "coordinates": [1, 2]})
    command = [
        sys.executable,
        "-m",
        "crcjax.cli",
        "tile",
        *slides,
        "--out",
        store,
        "--include",
        folder,
        "--tile-px",
        32,
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = read_manifest(store)
    assert [found[name]["status"] for name in names] == ["tiled", *["failed"] * 4]
    words = ("holds no lacking.geojson", "is not GeoJSON", "holds a Point", "leave one")
    for name, said in zip(names[1:], words, strict=True):
        assert said in found[name]["reason"]
        assert said in done.stderr


def test_tiles_lie_within_what_is_included_and_outside_what_is_excluded(small_slide: Path, tmp_path: Path) -> None:
    left = _geojson(tmp_path / "left.geojson", {"type": "Polygon", "coordinates": [_box(0, 0, 750, 1300)]})
    store, tiles = tmp_path / "store", {}
    for name, areas in {"all": Areas(), "left": Areas(include=left), "right": Areas(exclude=left)}.items():
        (outcome,) = tile_slides([TileJob("s", small_slide, areas=areas)], store, PARAMS, workers=1)
        assert outcome.status == "tiled"  # again, for the areas changed
        (outcome,) = tile_slides([TileJob("s", small_slide, areas=areas)], store, PARAMS, workers=1)
        assert outcome.status == "already tiled"
        tiles[name] = {tuple(place) for place in open_store(store, "s").origin.tolist()}
    assert tiles["left"] | tiles["right"] == tiles["all"]
    assert max(x for x, _ in tiles["left"]) <= 750
    assert min(x for x, _ in tiles["right"]) >= 750 - 32


def test_tiles_of_a_slide_that_states_its_scanned_part_are_where_qupath_drew_them(
    small_slide: Path, tmp_path: Path
) -> None:
    left = _geojson(tmp_path / "left.geojson", {"type": "Polygon", "coordinates": [_box(-100, -50, 650, 1250)]})
    with open_slide(small_slide) as slide:
        slide.info = replace(slide.info, corner=(100, 50))
        plan = plan_tiles(slide, PARAMS, Areas(include=left))
        with StoreWriter(tmp_path, "s", slide, plan, "none") as writer:
            writer.write(0, read_regions(slide, plan, 0, len(plan.origin), writer.pack))
            writer.commit()
    assert 700 < plan.origin[:, 0].max() <= 750
    export_store(tmp_path, tmp_path / "out", "geojson")
    features = json.loads((tmp_path / "out" / "s.geojson").read_text())["features"]
    places = {tuple(np.min(feature["geometry"]["coordinates"][0], axis=0).tolist()) for feature in features}
    store = open_store(tmp_path, "s")
    assert places == {(x - 100, y - 50) for x, y in store.origin[store.mask[:, 0]].tolist()}


def test_the_command_restricts_the_tiles_and_names_a_guessed_scale(
    tmp_path: Path, write_slide: Callable[..., Path], tissue_picture: Callable[..., np.ndarray]
) -> None:
    slide = write_slide(tmp_path / "s.svs", tissue_picture(1500, 1300), mpp=None, power=20)
    folder, store = tmp_path / "areas", tmp_path / "store"
    folder.mkdir()
    _geojson(folder / "s.geojson", {"type": "Polygon", "coordinates": [_box(0, 0, 750, 1300)]})
    options = ["--include", folder, "--tissue-method", "otsu", "--icc", "--tile-px", 32]
    command = [sys.executable, "-m", "crcjax.cli", "tile", slide, "--out", store, *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.5 µm per pixel is guessed from the objective power 20; give --mpp" in " ".join(done.stderr.split())
    found = open_store(store, "s")
    assert (found.params.tissue, found.params.icc, found.info.mpp_source) == ("otsu", True, "objective")
    assert found.origin[:, 0].max() <= 750


def test_the_overview_holds_the_tissue_for_qupath(small_slide: Path, tmp_path: Path) -> None:
    tile_slides([TileJob("s", small_slide)], tmp_path, PARAMS, workers=1)
    folder = write_overview(tmp_path).parent
    thumbnail, mask = open_store(tmp_path, "s").thumbnail()
    assert thumbnail.shape[:2] == mask.shape
    for suffix in (".png", ".geojson"):
        found = read_area(folder / f"s.tissue{suffix}", (mask.shape[0], mask.shape[1]), (1500, 1300))
        assert (found == mask).mean() > 0.97


@pytest.mark.parametrize("name", ["s2.geojson", "s2.svs.geojson", "s2.GEOJSON", "s2.SVS.GeoJson", "scan 7.ndpi.json"])
def test_region_files_are_found_under_every_name_that_qupath_gives(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    (tmp_path / "s22.geojson").touch()
    assert areas_of("s2", None, tmp_path, "scan 7.ndpi").exclude == tmp_path / name


def test_every_form_of_geojson_is_read_and_a_misplaced_one_is_named(tmp_path: Path) -> None:
    path, ring = tmp_path / "s.geojson", [[0, 0], [50, 0], [50, 100], [0, 100], [0, 0]]
    square = {"type": "Polygon", "coordinates": [ring]}

    def feature(geometry: dict | None, **properties: object) -> dict:
        return {"type": "Feature", "geometry": geometry, "properties": properties}

    for features in (
        [feature(square, classification="Tumor"), feature(None)],
        [feature({"type": "GeometryCollection", "geometries": [square]}, classification={"name": "Tumor"})],
    ):
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8-sig")
        masks = read_classes(path, (10, 10), (100, 100))
        assert list(masks) == ["Tumor"]
        assert masks["Tumor"][:, :5].all()
        assert not masks["Tumor"][:, 6:].any()
    far = [[x + 20000, y + 20000] for x, y in ring]
    for coordinates, words in (
        (far, "no area within the slide of 100 x 100 px"),
        ([[math.nan, 0], *ring], "not a number"),
    ):
        path.write_text(json.dumps(feature({"type": "Polygon", "coordinates": [coordinates]})))
        with pytest.raises(InputError, match=words):
            read_area(path, (10, 10), (100, 100))
    path.write_text(json.dumps(feature(None)))
    with pytest.raises(InputError, match="holds no area; draw one"):
        read_area(path, (10, 10), (100, 100))
