import shutil
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError, OutputError
from crcjax.slides.store.features import FeatureReader, feature_attributes, feature_names, read_features, write_features
from crcjax.slides.store.tile_store import open_store, tiled_slides
from crcjax.slides.store.zarr_arrays import open_array

ABOUT = {"encoder": "a", "weights_sha256": "0", "mpp": [0.5], "dtype": "float32"}


@pytest.fixture
def slide(painted: Path, tmp_path: Path) -> tuple[Path, str, np.ndarray]:
    """A store of one slide to write to, the slide, and features for it."""
    name = tiled_slides(painted / "store")[0]
    shutil.copytree(painted / "store" / f"{name}.zarr", tmp_path / f"{name}.zarr")
    shape = open_store(tmp_path, name).mask.shape
    return tmp_path, name, np.random.default_rng(0).normal(size=(*shape, 8)).astype(np.float16)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_written_is_read_with_zeros_where_there_is_no_tile(slide: tuple, dtype: type) -> None:
    store, name, features = slide
    opened = open_store(store, name)
    opened.mask[0, 0] = False
    write_features(store, name, "a", features.astype(dtype), ABOUT)
    found = read_features(store, name, "a")
    mask = open_store(store, name).mask
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.where(mask[..., None], features, 0))
    assert feature_attributes(store, name, "a") == ABOUT
    assert feature_names(store, name) == ["a"]
    assert open_store(store, name).read_pixels([0]).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_features_that_are_not_finite_are_named_when_they_are_read(slide: tuple, dtype: type, value: float) -> None:
    store, name, features = slide
    features = features.astype(dtype)
    features[0], features[1, 0, 0], features[2, 0, 3] = 0, -np.finfo(dtype).max, value
    write_features(store, name, "a", features, ABOUT)
    reader = FeatureReader(store, name, "a")
    for out in (None, np.empty_like(features[:2])):
        np.testing.assert_array_equal(reader.read([0, 1], out), features[:2])
        with pytest.raises(InputError, match=rf"{name}.*not finite; delete it"):
            reader.read([1, 2], out)
    assert out is not None
    np.testing.assert_array_equal(out, features[1:3])


def test_little_is_read_of_a_slides_features_beside_the_regions_asked_for(slide: tuple) -> None:
    store, name, features = slide
    wide = np.repeat(features, 256, axis=-1)
    write_features(store, name, "a", wide, ABOUT)
    array = open_array(store / f"{name}.zarr" / "features" / "a")
    assert len(wide) > array.chunk_layout.read_chunk.shape[0] == 2  # regions, of 4 KiB each


def test_writing_again_replaces_the_whole(slide: tuple) -> None:
    store, name, features = slide
    write_features(store, name, "a", features, ABOUT)
    write_features(store, name, "b", features, ABOUT)
    write_features(store, name, "a", 2 * features[..., :3], ABOUT | {"dtype": "bfloat16"})
    assert read_features(store, name, "a").shape[-1] == 3
    assert feature_attributes(store, name, "a")["dtype"] == "bfloat16"
    assert feature_names(store, name) == ["a", "b"]
    assert len(list((store / f"{name}.zarr" / "features").glob(".*"))) == 0


@pytest.mark.parametrize("deadly", [1, 2])
def test_a_kill_at_any_step_leaves_the_old_features_or_the_new(
    slide: tuple, deadly: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name, features = slide
    write_features(store, name, "a", features, ABOUT)
    old, new = read_features(store, name, "a"), read_features(store, name, "a") + 1
    rename, calls = Path.rename, []

    class Killed(BaseException):
        pass

    def dying(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == deadly:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(Killed):
        write_features(store, name, "a", new, ABOUT)
    assert feature_names(store, name) == ["a"]
    np.testing.assert_array_equal(read_features(store, name, "a"), old)
    monkeypatch.undo()
    write_features(store, name, "a", new, ABOUT)
    assert read_features(store, name, "a").max() > old.max()


def test_what_is_absent_damaged_or_of_another_shape_is_named(slide: tuple) -> None:
    store, name, features = slide
    assert feature_attributes(store, name, "a") is None
    with pytest.raises(InputError, match=r"features/a: no such features \(there are none\); run crcjax embed"):
        read_features(store, name, "a")
    with pytest.raises(InputError, match="regions and slots, the slide has"):
        write_features(store, name, "a", features[:-1], ABOUT)
    with pytest.raises(InputError, match="can be a folder's"):
        write_features(store, name, "../a", features, ABOUT)
    write_features(store, name, "a", features, ABOUT)
    shard = next(path for path in (store / f"{name}.zarr" / "features" / "a").rglob("*") if path.name == "0")
    while shard.is_dir():
        shard = next(shard.iterdir())
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(InputError, match=r"features/a: damaged"):
        read_features(store, name, "a")


def test_a_full_disk_leaves_what_there_was(slide: tuple, small_disk: Path) -> None:
    store, name, features = slide
    shutil.copytree(store / f"{name}.zarr", small_disk / f"{name}.zarr")
    write_features(small_disk, name, "a", features, ABOUT)
    old = read_features(small_disk, name, "a")
    wide = np.random.default_rng(0).normal(size=(*features.shape[:2], 1 << 16)).astype(np.float32)
    with pytest.raises(OutputError, match="cannot be written"):
        write_features(small_disk, name, "a", wide, ABOUT)
    np.testing.assert_array_equal(read_features(small_disk, name, "a"), old)
