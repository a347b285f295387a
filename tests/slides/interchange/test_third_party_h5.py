"""What is read from the files of other tools, written here as each of them writes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError, SlideError
from crcjax.slides.interchange.third_party_h5 import merged, read_third_party, third_party_files

Write = Callable[..., Path]
CORNER = np.array([(0, 0), (512, 0), (512, 1024)])
FEATURES = np.arange(24, dtype=np.float32).reshape(3, 8)
TRIDENT = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "level0_width": 4000,
    "level0_height": 3000,
}
CLAM = {
    "patch_size": 256,
    "patch_level": 1,
    "downsample": np.array([2.0, 2.0]),
    "level_dim": np.array([2000, 1500]),
    "name": "a",
}


def test_clam_gives_the_side_in_its_coordinates_and_the_features_beside(write_h5: Write, tmp_path: Path) -> None:
    coords = read_third_party(write_h5(tmp_path / "a.h5", {"coords": CORNER}, coords=CLAM))
    assert (coords.layout, coords.side, coords.tile_px, coords.unit) == ("CLAM", 512.0, 256, "px")
    assert coords.size == (4001, 3001)  # a level of 2000 px may be of one px more of the slide
    assert coords.mpp is coords.power is coords.features is coords.encoder is None
    features = read_third_party(write_h5(tmp_path / "b.h5", {"coords": CORNER, "features": FEATURES}))
    assert (features.layout, features.side) == ("CLAM", None)
    tiles = merged([coords, features])
    assert (tiles.path, tiles.side, tiles.size) == (tmp_path / "b.h5", 512.0, (4001, 3001))
    np.testing.assert_array_equal(tiles.corner, CORNER)
    np.testing.assert_array_equal(tiles.features, FEATURES)
    assert set(tiles.sources) == {"a.h5", "b.h5"}


def test_clam_at_level_0_states_no_downsample(write_h5: Write, tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.h5", {"coords": CORNER}, coords={"patch_size": 512, "patch_level": 0})
    assert read_third_party(path).side == 512.0


def test_trident_gives_the_side_by_patch_size_level0_and_the_encoder(write_h5: Write, tmp_path: Path) -> None:
    path = write_h5(
        tmp_path / "a.h5",
        {"coords": CORNER, "features": FEATURES.astype(np.float16)[None]},
        coords=TRIDENT | {"overlap": 64},
        features={"encoder": "uni_v1"},
    )
    tiles = read_third_party(path)
    assert (tiles.layout, tiles.side, tiles.tile_px, tiles.overlap_px) == ("TRIDENT", 512.0, 256, 64)
    assert (tiles.power, tiles.size, tiles.encoder, tiles.mpp) == (40.0, (4000, 3000), "uni_v1", None)
    np.testing.assert_array_equal(tiles.features, FEATURES.astype(np.float16))  # of a batch of one
    assert tiles.features is not None
    assert tiles.features.dtype == np.float16


@pytest.mark.parametrize(
    ("about", "corner", "um", "tile_px"),
    [
        (
            {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 512, "stamp_version": "2.3"},
            (256, 128),
            (256, 128),
            512,
        ),
        ({"unit": "um", "tile_size": 256.0}, (256, 128), (256, 128), 224),
        ({"tile_size": 224}, (224, 112), (256, 128), 224),
        ({}, (224, 448), (256, 512), 224),  # recognised by its step
    ],
)
def test_stamps_ages_give_micrometres(
    about: dict, corner: tuple, um: tuple, tile_px: int, write_h5: Write, tmp_path: Path
) -> None:
    coords = np.array([(0, 0), corner], np.float32)
    path = write_h5(tmp_path / "a.h5", {"coords": coords, "feats": FEATURES[:2]}, {"extractor": "ctranspath"} | about)
    tiles = read_third_party(path)
    assert (tiles.layout, tiles.unit, tiles.side, tiles.tile_px) == ("STAMP", "um", 256.0, tile_px)
    np.testing.assert_allclose(tiles.corner, [(0, 0), um])
    assert tiles.encoder == "ctranspath"


def test_features_of_histobistro_state_no_side(write_h5: Write, tmp_path: Path) -> None:
    tiles = read_third_party(write_h5(tmp_path / "a.h5", {"coords": CORNER, "feats": FEATURES}))
    assert (tiles.layout, tiles.unit, tiles.side) == ("HistoBistro", "px", None)


@pytest.mark.parametrize(
    ("datasets", "attributes", "status", "words"),
    [
        ({"features": FEATURES}, {}, "unsupported", "no coordinates of tiles (it has features); import the file"),
        ({"coords": CORNER}, {}, "unsupported", "unknown layout (it has coords, with no attributes)"),
        ({"coords": np.zeros((3, 5), int), "features": FEATURES}, {}, "unsupported", "coords of shape (3, 5)"),
        ({"coords": CORNER[:0], "features": FEATURES[:0]}, {}, "no_tissue", "has no tiles"),
        ({"coords": CORNER * np.nan, "feats": FEATURES}, {}, "corrupt", "not finite"),
        ({"coords": CORNER, "features": FEATURES[:2]}, {}, "corrupt", "has 2 rows of features and 3 coordinates"),
        ({"coords": CORNER, "features": FEATURES * np.nan}, {}, "corrupt", "features of tile 0 are not finite"),
        (
            {"coords": CORNER, "features": FEATURES[0]},
            {},
            "unsupported",
            "give the features of tiles, not of the slide",
        ),
        ({"coords": CORNER}, TRIDENT | {"patch_size_level0": -1}, "corrupt", "attributes are damaged"),
        ({"coords": CORNER}, CLAM | {"patch_size": "x"}, "corrupt", "attributes are damaged"),
        ({"coords": CORNER, "feats": FEATURES}, {"unit": "mm"}, "corrupt", "unit 'mm'"),
    ],
)
def test_other_and_damaged_files_are_named_with_a_remedy(
    datasets: dict, attributes: dict, status: str, words: str, write_h5: Write, tmp_path: Path
) -> None:
    path = write_h5(tmp_path / "a.h5", datasets, coords=attributes)
    with pytest.raises(SlideError) as caught:
        read_third_party(path)
    assert caught.value.status == status
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_hdf5_or_are_damaged_never_pass(write_h5: Write, tmp_path: Path) -> None:
    datasets = {"coords": CORNER, "features": FEATURES}
    whole = write_h5(tmp_path / "a.h5", datasets, coords=TRIDENT).read_bytes()
    rng, path, refused = np.random.default_rng(0), tmp_path / "damaged.h5", 0
    damaged = [b"", b"PK\3\4", whole[: len(whole) // 2]]
    for at in rng.integers(0, len(whole), 200).tolist():
        damaged.append(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        try:
            read_third_party(path)
        except SlideError as error:
            refused += str(path) in str(error)
    assert refused > 20
    with pytest.raises(SlideError, match="no such file"):
        read_third_party(tmp_path / "absent.h5")


def test_files_of_one_slide_must_be_of_the_same_tiles_and_one_encoder(write_h5: Write, tmp_path: Path) -> None:
    one, other = (
        read_third_party(write_h5(tmp_path / name, {"coords": CORNER, "features": FEATURES}, coords=TRIDENT))
        for name in ("one.h5", "other.h5")
    )
    with pytest.raises(SlideError, match=r"one\.h5 has features of it too; import one encoder's folder at a time"):
        merged([one, other])
    elsewhere = read_third_party(write_h5(tmp_path / "a.h5", {"coords": CORNER + 1}, coords=CLAM))
    with pytest.raises(SlideError, match="has other tiles than"):
        merged([one, elsewhere])


def test_files_go_by_the_slides_of_their_names(write_h5: Write, tmp_path: Path) -> None:
    job = tmp_path / "20x_256px_0px_overlap"
    patches = write_h5(job / "patches" / "a_patches.h5", {"coords": CORNER})
    features = write_h5(job / "features_uni_v1" / "a.h5", {"coords": CORNER})
    (job / "patches" / "notes.txt").touch()
    assert third_party_files([job, patches]) == {"a": [features, patches]}
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"empty: no HDF5 files"):
        third_party_files([empty])


def test_folders_are_searched_through_links_without_hidden_files_or_doubles(write_h5: Write, tmp_path: Path) -> None:
    job, elsewhere = tmp_path / "job", tmp_path / "elsewhere"
    a = write_h5(job / "A.H5", {"coords": CORNER})
    write_h5(elsewhere / "b.h5", {"coords": CORNER})
    (job / "linked").symlink_to(elsewhere)
    (job / "again.h5").symlink_to(a)
    (elsewhere / "up").symlink_to(job)
    (job / "folder.h5").mkdir()
    (job / "._A.h5").write_bytes(b"written by a Mac")
    (job / ".trash").mkdir()
    (job / ".trash" / "c.h5").touch()
    (job / "gone.h5").symlink_to("nowhere.h5")
    assert third_party_files([job]) == {"A": [a], "gone": [job / "gone.h5"], "b": [job / "linked" / "b.h5"]}
    with pytest.raises(SlideError, match="no such file"):
        read_third_party(job / "gone.h5")
