import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from crcjax.errors import InputError, SlideError
from crcjax.slides.tiling.plan import (
    SAME_SCALE,
    TilingParams,
    mpp_of,
    plan_tiles,
    slide_scale,
    slot_boxes,
    thumbnail_px,
)
from crcjax.slides.tiling.quality_control import ABSENT, REASONS, QualityLimits, tile_marks
from crcjax.slides.tiling.read import read_regions
from crcjax.slides.tiling.tissue_segmentation import NotBrightfieldError, tissue_model
from crcjax.slides.wsi.slide import SlideInfo, open_slide

Writer = Callable[..., Path]
ALL = TilingParams(("10x", "20x", "40x"), tile_px=64)


@pytest.fixture(scope="module")
def fine_slide(write_slide: Writer, tissue_picture: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scanned at 40x: 2000 x 1600 px of 0.25 um."""
    return write_slide(tmp_path_factory.mktemp("fine") / "fine.svs", tissue_picture(2000, 1600), mpp=0.25, levels=2)


def test_magnifications_are_ordered_from_coarse_to_fine() -> None:
    assert TilingParams(("40x", "10x", "20x", "10x")).magnifications == ("10x", "20x", "40x")
    assert TilingParams(("20x", "1.25x")).factors == (1, 16)
    assert (ALL.factors, ALL.slots) == ((1, 2, 4), 21)
    assert [mpp_of(name) for name in ALL.magnifications] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magnifications": ("20x", "30x")}, "power of two"),
        ({"magnifications": ("twenty",)}, "write a number and x"),
        ({"magnifications": ("20",)}, "write a number and x"),
        ({"magnifications": ("0x",)}, "write a number and x"),
        ({"magnifications": ()}, "no magnification"),
        ({"tile_px": 8}, "outside 16 to 4096"),
        ({"tissue": "magic"}, "choose robust, otsu, entropy"),
        ({"min_tissue_mm2": 0.0}, "min_tissue_mm2 must be an area above 0 and up to 1000 mm², got 0; try 0.02"),
        ({"min_tissue_mm2": float("nan")}, "min_tissue_mm2 must be"),
    ],
)
def test_senseless_parameters_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TilingParams(**changes)


def test_parameters_survive_json() -> None:
    params = replace(ALL, tissue="otsu", icc=True, min_tissue_mm2=0.004)
    assert TilingParams.from_json(params.to_json()) == params
    older = {name: value for name, value in params.to_json().items() if name != "min_tissue_mm2"}
    assert TilingParams.from_json(older) == replace(params, min_tissue_mm2=0.02)


def test_slots_tile_the_region_once_at_each_magnification() -> None:
    boxes = slot_boxes(ALL)
    assert boxes.shape == (21, 3)
    assert boxes[0].tolist() == [0, 0, 1]
    assert boxes[1:5].tolist() == [[0, 0, 0.5], [0.5, 0, 0.5], [0, 0.5, 0.5], [0.5, 0.5, 0.5]]
    assert boxes[5:9, 0].tolist() == [0, 0.25, 0.5, 0.75]
    for part in (boxes[:1], boxes[1:5], boxes[5:]):
        assert (part[:, 2] ** 2).sum() == 1
        assert len({(x, y) for x, y, _ in part.tolist()}) == len(part)


def test_the_level_is_chosen_by_mpp_and_nothing_is_upsampled(fine_slide: Path) -> None:
    with open_slide(fine_slide) as slide:
        info = slide.info
    level_of = {name: slide_scale(info, TilingParams((name,))).level for name in ("40x", "20x", "10x", "5x")}
    assert level_of == {"40x": 0, "20x": 0, "10x": 1, "5x": 1}
    assert slide_scale(replace(info, mpp=(0.2549, 0.2549)), TilingParams(("40x",))).downsample == 1
    with pytest.raises(SlideError, match=r"0\.256 µm per pixel, too coarse for 40x") as caught:
        slide_scale(replace(info, mpp=(0.256, 0.256)), TilingParams(("40x",)))
    assert caught.value.status == "too_coarse"
    scale = slide_scale(replace(info, mpp=(0.5, 0.5)), ALL)
    assert (scale.finest, scale.missing) == (1, 1)


def test_a_region_covers_the_same_micrometres_whatever_the_scanner(
    tmp_path: Path, write_slide: Writer, tissue_picture: Callable
) -> None:
    for mpp in (0.2, 0.25, 0.3, 0.35, 0.46, 0.5):
        path = write_slide(tmp_path / f"{mpp}.svs", tissue_picture(2000, 2000), mpp=mpp)
        with open_slide(path) as slide:
            plan = plan_tiles(slide, TilingParams(tile_px=128))
            tiles = read_regions(slide, plan, 0, 1)
        assert plan.region_px * mpp == pytest.approx(64.0, rel=0.02)
        assert tiles.pixels.shape == (1, 1, 128, 128, 3)


def test_regions_lie_on_a_grid_in_rows_and_cover_the_tissue(small_slide: Path) -> None:
    with open_slide(small_slide) as slide:
        plan = plan_tiles(slide, TilingParams(tile_px=64))
    origin = plan.origin.astype(int)
    assert (origin % 64 == 0).all()
    assert sorted(origin.tolist(), key=lambda at: (at[1], at[0])) == origin.tolist()
    kept = np.zeros((1300, 1500), bool)
    for x, y in origin:
        kept[y : y + 64, x : x + 64] = True
    tissue = np.zeros_like(kept)
    tissue[325:975, 375:1125] = True
    assert kept[tissue].mean() > 0.97
    assert kept[~tissue].mean() < 0.1
    assert len(origin) + plan.rejected["glass"] == 24 * 21


def test_no_tile_with_less_tissue_than_asked_for_is_planned(small_slide: Path) -> None:
    kept = {}
    for least in (0.25, 0.9):
        with open_slide(small_slide) as slide:
            plan = plan_tiles(slide, TilingParams(("20x",), tile_px=96, quality=QualityLimits(min_tissue=least)))
        scale = np.array(plan.tissue_mask.shape[::-1]) / slide.info.size
        corner, end = plan.origin * scale, (plan.origin + plan.region_px) * scale
        places = np.rint(np.concatenate([corner, end], axis=1)).astype(int).tolist()
        inside = [plan.tissue_mask[y:bottom, x:right].mean() for x, y, right, bottom in places]
        assert min(inside) >= least - 0.02
        kept[least] = {tuple(origin) for origin in plan.origin.tolist()}
    assert kept[0.9] < kept[0.25]


def test_tiles_are_the_pixels_at_their_slots_coordinates(fine_slide: Path) -> None:
    with open_slide(fine_slide) as slide:
        plan = plan_tiles(slide, ALL)
        tiles = read_regions(slide, plan, 0, len(plan.origin))
        boxes = slot_boxes(ALL)
        for region, origin in enumerate(plan.origin):
            for slot in np.flatnonzero(tiles.mask[region]):
                x, y = np.rint(origin + boxes[slot, :2] * plan.region_px).astype(int).tolist()
                side = round(float(boxes[slot, 2]) * plan.region_px)
                naive = cv2.resize(slide.read(x, y, side, side), (64, 64), interpolation=cv2.INTER_AREA)
                np.testing.assert_array_equal(tiles.pixels[region, slot], naive)


def test_a_coarse_tile_is_the_mean_of_the_finer_tiles_under_it(fine_slide: Path) -> None:
    with open_slide(fine_slide) as slide:
        plan = plan_tiles(slide, ALL)
        tiles = read_regions(slide, plan, 0, len(plan.origin))
    whole = tiles.pixels[tiles.mask.all(axis=1)].astype(float)
    assert len(whole) > 5
    fine = whole[:, 5:].reshape(-1, 4, 4, 64, 64, 3).swapaxes(2, 3).reshape(-1, 256, 256, 3)
    for slots, factor in ((slice(0, 1), 4), (slice(1, 5), 2)):
        mean = fine.reshape(-1, 256 // factor, factor, 256 // factor, factor, 3).mean(axis=(2, 4))
        side = 4 // factor
        coarse = whole[:, slots].reshape(-1, side, side, 64, 64, 3).swapaxes(2, 3).reshape(mean.shape)
        assert np.abs(coarse - mean).max() <= 0.5


def test_a_magnification_that_the_slide_lacks_is_masked(small_slide: Path) -> None:
    with open_slide(small_slide) as slide:
        plan = plan_tiles(slide, ALL)
        tiles = read_regions(slide, plan, 0, len(plan.origin))
    assert tiles.mask[:, :5].any(axis=0).all()
    assert not tiles.mask[:, 5:].any()
    assert not tiles.pixels[:, 5:].any()


@pytest.mark.parametrize("mpp", [0.17, 0.25, 0.29, 0.5, 0.62, 1.0, 1.3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_combination_of_magnifications_is_read_from_any_base_and_never_upsampled(
    mpp: float, count: int, tmp_path: Path, write_slide: Writer, tissue_picture: Callable
) -> None:
    side_px = round(700 / mpp) if mpp > 0.3 else 2400
    with open_slide(write_slide(tmp_path / "a.svs", tissue_picture(side_px, side_px), mpp=mpp, levels=2)) as slide:
        for chosen in itertools.combinations(("40x", "20x", "10x"), count):
            params = TilingParams(chosen, tile_px=32)
            present = [mpp_of(name) >= mpp * 0.98 for name in params.magnifications]
            if not any(present):
                with pytest.raises(SlideError, match="nothing is upsampled"):
                    plan_tiles(slide, params)
                continue
            plan = plan_tiles(slide, params)
            step_um = plan.scale.downsample * mpp
            assert step_um >= mpp * 0.98
            assert plan.region_px * mpp == pytest.approx(32 * mpp_of(params.magnifications[0]), rel=0.02)
            held = np.repeat(present, np.square(params.factors))
            assert not plan.mask[:, ~held].any()
            assert plan.mask[:, held].any(axis=0).all()
            tiles = read_regions(slide, plan, 0, min(4, len(plan.origin)))
            assert not tiles.pixels[:, ~held].any()
            assert (tiles.reason[:, ~held] == ABSENT).all()


def test_each_slot_is_judged_alone_and_masked_slots_are_black(fine_slide: Path) -> None:
    with open_slide(fine_slide) as slide:
        plan = plan_tiles(slide, ALL)
        tiles = read_regions(slide, plan, 0, len(plan.origin))
    partly = tiles.mask.any(axis=1) & ~tiles.mask.all(axis=1)
    assert partly.any()
    assert not tiles.pixels[~tiles.mask].any()
    assert not tiles.quality[~plan.mask].any()
    assert (tiles.quality[tiles.mask][:, :2] > 0).all()


def test_a_region_that_sticks_out_of_the_slide_is_padded_with_white(
    tmp_path: Path, write_slide: Writer, tissue_picture: Callable
) -> None:
    picture = tissue_picture(1000, 1000)[200:700, 200:700]  # tissue to the right and lower border
    path = write_slide(tmp_path / "a.svs", picture)
    with open_slide(path) as slide:
        plan = plan_tiles(slide, TilingParams(tile_px=128))
        tiles = read_regions(slide, plan, 0, len(plan.origin))
    last = tiles.pixels[plan.origin.tolist().index([384, 384]), 0]
    assert (last[116:] == 255).all()
    assert (last[:, 116:] == 255).all()
    assert not (last[:116, :116] == 255).all()


def test_blurred_tiles_are_marked_and_sharp_ones_are_not(
    tmp_path: Path, write_slide: Writer, tissue_picture: Callable
) -> None:
    picture = tissue_picture(1500, 1300)
    picture[:, :750] = cv2.GaussianBlur(picture[:, :750], (0, 0), 10)
    path = write_slide(tmp_path / "a.svs", picture)
    with open_slide(path) as slide:
        plan = plan_tiles(slide, TilingParams(tile_px=128))
        tiles = read_regions(slide, plan, 0, len(plan.origin))
    inside = (plan.origin[:, 1] >= 384) & (plan.origin[:, 1] <= 768)
    left, right = inside & (plan.origin[:, 0] < 512), inside & (plan.origin[:, 0] >= 768)
    unmarked = tile_marks(tiles.quality[:, 0], plan.params.quality) == REASONS.index("kept")
    assert not unmarked[left].any()
    assert unmarked[right & (plan.origin[:, 0] < 1000)].all()


def test_a_tile_of_glass_within_a_lumen_is_masked(
    tmp_path: Path, write_slide: Writer, tissue_picture: Callable
) -> None:
    picture = tissue_picture(1500, 1300)
    cv2.circle(picture, (704, 704), 200, (240, 240, 240), -1)
    path = write_slide(tmp_path / "a.svs", picture)
    with open_slide(path) as slide:
        plan = plan_tiles(slide, TilingParams(tile_px=128))
        tiles = read_regions(slide, plan, 0, len(plan.origin))
    region = plan.origin.tolist().index([640, 640])
    assert (plan.mask[region, 0], tiles.mask[region, 0]) == (True, False)


def test_a_slide_without_tissue_is_refused(tmp_path: Path, write_slide: Writer) -> None:
    path = write_slide(tmp_path / "glass.svs", np.full((800, 800, 3), 243, np.uint8))
    with open_slide(path) as slide, pytest.raises(SlideError, match="no stained tissue") as caught:
        plan_tiles(slide, TilingParams())
    assert caught.value.status == "no_tissue"


def _with_tissue(tissue_picture: Callable, side: int, tissue_px: int) -> np.ndarray:
    """A picture of glass with a square of tissue."""
    picture = np.full((side, side, 3), 240, np.uint8)
    first = (side - tissue_px) // 2
    inner = slice(first, first + tissue_px)
    tissue = tissue_picture(2 * tissue_px, 2 * tissue_px)
    picture[inner, inner] = tissue[tissue_px // 2 :, tissue_px // 2 :][:tissue_px, :tissue_px]
    return picture


def test_a_single_tile_full_of_tissue_is_tiled_though_it_shows_no_background(
    tmp_path: Path, write_slide: Writer, tissue_picture: Callable
) -> None:
    pale = _with_tissue(tissue_picture, 224, 224)
    deep = np.rint(pale * np.array([0.95, 0.65, 0.85])).astype(np.uint8)
    dark = np.rint(deep * np.array([0.45, 0.4, 0.55])).astype(np.uint8)  # as crowded lymphocytes are
    for name, picture in {"pale": pale, "deep": deep, "dark": dark}.items():
        path = write_slide(tmp_path / f"{name}.svs", picture)
        with open_slide(path) as slide:
            plan = plan_tiles(slide, TilingParams(("20x",), tile_px=224))
        assert plan.origin.tolist() == [[0, 0]], name
        assert plan.mask.all(), name
        assert plan.tissue_mask.mean() > 0.95, name
    with pytest.raises(NotBrightfieldError, match="coloured"):
        tissue_model(deep)
    with pytest.raises(NotBrightfieldError, match="dark"):
        tissue_model(dark)
    with pytest.raises(NotBrightfieldError, match="dark"):
        tissue_model(pale // 5 * np.uint8([0, 0, 3]), may_lack_background=True)  # blue alone, as DAPI


def test_a_core_is_tiled_down_to_the_area_that_a_parameter_sets(
    tmp_path: Path, write_slide: Writer, tissue_picture: Callable
) -> None:
    """240 px at 0.5 um are 0.0144 mm2 of tissue, on a picture of 0.25 mm2; the mask is half a pixel of 8 um wider."""
    path = write_slide(tmp_path / "core.svs", _with_tissue(tissue_picture, 1000, 240))
    params = TilingParams(("20x",), tile_px=128)
    with open_slide(path) as slide:
        with pytest.raises(SlideError) as caught:
            plan_tiles(slide, params)
        plan = plan_tiles(slide, replace(params, min_tissue_mm2=0.01))
        with pytest.raises(SlideError, match=r"at most 0\.\d+ of a tile, below the limit min_tissue=0\.25"):
            plan_tiles(slide, TilingParams(("5x",), tile_px=256, min_tissue_mm2=0.01))
    assert caught.value.status == "no_tissue"
    stated = re.search(r"has (0\.01\d+) mm², below the limit of 0\.02 mm² \(--min-tissue-mm2", caught.value.reason)
    assert stated
    assert float(stated[1]) == pytest.approx(0.0144, rel=0.25)
    assert re.search(r"try --min-tissue-mm2 0\.01\d$", caught.value.remedy)
    columns = (plan.origin / 128).astype(int)
    assert set(map(tuple, columns.tolist())) == {(x, y) for x in (3, 4) for y in (3, 4)}


def test_a_single_tile_with_too_little_tissue_is_refused_by_its_area_and_the_limit(
    tmp_path: Path, write_slide: Writer, tissue_picture: Callable
) -> None:
    """224 px at 0.5 um are 0.0125 mm2, a quarter of which is 0.00314 mm2; 70 px are 0.0012 mm2."""
    path = write_slide(tmp_path / "corner.svs", _with_tissue(tissue_picture, 224, 70))
    with open_slide(path) as slide:
        with pytest.raises(
            SlideError, match=r"below the limit of 0.00314 mm² \(a quarter of the picture's 0.0125 mm²\)"
        ):
            plan_tiles(slide, TilingParams(("20x",), tile_px=56))
        assert len(plan_tiles(slide, TilingParams(("20x",), tile_px=56, min_tissue_mm2=0.001)).origin) == 4


def test_fluorescence_is_refused(tmp_path: Path, write_slide: Writer, tissue_picture: Callable) -> None:
    path = write_slide(tmp_path / "dark.svs", 255 - tissue_picture(800, 800))
    with open_slide(path) as slide, pytest.raises(SlideError, match="fluorescence") as caught:
        plan_tiles(slide, TilingParams())
    assert caught.value.status == "unsupported"


def test_the_picture_for_tissue_is_of_8_um_and_bounded_for_slides_of_any_size(
    small_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_slide(small_slide) as slide:
        info, params = slide.info, TilingParams(("10x",), tile_px=32)
        assert thumbnail_px(info) == round(1500 * 0.5 / 8)
        assert thumbnail_px(replace(info, size=(100_000, 80_000), mpp=(0.25, 0.25))) == 3125
        for size in ((100_000, 100_000), (400_000, 90_000), (3_000_000, 2_000_000)):
            longer = thumbnail_px(replace(info, size=size, mpp=(0.5, 0.5)))
            assert 11_900_000 < longer**2 * min(size) / max(size) < 12_100_000
        fine = plan_tiles(slide, params)
        monkeypatch.setattr("crcjax.slides.tiling.plan.MOST_THUMBNAIL_PX", 4000)
        coarse = plan_tiles(slide, params)
    assert (fine.thumbnail[..., 0].size, coarse.thumbnail[..., 0].size) == (94 * 81, pytest.approx(4000, rel=0.02))
    places = [set(map(tuple, plan.origin.tolist())) for plan in (fine, coarse)]
    assert len(places[0] & places[1]) > 0.9 * len(places[0] | places[1])


def _info(mpp: float) -> SlideInfo:
    return SlideInfo("s.svs", "aperio", (1000, 1000), (1.0,), (mpp, mpp), "vendor", None, "", False)


@pytest.mark.parametrize("magnification", ["40x", "20x", "10x"])
def test_every_slide_within_the_tolerance_is_read_at_some_level(magnification: str) -> None:
    wanted = mpp_of(magnification)
    for mpp in np.linspace(wanted * 0.97, wanted / (1 - SAME_SCALE), 401):
        scale = slide_scale(_info(float(mpp)), TilingParams((magnification,)))
        assert scale.level == 0
        assert abs(scale.downsample * mpp / wanted - 1) < 0.0205
    with pytest.raises(SlideError, match="too coarse"):
        slide_scale(_info(wanted / (1 - SAME_SCALE) + 1e-6), TilingParams((magnification,)))
