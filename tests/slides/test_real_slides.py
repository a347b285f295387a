"""Real slides of several scanners: read, tiled, refused."""

import importlib
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from crcjax.errors import SlideError
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.tile_store import open_store
from crcjax.slides.tiling.plan import TilingParams, plan_tiles
from crcjax.slides.wsi.discovery import find_slides, slide_id_of
from crcjax.slides.wsi.slide import open_slide

pytestmark = pytest.mark.real_data
# Without a micrometre per pixel of their own.
NO_MPP = {"aperio_tcga-cr-7395-01a-01-ts1_jp2k", "dicom_tcga-prad_penmarks"}
REFUSED = {
    "hamamatsu_test3-DAPI.ndpi": ("unsupported", "coloured"),
    "dicom_cmu-1-small-region_badphotometric": ("unsupported", "coloured"),
    "edge_cases/small.svs": ("no_tissue", "no stained tissue"),
    "edge_cases/boxes_0.dcm": ("no_tissue", "no stained tissue"),  # with boxes_1.dcm, of its series
    "edge_cases/boxes.tiff": ("mpp_missing", "impossible"),
    "edge_cases/unopenable.tiff": ("corrupt", "cannot open"),
    "edge_cases/broken.svs": ("unsupported", "not a slide"),
    "edge_cases/pathml_small_dicom_missing_ImageType.dcm": ("corrupt", "or of an unknown kind"),
    "edge_cases/unreadable.svs": ("corrupt", "damaged"),
}


def test_every_real_slide_is_tiled(real_data: Path, tmp_path: Path) -> None:
    paths = find_slides([real_data / "slides"])
    assert len(paths) == 4
    jobs = [TileJob(slide_id_of(path), path, 0.5 if slide_id_of(path) in NO_MPP else None) for path in paths]
    outcomes = tile_slides(jobs, tmp_path, TilingParams(("10x", "20x")))
    assert [outcome.status for outcome in outcomes] == ["tiled"] * 4, outcomes
    for outcome in outcomes:
        store = open_store(tmp_path, outcome.slide_id)
        fine = int(store.mask[:, 1:].sum())
        area = store.info.size[0] * store.info.size[1] / 256**2 * (store.info.mpp[0] / 0.5) ** 2
        assert 0.3 < fine / area < 0.9, (outcome.slide_id, fine, area)  # as the pictures of these slides show
        pixels = store.read_pixels([len(store.origin) // 2])
        assert pixels[0][store.mask[len(store.origin) // 2]].std() > 10


@pytest.mark.parametrize("name", sorted(NO_MPP))
def test_real_slides_without_mpp_are_refused_unless_it_is_given(name: str, real_data: Path) -> None:
    path = next(path for path in find_slides([real_data / "slides"]) if slide_id_of(path) == name)
    with pytest.raises(SlideError, match="give --mpp"):
        open_slide(path)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_unusable_slides_are_refused_in_clear_words(name: str, real_data: Path) -> None:
    status, words = REFUSED[name]
    with pytest.raises(SlideError, match=words) as caught, open_slide(real_data / "slides_refused" / name) as slide:
        plan_tiles(slide, TilingParams())
    assert caught.value.status == status


def test_every_refused_file_is_listed_here(real_data: Path) -> None:
    folder = real_data / "slides_refused"
    assert {str(path.relative_to(folder)) for path in find_slides([folder])} == set(REFUSED)


def test_the_seconds_of_the_table_are_of_tiling_also_when_it_is_made_again(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    tool = importlib.import_module("real_slides")
    job = TileJob("a", real_data / "slides" / "aperio_cmu-1-small-region.svs")
    assert [tool.tile_anew([job], tmp_path / "store")[0].status for _ in range(2)] == ["tiled", "tiled"]


def test_a_real_ome_tiff_is_read_as_it_is(real_data: Path) -> None:
    path = real_data / "tiles" / "stain" / "openslide_OS-1-detail_HE_hamamatsu.ome.tif"
    with open_slide(path) as slide:
        assert slide.info.mpp == pytest.approx((0.2271, 0.2271), abs=1e-3)
        np.testing.assert_array_equal(slide.read(0, 0, *slide.info.size), tifffile.imread(path)[..., :3])
        assert len(plan_tiles(slide, TilingParams()).origin) > 0


def test_pixels_of_a_real_jpeg_slide_are_those_of_openslide_bit_for_bit(real_data: Path) -> None:
    path = real_data / "slides" / "aperio_cmu-1-small-region.svs"
    rng = np.random.default_rng(0)
    aligned = [(240 * i, 240 * j, 240) for i in range(0, 9, 2) for j in range(0, 12, 3)]
    unaligned = [(int(x), int(y), int(side)) for x, y, side in rng.integers(1, 1900, (30, 3))]
    with open_slide(path) as slide, openslide.OpenSlide(path) as rival:
        assert slide._jpeg is not None
        for x, y, side in aligned + unaligned:
            width, height = min(side, 2220 - x), min(side, 2967 - y)
            wanted = np.asarray(rival.read_region((x, y), 0, (width, height)))[..., :3]
            np.testing.assert_array_equal(slide.read(x, y, width, height), wanted)
