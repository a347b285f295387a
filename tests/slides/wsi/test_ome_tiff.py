"""TIFFs in the forms that scanners' and image tools write: read rightly, or refused in one line that says why."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from crcjax.errors import SlideError
from crcjax.slides.wsi.slide import open_slide

OME = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
TILED = {"photometric": "rgb", "tile": (256, 256), "compression": "deflate"}
PLAIN = TILED | {"metadata": None, "resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}


@pytest.fixture(scope="module")
def rgb(tissue_picture: Callable) -> np.ndarray:
    return tissue_picture(768, 512)


def _pixels(path: Path) -> np.ndarray:
    with open_slide(path) as slide:
        return slide.read(0, 0, *slide.info.size)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_transparent_pixels_of_an_ome_tiff_are_white(kind: str, rgb: np.ndarray, tmp_path: Path) -> None:
    alpha = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    background = rgb.min(axis=2) > 225
    alpha[background] = 0
    tifffile.imwrite(tmp_path / "a.ome.tif", alpha, ome=True, metadata=OME, extrasamples=[kind], **TILED)
    np.testing.assert_array_equal(_pixels(tmp_path / "a.ome.tif"), np.where(background[..., None], 255, rgb))


def test_the_largest_image_of_an_ome_tiff_is_the_scan_and_a_second_scan_is_refused(
    rgb: np.ndarray, tmp_path: Path
) -> None:
    with tifffile.TiffWriter(tmp_path / "macro.ome.tif", ome=True) as tiff:
        tiff.write(rgb[::4, ::4].copy(), metadata=OME | {"PhysicalSizeX": 2.0, "PhysicalSizeY": 2.0}, **TILED)
        tiff.write(rgb, metadata=OME, **TILED)
    with open_slide(tmp_path / "macro.ome.tif") as slide:
        assert (slide.info.size, slide.info.mpp) == ((768, 512), (0.5, 0.5))
    np.testing.assert_array_equal(_pixels(tmp_path / "macro.ome.tif"), rgb)
    with tifffile.TiffWriter(tmp_path / "two.ome.tif", ome=True) as tiff:
        for part in (rgb[:, :300], rgb[:, 300:]):
            tiff.write(part.copy(), metadata=OME, **TILED)
    with tifffile.TiffWriter(tmp_path / "two.tif") as tiff:
        for page in (rgb, rgb[:, ::-1].copy()):
            tiff.write(page, **PLAIN)
    for name, words in (("two.ome.tif", "holds 2 images .*write each"), ("two.tif", "holds 2 pages .*write each")):
        with pytest.raises(SlideError, match=words) as caught:
            open_slide(tmp_path / name)
        assert caught.value.status == "unsupported"


@pytest.mark.parametrize("compression", ["deflate", "jpeg"])
@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_a_flipped_or_rotated_tiff_is_refused(
    orientation: int, compression: str, rgb: np.ndarray, tmp_path: Path
) -> None:
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", rgb, extratags=tags, **PLAIN | {"compression": compression})
    with pytest.raises(SlideError, match=f"orientation tag is {orientation}.*write it anew"):
        open_slide(tmp_path / "a.tif")


def test_a_whole_tiff_of_another_kind_is_not_called_damaged(rgb: np.ndarray, tmp_path: Path) -> None:
    kinds: dict[str, tuple[np.ndarray, dict, str]] = {
        "webp.tif": (rgb, PLAIN | {"compression": "webp"}, "WEBP tiles are not read; convert"),
        "jpegxl.tif": (rgb, PLAIN | {"compression": "jpegxl"}, "JPEGXL tiles are not read; convert"),
        "big.tif": (rgb, PLAIN | {"compression": "jpeg", "byteorder": ">"}, "big-endian"),
        "u16.ome.tif": (
            rgb.astype("u2") * 257,
            TILED | {"ome": True, "metadata": OME},
            "3 channels of uint16, not 8-bit",
        ),
        "planar.ome.tif": (
            np.moveaxis(rgb, 2, 0).copy(),
            TILED | {"ome": True, "metadata": OME | {"axes": "SYX"}, "planarconfig": "separate"},
            "in separate planes",
        ),
    }
    for name, (pixels, options, words) in kinds.items():
        tifffile.imwrite(tmp_path / name, pixels, **options)
        with pytest.raises(SlideError, match=words) as caught:
            open_slide(tmp_path / name)
        assert caught.value.status == "unsupported"


def test_an_ome_tiff_without_a_physical_size_is_read_by_its_resolution_tags(rgb: np.ndarray, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.ome.tif", rgb, ome=True, **PLAIN | {"metadata": {"axes": "YXS"}})
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert (slide.info.mpp, slide.info.mpp_source) == ((0.5, 0.5), "tiff")
