"""Files of other tools in a store, and back."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.slides.interchange.exporter import export_store
from crcjax.slides.interchange.importer import import_files
from crcjax.slides.preprocess.manifest import Outcome, read_manifest
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.features import feature_attributes, read_features
from crcjax.slides.store.locks import slide_lock
from crcjax.slides.store.tile_store import open_store, tiled_slides
from crcjax.slides.tiling.plan import TilingParams
from crcjax.slides.wsi.slide import open_slide

Write = Callable[..., Path]
# Of `small_slide` (0.5 µm): tiles of 64 px at 20x, as another tool may have laid them, not in order.
CORNER = np.array([(430, 330), (366, 330), (494, 394), (700, 600)])
ORDER = [1, 0, 2, 3]  # row by row
FEATURES = np.arange(32, dtype=np.float32).reshape(4, 8)


def _trident(write: Write, path: Path, corner=CORNER, features=FEATURES, encoder="uni_v1", **others: object) -> Path:
    about = {"patch_size": 64, "patch_size_level0": 64, "level0_magnification": 20, "target_magnification": 20}
    datasets = {"coords": corner} | ({} if features is None else {"features": features})
    return write(path, datasets, coords=about | others, features={"encoder": encoder} if encoder else {})


def _only(outcomes: list[Outcome]) -> Outcome:
    assert len(outcomes) == 1
    return outcomes[0]


@pytest.fixture(scope="module")
def slides(small_slide: Path) -> dict[str, Path]:
    return {"a": small_slide}


def test_a_slide_imported_alone_has_its_tiles_and_features_but_no_pixels(write_h5: Write, tmp_path: Path) -> None:
    outcome = _only(import_files([_trident(write_h5, tmp_path / "a.h5")], tmp_path / "store"))
    assert (outcome.status, outcome.regions, outcome.tiles) == ("imported", 4, 4)
    assert "objective" in outcome.reason  # the resolution is its word, and no more
    store = open_store(tmp_path / "store", "a")
    np.testing.assert_array_equal(store.origin, CORNER[ORDER])
    assert store.mask.all()
    assert (store.params.magnifications, store.params.tile_px, store.region_px) == (("20x",), 64, 64.0)
    assert store.info.mpp == (0.5, 0.5)
    assert store.attributes["verdict"]["verdict"] == "review"
    assert store.attributes["imported"]["layout"] == "TRIDENT"
    np.testing.assert_array_equal(read_features(tmp_path / "store", "a", "uni_v1")[:, 0], FEATURES[ORDER])
    with pytest.raises(InputError, match="imported without its slide"):
        store.check_slide()
    with pytest.raises(InputError, match="imported without its slide"):
        store.read_pixels([0])


def test_pixels_come_from_the_slide_and_are_judged(write_h5: Write, slides: dict, tmp_path: Path) -> None:
    glass = np.array([*CORNER, (0, 0)])
    path = _trident(write_h5, tmp_path / "a.h5", glass, np.ones((5, 8), np.float32))
    outcome = _only(import_files([path], tmp_path / "store", slides=slides, threads=1))
    assert (outcome.status, outcome.regions, outcome.tiles) == ("imported", 5, 4)
    store = open_store(tmp_path / "store", "a")
    assert store.mask[:, 0].tolist() == [False, True, True, True, True]
    store.check_slide()
    pixels = store.read_pixels(range(5))[:, 0]
    with open_slide(slides["a"]) as slide:
        assert store.info.content_hash == slide.info.content_hash
        for tile, (x, y) in zip(pixels[1:], CORNER[ORDER].tolist(), strict=True):
            np.testing.assert_array_equal(tile, slide.read(x, y, 64, 64))
    assert store.quality[1:].any()
    assert not read_features(tmp_path / "store", "a", "uni_v1")[0].any()  # as all that is masked


def test_clam_needs_its_coordinates_and_a_resolution(write_h5: Write, tmp_path: Path) -> None:
    features = write_h5(tmp_path / "h5_files" / "a.h5", {"coords": CORNER, "features": FEATURES})
    about = {"patch_size": 64, "patch_level": 0}
    patches = write_h5(tmp_path / "patches" / "a.h5", {"coords": CORNER}, coords=about)

    def done(*paths: Path, **options: object) -> Outcome:
        return _only(import_files(paths, tmp_path / "store", **options))  # type: ignore[arg-type]

    assert "give --encoder" in done(features, patches, mpp=0.5).reason
    assert "give --slides FOLDER" in done(features, patches, encoder="resnet").reason
    assert "the file of coordinates, or give --side-px" in done(features, encoder="resnet", mpp=0.5).reason
    assert not tiled_slides(tmp_path / "store")
    assert done(features, patches, encoder="resnet", mpp=0.5).status == "imported"
    assert set(open_store(tmp_path / "store", "a").attributes["imported"]["sources"]) == {"a.h5"}
    assert done(features, encoder="resnet", mpp=0.5, side_px=64.0).status == "unsupported"  # of other sources
    assert read_manifest(tmp_path / "store")["a"]["status"] == "unsupported"


def test_stamps_micrometres_become_level_0_pixels(write_h5: Write, slides: dict, tmp_path: Path) -> None:
    about = {"unit": "um", "tile_size_um": 32.0, "tile_size_px": 64, "extractor": "ctranspath"}
    path = write_h5(tmp_path / "a.h5", {"coords": CORNER * 0.5, "feats": FEATURES.astype(np.float16)}, about)
    for store, named in ((tmp_path / "alone", None), (tmp_path / "store", slides)):
        assert _only(import_files([path], store, slides=named, mpp=0.5)).status == "imported"
        np.testing.assert_array_equal(open_store(store, "a").origin, CORNER[ORDER])
        found = read_features(store, "a", "ctranspath")
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found[:, 0], FEATURES[ORDER])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size_level0": 66}, "its tiles are 64 px of 33 µm, the store's 64 px of 32 µm"),
        ({"patch_size": 128}, "its tiles are 128 px of 32 µm"),
        ({"level0_magnification": 40}, "its tiles are 64 px of 16 µm"),
        ({"encoder": "conch"}, "its features are 8 numbers of conch, those of a with the name x are 8 of uni_v1"),
        ({"features": FEATURES[:, :4]}, "its features are 4 numbers of uni_v1, those of a with the name x are 8"),
    ],
)
def test_other_fields_of_view_and_encoders_are_refused(
    changes: dict, words: str, write_h5: Write, tmp_path: Path
) -> None:
    _trident(write_h5, tmp_path / "in" / "a.h5")
    _trident(write_h5, tmp_path / "in" / "b.h5", **changes)
    _trident(write_h5, tmp_path / "in" / "c.h5", patch_size_level0=65)  # within 2 %
    first, second, third = import_files([tmp_path / "in"], tmp_path / "store", encoder="x")
    assert (first.status, second.status, third.status) == ("imported", "unsupported", "imported")
    assert words in second.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corner": CORNER + 5000, "level0_width": 1500, "level0_height": 1300}, "is outside the slide of 1500 x 1300"),
        ({"corner": CORNER[[0, 0, 1, 2]]}, "two tiles at one place"),
        ({"patch_size": 8}, "tile_px 8 is outside"),
        ({"level0_magnification": 0.01}, "impossible 1000 µm"),
        ({"encoder": "a/b"}, "cannot name a folder"),
    ],
)
def test_impossible_tiles_are_named_and_nothing_is_written(
    changes: dict, words: str, write_h5: Write, tmp_path: Path
) -> None:
    outcome = _only(import_files([_trident(write_h5, tmp_path / "a.h5", **changes)], tmp_path / "store"))
    assert words in outcome.reason
    assert outcome.path == str(tmp_path / "a.h5")
    assert not outcome.succeeded
    assert not tiled_slides(tmp_path / "store")


def test_started_again_it_does_what_is_missing(write_h5: Write, tmp_path: Path) -> None:
    files, store = tmp_path / "in", tmp_path / "store"
    _trident(write_h5, files / "a.h5")
    _trident(write_h5, files / "b.h5")
    (files / "c.h5").write_bytes(b"no HDF5")
    assert [outcome.status for outcome in import_files([files], store)] == ["imported", "imported", "unsupported"]
    _trident(write_h5, files / "c.h5", features=None)
    subprocess.run(["rm", "-r", str(store / "b.zarr" / "features")], check=True)  # killed between tiles and features
    with slide_lock(store, "a"):
        assert "another process writes the slide a" in import_files([files], store)[0].reason
    assert [outcome.status for outcome in import_files([files], store)] == ["already imported"] * 3
    assert read_features(store, "b", "uni_v1").any()
    _trident(write_h5, files / "a.h5", features=FEATURES + 1)
    changed = import_files([files], store)[0]
    assert "the store has other features of the name uni_v1" in changed.reason
    (store / "b.zarr" / "mask" / "zarr.json").write_text("{")
    assert import_files([files], store)[1].status == "failed"


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"level0_width": 1400, "level0_height": 1000}, "it states 1400 x 1000 px, the slide has"),
        ({"level0_mpp": 0.25}, "it states 0.25 µm per pixel, the slide has 0.5"),
        (
            {"level0_magnification": 40, "target_magnification": 40},
            "an objective of 40x, the slide has 0.5 µm per pixel",
        ),
        ({"name": "b"}, "has the name of slide a, but states that it is of slide b"),
        ({"name": "b.svs"}, "has the name of slide a, but states that it is of slide b"),
    ],
)
def test_a_file_whose_statements_contradict_its_slide_is_refused(
    stated: dict, words: str, write_h5: Write, slides: dict, tmp_path: Path
) -> None:
    path, both = _trident(write_h5, tmp_path / "a.h5", **stated), slides | {"b": slides["a"]}
    outcome = _only(import_files([path], tmp_path / "store", slides=both, threads=1))
    assert outcome.status == "corrupt"
    assert words in outcome.reason
    assert tiled_slides(tmp_path / "store") == []
    right = _trident(write_h5, tmp_path / "right" / "a.h5", features=None)
    assert _only(import_files([right], tmp_path / "store", slides=both, threads=1)).status == "imported"
    assert words in _only(import_files([path], tmp_path / "store", slides=both, threads=1)).reason


def test_statements_that_agree_with_the_slide_or_were_overridden_pass(
    write_h5: Write, slides: dict, tmp_path: Path
) -> None:
    with open_slide(slides["a"]) as slide:
        width, height = slide.info.size
    stated = {"level0_width": width, "level0_height": height, "level0_mpp": 0.504, "name": "its name at the scanner"}
    path = _trident(write_h5, tmp_path / "a.h5", **stated)
    assert _only(import_files([path], tmp_path / "one", slides=slides, threads=1)).status == "imported"
    path = _trident(write_h5, tmp_path / "a.h5", level0_mpp=0.25)
    given = {"slides": slides, "slide_mpp": {"a": 0.5}, "threads": 1}
    assert _only(import_files([path], tmp_path / "two", **given)).status == "imported"
    about = {"patch_size": 64, "patch_level": 1, "downsample": [3.99, 4.01], "level_dim": [width // 4, height // 4]}
    clam = write_h5(tmp_path / "clam" / "a.h5", {"coords": CORNER}, coords=about)
    assert _only(import_files([clam], tmp_path / "three", slides=slides, threads=1)).status == "imported"


def test_a_slide_that_was_not_named_or_came_without_pixels_says_so(
    write_h5: Write, slides: dict, tmp_path: Path
) -> None:
    _trident(write_h5, tmp_path / "in" / "b.h5")
    assert (
        "b is not among the given slides"
        in _only(import_files([tmp_path / "in"], tmp_path / "s", slides=slides)).reason
    )
    path = _trident(write_h5, tmp_path / "a.h5")
    import_files([path], tmp_path / "s")
    assert (
        "without its pixels; import it into another --out"
        in _only(import_files([path], tmp_path / "s", slides=slides)).reason
    )


def test_wrong_arguments_are_refused_before_anything_is_written(write_h5: Write, tmp_path: Path) -> None:
    path = _trident(write_h5, tmp_path / "a.h5")
    for options in ({"mpp": 1000.0}, {"side_px": 0.0}):
        with pytest.raises(InputError):
            import_files([path], tmp_path / "store", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


def test_exported_tiles_come_back_and_take_the_features_that_another_tool_made(
    write_h5: Write, slides: dict, tmp_path: Path
) -> None:
    import h5py

    params = TilingParams(("20x",), tile_px=64)
    assert tile_slides([TileJob("a", slides["a"])], tmp_path / "ours", params)[0].succeeded
    assert export_store(tmp_path / "ours", tmp_path / "out", "trident")[0].succeeded
    job = tmp_path / "out" / "20x_64px_0px_overlap"
    ours = open_store(tmp_path / "ours", "a")
    kept = ours.origin[ours.mask[:, 0]]
    assert _only(import_files([job], tmp_path / "theirs")).status == "imported"
    theirs = open_store(tmp_path / "theirs", "a")
    np.testing.assert_array_equal(theirs.origin, kept)
    assert (theirs.params.magnifications, theirs.params.tile_px) == (("20x",), 64)
    assert (theirs.info.mpp, theirs.info.size, theirs.region_px) == (ours.info.mpp, ours.info.size, ours.region_px)
    with h5py.File(job / "patches" / "a_patches.h5") as file:
        corner, about = file["coords"][()], dict(file["coords"].attrs)
    features = np.random.default_rng(0).normal(size=(len(corner), 5)).astype(np.float32)
    write_h5(
        job / "features_new" / "a.h5",
        {"coords": corner[::-1], "features": features[::-1]},
        coords=about,
        features={"encoder": "new"},
    )
    assert _only(import_files([job / "features_new"], tmp_path / "ours")).status == "imported"
    np.testing.assert_array_equal(read_features(tmp_path / "ours", "a", "new")[ours.mask], features)
    made = feature_attributes(tmp_path / "ours", "a", "new")
    assert made
    assert (made["weights_sha256"], made["stated_encoder"], made["imported"]["layout"]) == (None, "new", "TRIDENT")


@pytest.mark.real_data
def test_real_feature_bags_are_imported(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "mil" / "wsi_features"
    with_places, without = "TCGA-AD-6964-01Z-00-DX1", "TCGA-3X-AAVA-01Z-00-DX1"
    options = {"encoder": "resnet", "mpp": 0.25, "side_px": 512.0}
    found = {outcome.slide_id: outcome for outcome in import_files([folder], tmp_path, **options)}  # type: ignore[arg-type]
    assert (found[with_places].status, found[with_places].tiles) == ("imported", 777)
    assert "no coordinates of tiles" in found[without].reason
    store = open_store(tmp_path, with_places)
    assert store.region_px * store.info.mpp[0] == 128.0
    # The names of its real tiles are their corners.
    names = (path.stem.split("(")[1] for path in (real_data / "tiles" / "tcga_crc").glob("*6964*"))
    tiles = {tuple(map(int, name.strip("()").split(","))) for name in names}
    assert tiles
    assert tiles <= set(map(tuple, store.origin.tolist()))
    assert read_features(tmp_path, with_places, "resnet").shape == (777, 1, 512)
    assert replace(store.info, path="").content_hash == ""
