import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from crcjax.errors import BusyError, InputError, OutputError
from crcjax.slides.store.locks import file_lock, slide_lock
from crcjax.slides.store.tile_pixels import shard_regions
from crcjax.slides.store.tile_store import StoreWriter, open_store, remove_partials, tiled_slides
from crcjax.slides.tiling.plan import TilingParams, plan_tiles
from crcjax.slides.tiling.quality_control import QUALITY_NAMES, REASONS
from crcjax.slides.tiling.read import RegionTiles, read_regions
from crcjax.slides.wsi.slide import open_slide

PARAMS = TilingParams(("10x", "20x"), tile_px=32)


def _write(store: Path, slide_path: Path, params: TilingParams = PARAMS, pixels: str = "lossless") -> RegionTiles:
    with open_slide(slide_path) as slide:
        plan = plan_tiles(slide, params)
        with StoreWriter(store, "a", slide, plan, pixels) as writer:
            for start in range(0, len(plan.origin), shard_regions(params)):
                stop = min(start + shard_regions(params), len(plan.origin))
                writer.write(start, read_regions(slide, plan, start, stop, writer.pack))
            writer.commit()
        return read_regions(slide, plan, 0, len(plan.origin))


@pytest.fixture(scope="module")
def written(small_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RegionTiles]:
    folder = tmp_path_factory.mktemp("store")
    return folder, _write(folder, small_slide)


@pytest.fixture
def store(written: tuple[Path, RegionTiles], tmp_path: Path) -> Path:
    """A copy to damage."""
    subprocess.run(["cp", "-r", str(written[0]), str(tmp_path / "store")], check=True)
    return tmp_path / "store"


def test_what_is_written_is_what_is_read(written: tuple[Path, RegionTiles], small_slide: Path) -> None:
    folder, tiles = written
    store = open_store(folder, "a")
    assert tiled_slides(folder) == [store.slide_id] == ["a"]
    assert len(store.origin) > 2 * shard_regions(PARAMS)
    np.testing.assert_array_equal(store.read_pixels(range(len(store.origin))), tiles.pixels)
    np.testing.assert_array_equal(store.mask, tiles.mask)
    np.testing.assert_array_equal(store.quality, tiles.quality)
    np.testing.assert_array_equal(store.reason, tiles.reason)
    with open_slide(small_slide) as slide:
        assert store.info == slide.info
        np.testing.assert_array_equal(store.origin, plan_tiles(slide, PARAMS).origin)
    assert store.params == PARAMS
    assert store.pixels == "lossless"
    assert store.region_px == 64
    assert store.attributes["quality"] == list(QUALITY_NAMES)


def test_regions_are_read_in_any_order(written: tuple[Path, RegionTiles]) -> None:
    store = open_store(written[0], "a")
    chosen = [5, 0, len(store.origin) - 1, 5]
    np.testing.assert_array_equal(store.read_pixels(chosen), written[1].pixels[chosen])
    assert store.read_pixels([]).shape == (0, 5, 32, 32, 3)


def test_a_store_is_a_zarr_v3_hierarchy_of_a_few_checked_files(written: tuple[Path, RegionTiles]) -> None:
    group = written[0] / "a.zarr"
    for name in (".", "pixels"):
        document = json.loads((group / name / "zarr.json").read_text())
        assert (document["zarr_format"], document["node_type"]) == (3, "group")
    for name in ("origin", "mask", "quality", "pixels/10x", "pixels/20x"):
        document = json.loads((group / name / "zarr.json").read_text())
        assert document["node_type"] == "array"
        sharding = document["codecs"][0]["configuration"]
        assert [codec["name"] for codec in sharding["codecs"]] == ["bytes", "zstd", "crc32c"]
        assert [codec["name"] for codec in sharding["index_codecs"]] == ["bytes", "crc32c"]
    spec = {"driver": "zarr3", "kvstore": f"file://{group}/pixels/20x/"}
    assert ts.open(spec, open=True).result().shape[1:] == (4, 32, 32, 3)


def test_the_same_slide_gives_the_same_bytes(
    written: tuple[Path, RegionTiles], small_slide: Path, tmp_path: Path
) -> None:
    _write(tmp_path, small_slide)
    assert _contents(tmp_path / "a.zarr") == _contents(written[0] / "a.zarr")


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rejected_tiles_are_counted_by_reason(written: tuple[Path, RegionTiles]) -> None:
    store = open_store(written[0], "a")
    assert set(store.attributes["rejected"]) < set(REASONS)
    grid = 24 * 21 * 5  # regions of 64 px over 1500 x 1300 px
    assert sum(store.attributes["rejected"].values()) + store.mask.sum() == grid


def _shards(store: Path, array: str) -> list[Path]:
    return sorted(path for path in (store / "a.zarr" / array / "c").rglob("*") if path.is_file())


def _read_all(store: Path) -> np.ndarray:
    opened = open_store(store, "a")
    return opened.read_pixels(range(len(opened.origin)))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("array", ["pixels/20x", "pixels/10x", "mask", "origin", "quality"])
@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink])
def test_a_damaged_or_lost_file_is_an_error_that_names_it(array: str, damage, store: Path) -> None:
    damage(_shards(store, array)[0])
    with pytest.raises(InputError, match=rf"a\.zarr: damaged .*{array}.*run crcjax tile again"):
        _read_all(store)


@pytest.mark.parametrize("content", ["", "{", '{"attributes": {"format_version": 1}}'])
def test_a_damaged_group_is_an_error(content: str, store: Path) -> None:
    (store / "a.zarr" / "zarr.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.zarr: damaged"):
        open_store(store, "a")


def test_another_format_version_and_an_absent_slide_are_named(store: Path) -> None:
    with pytest.raises(InputError, match=r"b\.zarr: not in the store"):
        open_store(store, "b")
    path = store / "a.zarr" / "zarr.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(InputError, match="has store format 99, this crcjax reads 1"):
        open_store(store, "a")


def test_a_writer_that_is_left_early_leaves_nothing(small_slide: Path, tmp_path: Path) -> None:
    def write_half() -> None:
        with open_slide(small_slide) as slide:
            plan = plan_tiles(slide, PARAMS)
            with StoreWriter(tmp_path, "a", slide, plan, "jpeg") as writer:
                writer.write(0, read_regions(slide, plan, 0, shard_regions(PARAMS), writer.pack))
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert tiled_slides(tmp_path) == []
    assert list((tmp_path / ".partial").iterdir()) == []


def test_a_second_writing_replaces_the_first(store: Path, small_slide: Path) -> None:
    before = _contents(store / "a.zarr")
    (store / "a.zarr" / "left-over").touch()
    _write(store, small_slide)
    assert _contents(store / "a.zarr") == before


def test_only_what_dead_writers_left_is_removed(small_slide: Path, tmp_path: Path) -> None:
    (tmp_path / ".partial" / "b.zarr").mkdir(parents=True)
    with open_slide(small_slide) as slide:
        plan = plan_tiles(slide, PARAMS)
        with StoreWriter(tmp_path, "a", slide, plan, "jpeg"):
            code = (
                "import sys, pathlib, crcjax.slides.store.tile_store as s; s.remove_partials(pathlib.Path(sys.argv[1]))"
            )
            subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
            remove_partials(tmp_path)
            assert sorted(path.name for path in (tmp_path / ".partial").iterdir()) == ["a.lock", "a.zarr"]


def test_of_several_processes_only_one_holds_a_lock_though_its_file_comes_and_goes(tmp_path: Path) -> None:
    code = """
import pathlib, sys
from crcjax.slides.store.locks import file_lock
folder = pathlib.Path(sys.argv[1])
for _ in range(300):
    with file_lock(folder / "locks" / "a.lock"):
        count = int((folder / "count").read_text())
        (folder / "count").write_text(str(count + 1))
"""
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", code, str(tmp_path)]
    for running in [subprocess.Popen(command) for _ in range(4)]:
        assert running.wait(timeout=60) == 0
    assert (tmp_path / "count").read_text() == "1200"


def test_a_lock_file_that_was_removed_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, attempts = tmp_path / "locks" / "a.lock", []

    def lock(descriptor: int, flags: int) -> None:
        attempts.append(flags)
        # The process that has the lock releases it at this moment, on a local disk and on NFS.
        if len(attempts) == 1:
            path.unlink()
        if len(attempts) == 2:
            path.rename(path.with_name(".nfs1"))
        if len(attempts) == 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        flock(descriptor, flags)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lock)
    with file_lock(path, "busy"):
        assert len(attempts) == 4
        assert path.exists()
    assert not path.exists()


def test_a_slide_that_another_writes_is_busy_and_then_free(small_slide: Path, tmp_path: Path) -> None:
    with open_slide(small_slide) as slide:
        plan = plan_tiles(slide, PARAMS)
        with slide_lock(tmp_path, "a"), pytest.raises(BusyError, match="another process writes the slide a"):
            StoreWriter(tmp_path, "a", slide, plan, "none").__enter__()
        with StoreWriter(tmp_path, "a", slide, plan, "none"):
            pass


@pytest.mark.parametrize(("free", "pixels"), [(0, "none"), (20_000, "jpeg"), (300_000, "jpeg"), (500_000, "lossless")])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    free: int, pixels: str, small_slide: Path, small_disk: Path
) -> None:
    (small_disk / "filling").write_bytes(bytes((4 << 20) - 8192 - free))
    with pytest.raises(OutputError, match=r"small_disk: cannot be written .*No space left on device"):
        _write(small_disk, small_slide, pixels=pixels)
    assert tiled_slides(small_disk) == []
    assert not list(small_disk.glob(".partial/*"))


def test_a_store_that_cannot_be_written_is_one_clear_error(small_slide: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another --out"):
        remove_partials(tmp_path / "file")
    with pytest.raises(OutputError, match="choose another --out"):
        _write(tmp_path / "file", small_slide)
