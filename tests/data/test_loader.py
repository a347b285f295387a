import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crcjax.data.bags import open_stores
from crcjax.data.cohort import Cohort, load_cohort
from crcjax.data.loader import train_batches
from crcjax.errors import InputError
from crcjax.slides.executor import TileJob, tile_slides
from crcjax.slides.store import open_store
from crcjax.slides.tiling import TilingParams
from crcjax.train.mesh import device_mesh


def _cohort(painted: Path, config) -> Cohort:
    return load_cohort(painted / "cohort.csv", config.data.classes)


def test_batches_hold_the_stores_pixels_masks_and_labels(painted: Path, small_config) -> None:
    cohort = _cohort(painted, small_config).split("train")
    bag = next(train_batches(cohort, small_config, device_mesh(), 0))
    assert bag.tiles.shape == (4, 4, 1, 64, 64, 3)
    stored = {row.slide_id: open_store(painted / "store", row.slide_id) for row in cohort.rows}
    for pixels, label in zip(np.asarray(bag.tiles), np.asarray(bag.label), strict=True):
        found = [
            row.subtype
            for row in cohort.rows
            for tile in stored[row.slide_id].read_pixels(range(len(stored[row.slide_id].mask)))
            if (tile == pixels[0]).all()
        ]
        assert found == [cohort.classes[label]]


def test_a_resumed_stream_goes_on_as_the_first_one_whatever_the_threads(painted: Path, small_config) -> None:
    cohort = _cohort(painted, small_config).split("train")
    whole = [np.asarray(bag.tiles) for bag in train_batches(cohort, small_config, device_mesh(), 0)]
    small_config.data.read_threads, small_config.data.prefetch = 1, 1
    rest = [np.asarray(bag.tiles) for bag in train_batches(cohort, small_config, device_mesh(), 2)]
    assert len(whole) == 6
    assert all((a == b).all() for a, b in zip(whole[2:], rest, strict=True))


def test_slides_that_are_not_in_the_store_are_listed_with_the_remedy(painted: Path, small_config) -> None:
    cohort = _cohort(painted, small_config)
    absent = replace(cohort, rows=(*cohort.rows, replace(cohort.rows[0], slide_id="absent")))
    with pytest.raises(InputError, match=r"1 of 22 slides .*\(absent\); run crcjax tile"):
        open_stores(small_config.data.store, absent)
    with pytest.raises(InputError, match="no training slides"):
        next(train_batches(replace(cohort, rows=()), small_config, device_mesh(), 0))


def test_a_store_without_pixels_gives_the_same_batches_from_the_slides(
    painted: Path, small_config, tmp_path: Path
) -> None:
    cohort = _cohort(painted, small_config).split("val")
    jobs = [TileJob(row.slide_id, row.path) for row in cohort.rows]
    batches = []
    for pixels in ("none", "lossless"):
        tile_slides(jobs, tmp_path / pixels, TilingParams(("10x",), tile_px=64), pixels=pixels)
        small_config.data.store = str(tmp_path / pixels)
        batches.append(np.asarray(next(train_batches(cohort, small_config, device_mesh(), 0)).tiles))
    np.testing.assert_array_equal(*batches)


def test_a_slide_that_moved_away_from_a_store_without_pixels_is_named_before_anything_is_read(
    painted: Path, small_config, tmp_path: Path
) -> None:
    cohort = _cohort(painted, small_config).split("val")
    path = Path(shutil.copy(cohort.rows[0].path, tmp_path))
    tile_slides([TileJob(cohort.rows[0].slide_id, path)], tmp_path, TilingParams(("10x",), tile_px=64), pixels="none")
    path.unlink()
    with pytest.raises(InputError, match=rf"keeps no pixels, and its slide {path} is not there; put it back"):
        open_stores(str(tmp_path), replace(cohort, rows=cohort.rows[:1]))


def test_slides_tiled_in_two_ways_are_refused(painted: Path, small_config, tmp_path: Path) -> None:
    cohort = _cohort(painted, small_config).split("val")
    store = shutil.copytree(painted / "store", tmp_path / "store")
    other = cohort.rows[-1]
    tile_slides([TileJob(other.slide_id, other.path)], tmp_path / "other", TilingParams(("10x",), tile_px=32))
    shutil.rmtree(store / f"{other.slide_id}.zarr")
    shutil.move(tmp_path / "other" / f"{other.slide_id}.zarr", store)
    with pytest.raises(InputError, match=rf"{other.slide_id}\.zarr: tiled in another way than"):
        open_stores(str(store), cohort)


def test_a_damaged_shard_is_one_error_that_names_the_slide(painted: Path, small_config, tmp_path: Path) -> None:
    store = shutil.copytree(painted / "store", tmp_path / "store")
    for shard in store.glob("*/pixels/streams/c/*"):
        if shard.is_file():
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 1
            shard.write_bytes(data)
    small_config.data.store = str(store)
    small_config.data.regions = 64  # all of a slide's regions, the damaged one with them
    with pytest.raises(InputError, match=r"\.zarr: damaged .*crcjax tile again"):
        list(train_batches(_cohort(painted, small_config).split("train"), small_config, device_mesh(), 0))
