"""Deep Zoom tiles of real slide files, against the slide's own pixels."""

import gc
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import tifffile

from crcjax.encryption.frames import DecryptionError
from crcjax.encryption.keys import create_key, open_keys
from crcjax.serve.slide_records import SlideRecord
from crcjax.serve.slide_tiles import NoSuchTileError, SlideTiles, SlideUnreadableError
from crcjax.serve.vault import KEYS, Vault
from crcjax.slides.wsi.discovery import content_hash
from crcjax.slides.wsi.slide import open_slide


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path / KEYS)


def _record(file: Path, **changes) -> SlideRecord:
    known = {"id": "1", "site": "leeds", "owner": "o", "case_id": "A", "name": file.name, "path": file, "bytes": 1}
    return SlideRecord(**{**known, "content": content_hash(file), "mpp": None, "added_s": time.time(), **changes})


def _mosaic(tiles: SlideTiles, record: SlideRecord, level: int) -> np.ndarray:
    """All tiles of a level, put together."""
    image = tiles.image(record)
    width, height = image.level_size(level)
    pixels = np.zeros((height, width, 3), np.uint8)
    for row in range(-(-height // image.tile_px)):
        for column in range(-(-width // image.tile_px)):
            left, top, tile_width, tile_height = image.tile_box(level, column, row)
            decoded = simplejpeg.decode_jpeg(tiles.tile(record, level, column, row))
            assert decoded.shape == (tile_height, tile_width, 3)
            pixels[top : top + tile_height, left : left + tile_width] = decoded
    return pixels


def test_tiles_of_every_level_make_up_the_slide(vault: Vault, marked_slide: Path) -> None:
    record, tiles = _record(marked_slide), SlideTiles(vault)
    image = tiles.image(record)
    assert (image.width, image.height, image.tile_px, image.max_level, image.mpp) == (2100, 1500, 256, 12, 0.5)
    with open_slide(marked_slide) as slide:
        whole = slide.read(0, 0, 2100, 1500)
    for level in (12, 11, 10, 9, 6, 0):
        mosaic = _mosaic(tiles, record, level)
        expected = cv2.resize(whole, mosaic.shape[1::-1], interpolation=cv2.INTER_AREA)
        # Edges within the picture are those of JPEG and of area means that begin at other pixels.
        difference = np.abs(mosaic.astype(int) - expected)
        assert np.median(difference) <= 2, level
        assert (difference.max(axis=-1) > 40).mean() < 0.02, level


def test_native_tiles_are_passed_through_and_others_are_not(vault: Vault, marked_slide: Path) -> None:
    record, tiles = _record(marked_slide), SlideTiles(vault)
    with open_slide(marked_slide) as slide:
        for level, source in ((12, 0), (11, 1), (10, 2)):
            assert tiles.tile(record, level, 1, 0) == slide.jpeg_stream(source, 256, 0, 256)
    # A tile at the right edge is cut, as Deep Zoom asks.
    assert simplejpeg.decode_jpeg_header(tiles.tile(record, 12, 8, 0))[:2] == (256, 2100 - 8 * 256)


def test_a_slide_without_a_pyramid_is_read_in_parts(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 40, 3), np.uint8)
    pixels = cv2.resize(pixels, (1600, 2400), interpolation=cv2.INTER_CUBIC)
    path = tmp_path / "flat.tiff"
    tifffile.imwrite(
        path, pixels, tile=(128, 128), photometric="rgb", resolution=(20_000, 20_000), resolutionunit="CENTIMETER"
    )
    record = _record(path)
    whole = _mosaic(SlideTiles(vault), record, 8)
    monkeypatch.setattr("crcjax.serve.slide_tiles._MAX_SOURCE_PX", 100_000)
    tiles = SlideTiles(vault)
    assert tiles.image(record).tile_px == 512
    assert np.abs(_mosaic(tiles, record, 8).astype(int) - whole).mean() < 2


def test_a_square_is_the_slides_pixels_there(vault: Vault, marked_slide: Path) -> None:
    record, tiles = _record(marked_slide), SlideTiles(vault)
    inside = simplejpeg.decode_jpeg(tiles.square(record, 1010, 710, 80, 64))
    assert inside.shape == (64, 64, 3)
    assert inside.max() < 30
    around = simplejpeg.decode_jpeg(tiles.square(record, 900, 600, 300, 30))
    assert (around[13:17, 13:17].max() < 60, around[2:8, 2:8].min() > 180) == (True, True)
    assert simplejpeg.decode_jpeg_header(tiles.thumbnail(record, 210))[:2] == (150, 210)
    for x, y, side in ((2100, 0, 10), (-10, 0, 10), (0, 1500, 10)):
        with pytest.raises(NoSuchTileError):
            tiles.square(record, x, y, side, 64)


def test_what_is_not_there_or_cannot_be_read_is_said_without_a_path(
    vault: Vault, marked_slide: Path, tmp_path: Path
) -> None:
    record, tiles = _record(marked_slide), SlideTiles(vault)
    for level, column, row in ((13, 0, 0), (12, 9, 0), (12, 0, 6), (0, 1, 0)):
        with pytest.raises(NoSuchTileError):
            tiles.tile(record, level, column, row)
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"II*\0" + bytes(1000))
    with pytest.raises(SlideUnreadableError, match=r"broken\.svs: a TIFF that OpenSlide cannot open") as caught:
        tiles.tile(_record(broken), 0, 0, 0)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(SlideUnreadableError, match="has changed since it was added"):
        tiles.image(_record(marked_slide, content="0" * 64))
    gone = _record(marked_slide, path=tmp_path / "gone.svs")
    with pytest.raises(SlideUnreadableError):
        SlideTiles(vault).image(gone)


def test_open_slides_and_tiles_in_memory_are_bounded(
    vault: Vault, marked_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crcjax.serve.slide_tiles._MAX_CACHED_BYTES", 20_000)
    record, tiles = _record(marked_slide), SlideTiles(vault)
    _mosaic(tiles, record, 12)
    cached = [tiles.cached_tile(record, 12, column, row) for row in range(6) for column in range(9)]
    sizes = [len(tile) for tile in cached if tile]
    assert 0 < sum(sizes) <= 20_000
    assert cached[-1] is not None, "the newest tile is the last to go"


def test_an_encrypted_slide_is_decrypted_into_memory_for_as_long_as_it_is_open(
    vault: Vault, marked_slide: Path, tmp_path: Path
) -> None:
    create_key(tmp_path / "site.key")
    encrypting = Vault(tmp_path / "encrypting.db", open_keys(f"file:{tmp_path / 'site.key'}"))
    path = tmp_path / "slide.tiff"
    with encrypting.writer(path, "slide", "leeds", "leeds/case/p") as writer:
        writer.write(marked_slide.read_bytes())
        writer.finish()
    record, plain = _record(path, content=content_hash(marked_slide)), _record(marked_slide)
    before, tiles = set(_memory_folders()), SlideTiles(encrypting)
    assert tiles.tile(record, 12, 1, 0) == SlideTiles(vault).tile(plain, 12, 1, 0)
    assert len(set(_memory_folders()) - before) == 1
    del tiles
    gc.collect()
    assert set(_memory_folders()) <= before
    with pytest.raises(DecryptionError, match="another object"):
        SlideTiles(encrypting).tile(_record(path, content=record.content, site="york"), 12, 1, 0)


def _memory_folders() -> list[Path]:
    return list(Path("/dev/shm").glob(f"crcjax-{os.getpid()}-*"))
