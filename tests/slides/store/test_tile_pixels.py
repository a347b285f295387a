import io
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import tensorstore as ts
from PIL import Image

from crcjax.errors import InputError
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store import tile_pixels as pixels
from crcjax.slides.store.tile_pixels import MODES, check_mode
from crcjax.slides.store.tile_store import TileStore, open_store
from crcjax.slides.tiling.plan import TilingParams, plan_tiles
from crcjax.slides.tiling.read import read_regions
from crcjax.slides.wsi.slide import open_slide

PARAMS = TilingParams(("10x", "20x"), tile_px=32)
OWN = TilingParams(("10x", "20x"), tile_px=240)  # as the slide's own tiles


def _tile(slide: Path, store: Path, mode: str, params: TilingParams = PARAMS, mpp: float | None = None) -> TileStore:
    (outcome,) = tile_slides([TileJob("a", slide, mpp)], store, params, workers=2, pixels=mode)
    assert outcome.status == "tiled", outcome
    return open_store(store, "a")


def _all(store: TileStore) -> np.ndarray:
    return store.read_pixels(range(len(store.origin)))


@pytest.fixture(scope="module")
def stores(small_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TileStore]:
    return {mode: _tile(small_slide, tmp_path_factory.mktemp(mode), mode) for mode in MODES}


def test_without_pixels_the_slide_gives_what_lossless_tiles_hold_bit_for_bit(stores: dict[str, TileStore]) -> None:
    np.testing.assert_array_equal(_all(stores["none"]), _all(stores["lossless"]))


@pytest.mark.parametrize(("scanned", "mag"), [(0.4, "10x,20x"), (0.5, "10x,20x,40x"), (0.25, "20x,40x")])
def test_so_it_is_at_other_scales(scanned: float, mag: str, tissue_picture, write_slide, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "a.svs", tissue_picture(2000, 1800), mpp=None)
    params = TilingParams(tuple(mag.split(",")), tile_px=96)
    kept = [_all(_tile(slide, tmp_path / mode, mode, params, mpp=scanned)) for mode in ("none", "lossless")]
    np.testing.assert_array_equal(*kept)


def test_lossless_tiles_are_the_pixels_that_were_judged(stores: dict[str, TileStore], small_slide: Path) -> None:
    with open_slide(small_slide) as slide:
        plan = plan_tiles(slide, PARAMS)
        tiles = read_regions(slide, plan, 0, len(plan.origin))
    np.testing.assert_array_equal(_all(stores["lossless"]), tiles.pixels)


def test_encoded_tiles_differ_from_lossless_ones_by_less_than_a_scanner_does(stores: dict[str, TileStore]) -> None:
    mask = stores["jpeg"].mask
    error = _all(stores["jpeg"])[mask].astype(float) - _all(stores["lossless"])[mask]
    assert 0 < np.abs(error).mean() < 3
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 0.1  # no colour is shifted
    assert 10 * np.log10(255**2 / (error**2).mean()) > 35


def test_so_do_coarse_tiles_that_are_made_of_the_slides_own_streams_at_half_size(
    small_slide: Path, tmp_path: Path
) -> None:
    jpeg, lossless = (_tile(small_slide, tmp_path / mode, mode, OWN) for mode in ("jpeg", "lossless"))
    assert jpeg.attributes["jpeg"]["own_streams"] == jpeg.mask[:, 1:].sum() > 0
    coarse = jpeg.mask[:, 0] & lossless.mask[:, 0]
    error = _all(jpeg)[coarse, 0].astype(float) - _all(lossless)[coarse, 0]
    assert coarse.sum() > 2
    assert 0 < np.abs(error).mean() < 3
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 0.3
    assert 10 * np.log10(255**2 / (error**2).mean()) > 35


@pytest.mark.parametrize("mode", MODES)
def test_masked_slots_are_zero_and_no_other(mode: str, stores: dict[str, TileStore]) -> None:
    store = stores[mode]
    assert not store.mask.all()
    tiles = store.read_pixels(range(len(store.mask)), np.full((*store.mask.shape, 32, 32, 3), 7, np.uint8))
    np.testing.assert_array_equal(tiles.any(axis=(2, 3, 4)), store.mask)


@pytest.mark.parametrize("mode", MODES)
def test_regions_are_read_in_any_order_by_any_number_of_threads(mode: str, stores: dict[str, TileStore]) -> None:
    store, whole = open_store(stores[mode].path.parent, "a"), _all(stores[mode])
    rng = np.random.default_rng(0)
    chosen = [rng.integers(0, len(whole), count) for count in rng.integers(0, 9, 40)]
    with ThreadPoolExecutor(8) as pool:
        for indices, read in zip(chosen, pool.map(store.read_pixels, chosen), strict=True):
            np.testing.assert_array_equal(read, whole[indices])
    assert store.read_pixels([]).shape == (0, 5, 32, 32, 3)


def test_where_the_grids_agree_the_slides_own_streams_decode_to_the_pixels_of_openslide(
    small_slide: Path, tmp_path: Path
) -> None:
    store = _tile(small_slide, tmp_path, "jpeg", OWN)
    fine = store.mask[:, 1:]
    assert store.attributes["jpeg"]["own_streams"] == fine.sum() > 5
    with openslide.OpenSlide(small_slide) as slide:
        for (x, y), region, mask in zip(store.origin, _all(store)[:, 1:], fine, strict=True):
            for slot in np.flatnonzero(mask):
                corner = int(x) + 240 * (slot % 2), int(y) + 240 * (slot // 2)
                expected = np.asarray(slide.read_region(corner, 0, (240, 240)))[..., :3]
                np.testing.assert_array_equal(region[slot], expected)


@pytest.mark.real_data
def test_so_do_those_of_a_real_slide(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "slides" / "aperio_cmu-1-small-region.svs"
    store = _tile(path, tmp_path, "jpeg", TilingParams(("20x",), tile_px=240))
    inside = (store.origin + 240 <= store.info.size).all(axis=1)
    assert store.attributes["jpeg"]["own_streams"] == (store.mask[:, 0] & inside).sum() > 20
    pixels = _all(store)[:, 0]
    with openslide.OpenSlide(path) as slide:
        for region in np.flatnonzero(store.mask[:, 0] & inside):
            expected = np.asarray(slide.read_region(store.origin[region].tolist(), 0, (240, 240)))[..., :3]
            np.testing.assert_array_equal(pixels[region], expected)


def test_the_entropy_coded_bytes_of_an_own_stream_are_those_of_the_file(small_slide: Path, tmp_path: Path) -> None:
    store, file = _tile(small_slide, tmp_path, "jpeg", OWN), small_slide.read_bytes()
    for region, slot in np.argwhere(store.mask[:, 1:]):
        stream = _stream(store, region, slot + 1)
        assert stream[stream.index(b"\xff\xda") :] in file


@pytest.mark.parametrize(
    "options",
    [
        {"photometric": "rgb", "subsampling": None},
        {"subsampling": (2, 1)},
        {"aperio": False},
        {"compressionargs": {"level": 60}},
    ],
)
def test_own_streams_are_right_for_every_colour_space(
    options: dict, tissue_picture, write_slide, tmp_path: Path
) -> None:
    slide = write_slide(tmp_path / "a.tif", tissue_picture(1000, 960), **options)
    params = TilingParams(("20x",), tile_px=240)
    jpeg, lossless = (_tile(slide, tmp_path / mode, mode, params) for mode in ("jpeg", "lossless"))
    assert jpeg.attributes["jpeg"]["own_streams"] == jpeg.mask.sum() > 0
    np.testing.assert_array_equal(_all(jpeg), _all(lossless))


@pytest.mark.parametrize(("tile_px", "mpp"), [(120, 0.5), (480, 0.5), (240, 0.4), (240, 0.25)])
def test_no_stream_is_copied_where_grid_or_scale_differ(
    tile_px: int, mpp: float, tissue_picture, write_slide, tmp_path: Path
) -> None:
    slide = write_slide(tmp_path / "a.svs", tissue_picture(2000, 1920), mpp=mpp)
    store = _tile(slide, tmp_path / "store", "jpeg", TilingParams(("20x",), tile_px))
    assert store.attributes["jpeg"] == {"quality": 90, "subsampling": "444", "own_streams": 0}
    assert _all(store)[store.mask].std() > 10


def test_a_tile_that_passes_the_slides_edge_is_encoded_with_white_there(
    tissue_picture, write_slide, tmp_path: Path
) -> None:
    slide = write_slide(tmp_path / "a.svs", tissue_picture(2000, 1900)[:, :1040])
    params = TilingParams(("20x",), 240)
    jpeg, lossless = (_tile(slide, tmp_path / mode, mode, params) for mode in ("jpeg", "lossless"))
    last = jpeg.origin.tolist().index([960, 720])
    assert (_all(lossless)[last, 0, :, 80:] == 255).all()
    assert _all(jpeg)[last, 0, :, 96:].min() > 250
    assert jpeg.attributes["jpeg"]["own_streams"] == (jpeg.origin[:, 0] < 960).sum()


def _stream(store: TileStore, region: int, slot: int) -> bytes:
    """As anyone reads it who knows zarr."""
    spec = {"driver": "zarr3", "kvstore": f"file://{store.path}/pixels/"}
    offset = ts.open(spec | {"kvstore": f"{spec['kvstore']}offset/"}).result().read().result()
    start, stop = offset[region * store.params.slots + slot :][:2]
    streams = ts.open(spec | {"kvstore": f"{spec['kvstore']}streams/"}).result()
    return streams[int(start) : int(stop)].read().result().tobytes()


def test_every_stream_stands_alone(small_slide: Path, tmp_path: Path) -> None:
    store = _tile(small_slide, tmp_path, "jpeg", OWN)
    pixels = _all(store)
    for region, slot in np.argwhere(store.mask):
        picture = Image.open(io.BytesIO(_stream(store, region, slot)))
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), pixels[region, slot])


@pytest.mark.parametrize("mode", MODES)
def test_a_flipped_byte_anywhere_in_the_pixels_is_an_error_that_names_the_slide(
    mode: str, stores: dict[str, TileStore], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(stores[mode].path.parent, tmp_path / "store"))
    files = sorted(path for path in (copy / "a.zarr" / "pixels").glob("*/c/**/*") if path.is_file())
    rng = np.random.default_rng(0)
    for path in files:
        content = path.read_bytes()
        for position in rng.integers(0, len(content), 12):
            damaged = bytearray(content)
            damaged[position] ^= 1 << rng.integers(0, 8)
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=r"a\.zarr.*run crcjax tile again"):
                _all(open_store(copy, "a"))
        path.write_bytes(content)
    np.testing.assert_array_equal(_all(open_store(copy, "a")), _all(stores[mode]))


def test_damage_elsewhere_does_not_disturb_a_tile(stores: dict[str, TileStore], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stores["jpeg"].path.parent, tmp_path / "store"))
    shard = max((copy / "a.zarr" / "pixels" / "streams" / "c").iterdir())
    region, slot = np.argwhere(stores["jpeg"].mask)[0].tolist()
    content = bytearray(shard.read_bytes())
    content[content.index(_stream(stores["jpeg"], region, slot)[-99:])] ^= 1
    shard.write_bytes(content)
    store = open_store(copy, "a")
    last = len(store.origin) - 1
    np.testing.assert_array_equal(store.read_pixels([last]), stores["jpeg"].read_pixels([last]))
    with pytest.raises(InputError, match=r"damaged .*streams"):
        store.read_pixels([region])


@pytest.fixture
def large_slide(tissue_picture: Callable[..., np.ndarray], write_slide, tmp_path: Path) -> Path:
    """Larger than what the content hash covers."""
    picture = tissue_picture(3600, 3000)
    return write_slide(tmp_path / "large.svs", picture, compressionargs={"level": 98}, subsampling=(1, 1))


def test_a_slide_that_moved_or_changed_is_one_clear_error(large_slide: Path, tmp_path: Path) -> None:
    params, content = TilingParams(("20x",), 256), bytearray(large_slide.read_bytes())
    store = _tile(large_slide, tmp_path / "store", "none", params)
    digest = store.info.content_hash
    moved = large_slide.rename(tmp_path / "moved.svs")
    with pytest.raises(InputError, match=r"a\.zarr: keeps no pixels, .*large\.svs: no such file"):
        _all(store)
    assert _tile(moved, tmp_path / "store", "none", params).info.path == str(moved)

    content[1000] ^= 1
    large_slide.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.zarr: .*large\.svs has changed since it was tiled \(another content"):
        _all(store)

    content[1000] ^= 1
    unseen = len(content) // 34 + len(content) // 17 * 8
    content[unseen : unseen + 8] = bytes(8)
    large_slide.write_bytes(content)
    with open_slide(large_slide) as slide:
        assert slide.info.content_hash == digest
    with pytest.raises(InputError, match=r"a\.zarr: keeps no pixels, and its slide .*large\.svs"):
        _all(store)


def test_slides_that_are_read_no_more_are_closed(write_slide, tissue_picture, tmp_path: Path) -> None:
    def opened() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(link.readlink() == slide for link in links)

    slide = write_slide(tmp_path / "slide.svs", tissue_picture(600, 600))
    store = _tile(slide, tmp_path / "store", "none")
    _all(store)
    assert opened() > 0
    pixels._open_slide.cache_clear()
    assert opened() == 0


def test_the_bytes_do_not_depend_on_the_threads(small_slide: Path, tmp_path: Path) -> None:
    contents = []
    for workers in (1, 3):
        store = tmp_path / str(workers)
        tile_slides([TileJob("a", small_slide)], store, PARAMS, workers=workers, pixels="jpeg")
        files = [path for path in (store / "a.zarr").rglob("*") if path.is_file()]
        contents.append({path.relative_to(store): path.read_bytes() for path in files})
    assert contents[0] == contents[1]


def test_another_mode_is_refused(small_slide: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pixels 'png': choose one of jpeg, lossless, none"):
        check_mode("png")
    with pytest.raises(InputError, match="choose one of"):
        tile_slides([TileJob("a", small_slide)], tmp_path, PARAMS, pixels="png")
    assert not list(tmp_path.iterdir())
