import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image, ImageCms

from crcjax.errors import InputError, SlideError
from crcjax.slides.tiling.plan import TilingParams, slide_scale
from crcjax.slides.wsi.native_jpeg import JpegTiles
from crcjax.slides.wsi.slide import SlideInfo, _over_white, open_slide

Writer = Callable[..., Path]


def _picture(width: int = 700, height: int = 500) -> np.ndarray:
    noise = np.random.default_rng(1).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def _through_openslide(path: Path, x: int, y: int, width: int, height: int, level: int) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        region = slide.read_region((x, y), level, (width, height))
    white = Image.new("RGBA", region.size, "white")
    return np.asarray(Image.alpha_composite(white, region).convert("RGB"))


LAYOUTS = {
    "ycbcr 4:2:0": {},
    "ycbcr 4:4:4": {"subsampling": (1, 1)},
    "rgb jpeg": {"photometric": "rgb", "subsampling": None},
    "deflate": {"compression": "deflate", "photometric": "rgb", "subsampling": None},
    "generic tiff": {"aperio": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_are_those_of_openslide(layout: str, tmp_path: Path, write_slide: Writer) -> None:
    path = write_slide(tmp_path / "a.tiff", _picture(), levels=2, **LAYOUTS[layout])
    with open_slide(path) as slide:
        for x, y, width, height, level in [
            (240, 0, 240, 240, 0),
            (101, 37, 300, 333, 0),
            (0, 0, 700, 500, 0),
            (-50, -30, 200, 200, 0),
            (600, 400, 256, 256, 0),
            (5000, 5000, 10, 10, 0),
            (40, 80, 100, 45, 1),
        ]:
            read = slide.read(x, y, width, height, level)
            np.testing.assert_array_equal(read, _through_openslide(path, x, y, width, height, level))


@pytest.mark.parametrize("layout", ["ycbcr 4:2:0", "ycbcr 4:4:4", "rgb jpeg", "generic tiff"])
def test_jpeg_slides_are_read_without_openslide(
    layout: str, tmp_path: Path, write_slide: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slide(tmp_path / "a.svs", _picture(), levels=2, **LAYOUTS[layout])
    with open_slide(path) as slide:
        monkeypatch.delattr(openslide.OpenSlide, "read_region")
        assert slide.read(10, 10, 300, 300).shape == (300, 300, 3)
        assert slide.read(0, 0, 20, 20, level=1).shape == (20, 20, 3)


@pytest.mark.parametrize("side", [256, 512])
def test_every_jpeg_tile_is_decoded_once_where_the_grids_differ(
    side: int, tmp_path: Path, write_slide: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slide(tmp_path / "a.svs", _picture(2600, 2100))
    decoded = []
    one = JpegTiles._decoded
    monkeypatch.setattr(JpegTiles, "_decoded", lambda self, *place: decoded.append(place) or one(self, *place))
    with open_slide(path) as slide:
        for y in range(0, 2100, side):
            for x in range(0, 2600, side):
                slide.read(x, y, side, side)
    assert len(decoded) == len(set(decoded)) == 11 * 9


def test_half_transparent_pixels_are_half_white() -> None:
    rgba = np.array([[[200, 0, 100, 255], [9, 9, 9, 0], [200, 0, 100, 51]]], np.uint8)
    np.testing.assert_array_equal(_over_white(rgba), [[[200, 0, 100], [255, 255, 255], [244, 204, 224]]])


def test_threads_read_the_same_pixels(small_slide: Path) -> None:
    places = [(x, y) for x in range(0, 1500, 170) for y in range(0, 1300, 130)]
    with open_slide(small_slide) as slide, ThreadPoolExecutor(4) as pool:
        alone = [slide.read(x, y, 200, 200) for x, y in places]
        together = list(pool.map(lambda place: slide.read(*place, 200, 200), places))
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("max_px", [1500, 300, 97, 7])
def test_a_thumbnail_is_the_area_mean_of_the_whole_slide(max_px: int, tmp_path: Path, write_slide: Writer) -> None:
    picture = cv2.GaussianBlur(_picture(1500, 900), (0, 0), 8)
    path = write_slide(tmp_path / "a.svs", picture, levels=2)
    with open_slide(path) as slide:
        thumbnail = slide.thumbnail(max_px)
    assert thumbnail.shape == (round(max_px * 0.6), max_px, 3)
    wanted = cv2.resize(picture, (max_px, round(max_px * 0.6)), interpolation=cv2.INTER_AREA)
    assert np.abs(thumbnail.astype(int) - wanted).mean() < 4


def test_mpp_comes_from_the_vendor_else_the_tiff_resolution_and_is_overridden(
    tmp_path: Path, write_slide: Writer
) -> None:
    vendor = write_slide(tmp_path / "a.svs", _picture(), mpp=0.25)
    tiff = write_slide(tmp_path / "a.tiff", _picture(), mpp=0.4, aperio=False)
    for path, mpp, source in [(vendor, 0.25, "vendor"), (tiff, 0.4, "tiff")]:
        with open_slide(path) as slide:
            assert slide.info.mpp == pytest.approx((mpp, mpp))
            assert slide.info.mpp_source == source
        with open_slide(path, mpp=1.5) as slide:
            assert (slide.info.mpp, slide.info.mpp_source) == ((1.5, 1.5), "given")
        with open_slide(path, fallback_mpp=1.5) as slide:
            assert slide.info.mpp == pytest.approx((mpp, mpp))


def test_without_better_the_mpp_is_guessed_from_the_objective_with_a_warning(
    tmp_path: Path, write_slide: Writer
) -> None:
    guessed = write_slide(tmp_path / "a.svs", _picture(), mpp=None, power=40)
    with open_slide(guessed) as slide:
        assert (slide.info.mpp, slide.info.mpp_source) == ((0.25, 0.25), "objective")
        assert slide.info.warning == "0.25 µm per pixel is guessed from the objective power 40; give --mpp"
    with open_slide(guessed, fallback_mpp=0.3) as slide:
        assert (slide.info.mpp, slide.info.mpp_source, slide.info.warning) == ((0.3, 0.3), "given", "")
    resolution = {"resolution": (1e4 / 0.3, 1e4 / 0.3), "resolutionunit": "CENTIMETER"}
    with open_slide(write_slide(tmp_path / "b.svs", _picture(), mpp=None, power=40, **resolution)) as slide:
        assert slide.info.mpp == pytest.approx((0.3, 0.3))
        assert (slide.info.mpp_source, slide.info.warning) == ("tiff", "")


@pytest.mark.parametrize("layout", ["deflate", "jpeg", "strips"])
def test_the_pyramid_and_mpp_of_an_ome_tiff_are_read(layout: str, tmp_path: Path) -> None:
    picture, path = _picture(), tmp_path / "a.ome.tiff"
    half = cv2.resize(picture, (350, 250), interpolation=cv2.INTER_AREA)
    options = {"photometric": "rgb", "compression": "jpeg" if layout == "jpeg" else "deflate"}
    options |= {"rowsperstrip": 16} if layout == "strips" else {"tile": (128, 128)}
    stated = {"axes": "YXS", "PhysicalSizeX": 500.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(picture, subifds=1, metadata=stated, **options)
        tiff.write(half, subfiletype=1, **options)
    if layout == "jpeg":
        picture, half = (tifffile.imread(path, level=level) for level in (0, 1))
    with open_slide(path) as slide:
        assert (slide.info.size, slide.info.level_downsamples) == ((700, 500), (1.0, 2.0))
        assert (slide.info.vendor, slide.info.mpp, slide.info.mpp_source) == ("ome", (0.5, 0.5), "vendor")
        padded = cv2.copyMakeBorder(picture, 30, 30, 50, 50, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        np.testing.assert_array_equal(slide.read(-50, -30, 800, 560), padded)
        np.testing.assert_array_equal(slide.read(100, 60, 200, 150, 1), half[30:180, 50:250])
        assert slide.thumbnail(175).shape == (125, 175, 3)


def test_a_damaged_ome_tiff_is_one_clear_error(tmp_path: Path) -> None:
    path, options = tmp_path / "a.ome.tiff", {"photometric": "rgb", "compression": "deflate", "tile": (128, 128)}
    tifffile.imwrite(path, _picture(), ome=True, metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, **options)
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[0]
    with open(path, "r+b") as file:
        file.seek(offset + 100)
        file.write(bytes(100))
    with open_slide(path) as slide, pytest.raises(SlideError, match=r"damaged at \(0, 0\) of level 0"):
        slide.read(0, 0, 100, 100)
    tifffile.imwrite(path, _picture()[..., 0], ome=True, metadata={})
    with pytest.raises(SlideError, match="not 8-bit RGB"):
        open_slide(path)


def test_an_icc_profile_is_applied_on_request_and_then_no_stream_is_copied(tmp_path: Path, write_slide: Writer) -> None:
    swapped = _profile_with_red_for_green()
    path = write_slide(tmp_path / "a.svs", _picture(), iccprofile=swapped)
    with open_slide(path) as slide:
        assert slide.info.has_icc
        before = slide.read(0, 0, 240, 240)
        assert slide.jpeg_stream(0, 0, 0, 240) is not None
        slide.apply_icc()
        after = slide.read(0, 0, 240, 240)
        assert slide.jpeg_stream(0, 0, 0, 240) is None
    np.testing.assert_allclose(after, before[..., [1, 0, 2]], atol=12)


@pytest.mark.parametrize("name", ["a.svs", "a.ome.tiff"])
def test_a_damaged_icc_profile_is_an_error_only_where_it_is_to_be_applied(
    name: str, tmp_path: Path, write_slide: Writer
) -> None:
    path = tmp_path / name
    if name == "a.svs":
        write_slide(path, _picture(), iccprofile=b"no profile" * 50)
    else:
        about = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        options = {"photometric": "rgb", "compression": "deflate", "tile": (128, 128), "iccprofile": b"no profile" * 50}
        tifffile.imwrite(path, _picture(), ome=True, metadata=about, **options)
    with open_slide(path) as slide:
        assert slide.info.has_icc
        assert slide.read(0, 0, 240, 240).shape == (240, 240, 3)
        with pytest.raises(SlideError, match=r"its ICC profile is damaged .* or tile without --icc") as caught:
            slide.apply_icc()
    assert caught.value.status == "corrupt"


def _profile_with_red_for_green() -> bytes:
    """sRGB with the names of its red and green primaries changed."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"tmpZ").replace(b"gXYZ", b"rXYZ").replace(b"tmpZ", b"gXYZ")


def test_what_is_known_of_a_slide_survives_json(small_slide: Path) -> None:
    with open_slide(small_slide) as slide:
        info = slide.info
    assert SlideInfo.from_json(info.to_json()) == info
    before = {name: value for name, value in info.to_json().items() if name != "corner"}
    assert SlideInfo.from_json(before) == info  # stores that were written without it
    assert (info.vendor, info.size, info.objective_power) == ("aperio", (1500, 1300), 20.0)
    assert info.level_downsamples == pytest.approx((1, 4), rel=1e-2)


def test_the_recorded_path_of_a_slide_may_be_another_or_hidden(small_slide: Path, tmp_path: Path) -> None:
    for info_path, recorded in ((None, str(small_slide)), ("/archive/s.svs", "/archive/s.svs"), ("", "")):
        with open_slide(small_slide, info_path=info_path) as slide:
            assert slide.info.path == recorded
    with pytest.raises(SlideError, match=r"absent\.svs: no such file"):
        open_slide(tmp_path / "absent.svs", info_path="")


def test_the_corner_of_the_scanned_part_is_kept(small_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stated = {"openslide.vendor": "mirax", "openslide.bounds-x": "1200", "openslide.bounds-y": "340"}
    monkeypatch.setattr(openslide.OpenSlide, "properties", stated)
    with open_slide(small_slide, mpp=0.5) as slide:
        assert slide.info.corner == (1200, 340)


def test_a_slide_without_mpp_is_refused_unless_it_is_given(tmp_path: Path, write_slide: Writer) -> None:
    path = write_slide(tmp_path / "a.svs", _picture(), mpp=None)
    with pytest.raises(SlideError, match="give --mpp") as caught:
        open_slide(path)
    assert caught.value.status == "mpp_missing"
    with open_slide(path, mpp=0.5) as slide:
        assert slide.info.mpp == (0.5, 0.5)


def test_an_impossible_mpp_is_refused(tmp_path: Path, write_slide: Writer) -> None:
    path = write_slide(tmp_path / "a.svs", _picture(), mpp=500.0)
    with pytest.raises(SlideError, match="impossible 500") as caught:
        open_slide(path)
    assert caught.value.status == "mpp_missing"
    with open_slide(path, fallback_mpp=0.5) as slide:
        assert slide.info.mpp == (0.5, 0.5)
    for mpp in (0.01, 25.0, float("nan")):
        for name in ("mpp", "fallback_mpp"):
            with pytest.raises(InputError, match=r"outside 0\.05 to 20"):
                open_slide(path, **{name: mpp})


def test_pixels_that_are_not_square_are_refused_unless_their_size_is_given(tmp_path: Path, write_slide: Writer) -> None:
    def written(name: str, x: float, y: float, **options) -> Path:
        resolution = {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
        return write_slide(tmp_path / name, _picture(), **{"mpp": None} | resolution | options)

    for path in (written("a.tiff", 0.5, 0.52, aperio=False), written("b.svs", 0.5, 0.52, power=20)):
        with pytest.raises(SlideError, match=r"states 0\.5 µm per pixel across and 0\.52 down.* give --mpp") as caught:
            open_slide(path)
        assert caught.value.status == "mpp_missing"
        for given in ({"mpp": 0.5}, {"fallback_mpp": 0.5}):
            with open_slide(path, **given) as slide:
                assert (slide.info.mpp, slide.info.mpp_source) == ((0.5, 0.5), "given")
    for x, y in ((0.5, 0.505), (0.505, 0.5)):
        with open_slide(written("c.tiff", x, y, aperio=False)) as slide:
            assert slide.info.mpp == pytest.approx((x, y), rel=1e-4)
            assert slide_scale(slide.info, TilingParams(("10x",))).downsample == pytest.approx(1 / 0.5025, rel=1e-4)
    with open_slide(written("d.svs", 0.5, 0.6, mpp=0.4)) as slide:
        assert (slide.info.mpp, slide.info.mpp_source) == ((0.4, 0.4), "vendor")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("this is no slide\n" * 100)


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _folder_of_text(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("no slide")


@pytest.mark.parametrize(
    ("damage", "status"),
    [
        (Path.unlink, "missing"),
        (_empty, "corrupt"),
        (_text, "unsupported"),
        (_cut_short, "corrupt"),
        (_folder_of_text, "unsupported"),
    ],
)
def test_a_bad_file_is_one_clear_error(
    damage: Callable[[Path], None], status: str, small_slide: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(small_slide, tmp_path / "bad.svs"))
    damage(path)
    with pytest.raises(SlideError, match=r"bad\.svs: .+; .+") as caught:
        open_slide(path)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("layout", "at"), [("ycbcr 4:2:0", 0.5), ("rgb jpeg", 0.9), ("deflate", 0.0)])
def test_a_damaged_tile_is_an_error_that_names_the_slide(
    layout: str, at: float, tmp_path: Path, write_slide: Writer
) -> None:
    path = write_slide(tmp_path / "a.svs", _picture(), **LAYOUTS[layout])
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offset, count = page.dataoffsets[1], page.databytecounts[1]
    with open(path, "r+b") as file:
        file.seek(offset + int(count * at))
        file.write(bytes(count // 10))
    with open_slide(path) as slide:
        assert slide.read(0, 0, 240, 240).shape == (240, 240, 3)
        with pytest.raises(SlideError, match=r"a\.svs: damaged at \(240, 0\) of level 0") as caught:
            slide.read(240, 0, 240, 240)
    assert caught.value.status == "corrupt"


def test_a_tile_that_the_scanner_left_out_is_read_as_openslide_reads_it(tmp_path: Path, write_slide: Writer) -> None:
    path = write_slide(tmp_path / "a.svs", _picture(), levels=2)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        counts[1] = 0
        tiff.pages[0].tags["TileByteCounts"].overwrite(counts)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(200, 100, 300, 200), _through_openslide(path, 200, 100, 300, 200, 0))
