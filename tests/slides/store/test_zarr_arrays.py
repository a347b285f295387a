"""Paths of stores in every form, and errors that call data damaged only if they are."""

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.slides.store.features import feature_names, read_features, write_features
from crcjax.slides.store.tile_store import StoreWriter, open_store, tiled_slides
from crcjax.slides.store.zarr_arrays import UnreadableError, open_array, unreadable
from crcjax.slides.tiling.plan import TilingParams, plan_tiles
from crcjax.slides.tiling.read import read_regions
from crcjax.slides.wsi.slide import open_slide


def _tile(store: Path, slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        plan = plan_tiles(slide, TilingParams(("10x",), tile_px=64))
        with StoreWriter(store, "a", slide, plan, "jpeg") as writer:
            writer.write(0, read_regions(slide, plan, 0, len(plan.origin), writer.pack))
            writer.commit()


@pytest.mark.parametrize("name", ["../store", "~/store", "~/../home/store", "./below/../../store", "link/../store"])
def test_a_store_may_be_named_by_any_path(
    name: str, small_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("home/below", "elsewhere/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "home" / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    _tile(Path(name), small_slide)
    where = {"link/../store": "elsewhere/store", "~/store": "home/store", "~/../home/store": "home/store"}
    assert tiled_slides(tmp_path / where.get(name, "store")) == tiled_slides(name) == ["a"]
    store = open_store(name, "a")
    assert store.read_pixels([0]).any()
    features = np.ones((*store.mask.shape, 4), np.float32)
    write_features(name, "a", "uni", features, {"encoder": "uni"})
    assert feature_names(name, "a") == ["uni"]
    assert read_features(name, "a", "uni").any()


def test_data_that_the_file_system_does_not_give_are_not_called_damaged(small_slide: Path, tmp_path: Path) -> None:
    _tile(tmp_path, small_slide)
    path = tmp_path / "a.zarr"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(ValueError, match="Too many open files") as caught:
            open_array(path / "mask")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for error in (caught.value, PermissionError(errno.EACCES, os.strerror(errno.EACCES))):
        shown = unreadable(path, error, "delete it")
        assert isinstance(shown, UnreadableError)
        assert "cannot be read" in str(shown)
        assert "delete" not in str(shown)
    damaged = unreadable(path, ValueError("DATA_LOSS: Digest mismatch"), "delete it")
    assert type(damaged) is InputError
    assert str(damaged) == f"{path}: damaged (DATA_LOSS: Digest mismatch); delete it"
