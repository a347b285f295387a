"""Kept tiles as files that QuPath and TRIDENT read."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError, OutputError
from crcjax.slides.interchange.exporter import export_store
from crcjax.slides.interchange.importer import import_files
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.tile_store import open_store
from crcjax.slides.tiling.plan import TilingParams
from crcjax.slides.tiling.quality_control import QUALITY_NAMES

GLASS = 240


@pytest.fixture(scope="module")
def store(write_slide: Callable[..., Path], tissue_picture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One slide of 20x at 10x, 20x and 40x: tissue in the square from (256, 384) to (512, 640) alone."""
    folder = tmp_path_factory.mktemp("store")
    picture = np.full((896, 768, 3), GLASS, np.uint8)
    picture[384:640, 256:512] = tissue_picture(512, 512)[128:384, 128:384]
    path = write_slide(folder / "a.svs", picture)
    params = TilingParams(("10x", "20x", "40x"), tile_px=64)
    assert tile_slides([TileJob("a", path)], folder / "store", params)[0].succeeded
    return folder / "store"


def test_geojson_squares_land_on_the_tissue_and_carry_the_scores(store: Path, tmp_path: Path) -> None:
    outcomes = export_store(store, tmp_path, "geojson")
    assert [(outcome.status, outcome.slide_id) for outcome in outcomes] == [("exported", "a")]
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    squares: dict[str, set] = {}
    for feature in features:
        ring = np.array(feature["geometry"]["coordinates"][0])
        assert (ring[0] == ring[-1]).all()
        left, top = ring.min(axis=0)
        assert feature["properties"]["objectType"] == "tile"
        assert set(feature["properties"]["measurements"]) == set(QUALITY_NAMES)
        name = feature["properties"]["classification"]["name"]
        squares.setdefault(name, set()).add((left, top, *(ring.max(axis=0) - ring.min(axis=0))))
    kept = open_store(store, "a").mask.sum()
    assert len(features) == kept == 4 + 16
    assert squares == {
        "Tile 10x": {(x, y, 128, 128) for x in (256, 384) for y in (384, 512)},
        "Tile 20x": {(x, y, 64, 64) for x in range(256, 512, 64) for y in range(384, 640, 64)},
    }


def test_trident_gets_a_folder_a_magnification_whose_side_it_finds_again(store: Path, tmp_path: Path) -> None:
    import h5py

    export_store(store, tmp_path, "trident")
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["10x_64px_0px_overlap", "20x_64px_0px_overlap"]  # the slide has no 40x
    for folder, side, magnification in zip(folders, (128, 64), (10, 20), strict=True):
        with h5py.File(tmp_path / folder / "patches" / "a_patches.h5") as file:
            coords, about = file["coords"][()], dict(file["coords"].attrs)
        assert coords.dtype == np.int64
        steps = range(0, 256, side)
        assert set(map(tuple, coords.tolist())) == {(256 + x, 384 + y) for x in steps for y in steps}
        found = about["patch_size"] * about["level0_magnification"] / about["target_magnification"]
        assert (about["patch_size_level0"], found, about["target_magnification"]) == (side, side, magnification)
        assert (about["level0_width"], about["level0_height"], about["overlap"]) == (768, 896, 0)
        assert about["name"] == "a"


def test_tiles_imported_without_their_slide_go_out_without_scores(
    write_h5: Callable[..., Path], tmp_path: Path
) -> None:
    about = {"patch_size": 64, "patch_size_level0": 64, "level0_magnification": 20, "overlap": 32}
    write_h5(tmp_path / "in" / "a.h5", {"coords": np.array([(0, 0), (32, 0)])}, coords=about)
    import_files([tmp_path / "in"], tmp_path / "store")
    export_store(tmp_path / "store", tmp_path / "out", "geojson")
    features = json.loads((tmp_path / "out" / "a.geojson").read_text())["features"]
    assert [feature["properties"]["measurements"] for feature in features] == [{}, {}]
    export_store(tmp_path / "store", tmp_path / "out", "trident")
    assert (tmp_path / "out" / "20x_64px_32px_overlap" / "patches" / "a_patches.h5").exists()


def test_a_damaged_slide_is_an_outcome_and_wrong_folders_are_errors(store: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged" / "b.zarr").mkdir(parents=True)
    (tmp_path / "damaged" / "b.zarr" / "zarr.json").write_text("{")
    (outcome,) = export_store(tmp_path / "damaged", tmp_path / "out", "geojson")
    assert (outcome.status, outcome.slide_id) == ("failed", "b")
    with pytest.raises(InputError, match="has no slides"):
        export_store(tmp_path / "out", tmp_path / "out", "geojson")
    with pytest.raises(InputError, match="choose geojson or trident"):
        export_store(store, tmp_path / "out", "csv")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        export_store(store, tmp_path / "file", "geojson")
