from pathlib import Path

import cv2
import numpy as np
import pytest

from crcjax.slides.synthetic.painter import SlideSpec, paint_slide
from crcjax.slides.tiling.tissue_segmentation import (
    METHODS,
    NotBrightfieldError,
    TissueModel,
    excess_green,
    ink,
    optical_density,
    tissue_mask,
    tissue_model,
)
from crcjax.slides.wsi.slide import open_slide

UM_PER_PX = 8.0
PINK, FAINT, NUCLEI, GLASS = (225, 150, 190), (240, 222, 234), (110, 70, 150), (243, 242, 244)
DISC = cv2.circle(np.zeros((300, 300), np.uint8), (150, 150), 80, 1, -1).astype(bool)


def _slide(tissue: tuple[int, int, int] = PINK, glass: tuple[int, int, int] = GLASS) -> np.ndarray:
    """A disc of tissue on glass."""
    return np.where(DISC[..., None], tissue, glass).astype(np.uint8)


def _mask(picture: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).integers(-4, 5, picture.shape)
    noisy = np.clip(picture + noise, 0, 255).astype(np.uint8)
    return tissue_mask(noisy, tissue_model(noisy), UM_PER_PX)


def _overlap(found: np.ndarray, true: np.ndarray) -> float:
    return (found & true).sum() / (found | true).sum()


@pytest.mark.parametrize("tissue", [PINK, FAINT, NUCLEI, (205, 90, 120)], ids=["pink", "faint", "nuclei", "blood"])
@pytest.mark.parametrize("glass", [GLASS, (225, 225, 225), (250, 246, 238)], ids=["white", "grey", "warm"])
def test_tissue_is_found_pale_or_dense_on_any_glass(tissue: tuple[int, int, int], glass: tuple[int, int, int]) -> None:
    under_light = tuple(round(channel * light / 243) for channel, light in zip(tissue, glass, strict=True))
    assert _overlap(_mask(_slide(under_light, glass)), DISC) > 0.94


def test_faint_tissue_is_kept_beside_dense_tissue() -> None:
    picture = _slide(NUCLEI)
    picture[:, :150][DISC[:, :150]] = FAINT
    assert _overlap(_mask(picture), DISC) > 0.94


MUCIN = (236, 230, 239)


def test_pale_mucin_beside_dense_tissue_is_kept_and_glass_beyond_a_tissues_border_is_not() -> None:
    picture = _slide(NUCLEI)
    picture[:, :150][DISC[:, :150]] = MUCIN
    assert _overlap(_mask(picture), DISC) > 0.94


@pytest.mark.parametrize("tint", [(1, 0.96, 0.99), (1, 0.99, 0.95)], ids=["pink", "yellow"])
def test_neither_tinted_glass_nor_white_that_was_not_scanned_is_tissue(tint: tuple[float, float, float]) -> None:
    picture = _slide(PINK)
    picture[:, :200][DISC[:, :200]] = MUCIN
    shade = 1 - 0.03 * np.linspace(0, 1, 300)[None, :, None]
    noise = np.random.default_rng(0).integers(-4, 5, picture.shape)
    picture = (picture * np.array(tint) * shade + noise).clip(0, 255).astype(np.uint8)
    picture[:, 250:], picture[250:] = 255, 255
    assert _overlap(tissue_mask(picture, tissue_model(picture), UM_PER_PX), DISC) > 0.94


def test_a_slides_density_is_that_of_its_ordinary_tissue_unless_hardly_any_is() -> None:
    picture = _slide(FAINT)
    assert tissue_model(picture).density < 0.3
    picture[:, :100][DISC[:, :100]] = PINK
    assert tissue_model(picture).density == pytest.approx(tissue_model(_slide(PINK)).density)
    assert tissue_model(picture).excess == pytest.approx(tissue_model(_slide(PINK)).excess)


def test_lumina_within_tissue_are_kept_and_a_wide_opening_is_not() -> None:
    picture = _slide()
    cv2.circle(picture, (110, 150), 20, GLASS, -1)  # 80 000 um2
    cv2.circle(picture, (180, 150), 40, GLASS, -1)  # 320 000 um2
    mask = _mask(picture)
    assert mask[150, 110]
    assert not mask[150, 180]


def test_fat_at_the_edge_of_the_tissue_is_kept() -> None:
    picture = _slide()
    fat = cv2.circle(np.zeros((300, 300), np.uint8), (230, 150), 30, 1, -1).astype(bool) & ~DISC
    cells = np.zeros((300, 300), bool)
    cells[::6] = cells[:, ::6] = True  # membranes about fat cells of 48 um
    picture[fat & cells] = PINK
    assert _mask(picture)[fat].mean() > 0.8


@pytest.mark.parametrize("method", METHODS)
def test_each_method_finds_textured_tissue_and_neither_glass_nor_black_nor_ink(method: str) -> None:
    nuclei = np.random.default_rng(1).random((300, 300, 1)) < 0.3
    picture = np.where(DISC[..., None], np.where(nuclei, NUCLEI, PINK), GLASS).astype(np.uint8)
    picture[:20], picture[270:290, 20:80] = (8, 8, 8), (40, 60, 160)
    found = tissue_mask(picture, tissue_model(picture), UM_PER_PX, method)
    assert _overlap(found, DISC) > 0.85
    assert not found[:20].any()
    assert not found[270:290, 20:80].any()
    noise = np.random.default_rng(0).integers(-4, 5, picture.shape)
    glass = (GLASS + noise).astype(np.uint8)
    assert not tissue_mask(glass, tissue_model(glass), UM_PER_PX, method).any()


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_as_coarse_as_that_of_a_whole_glass_slide_gives_the_same_tissue(method: str, tmp_path: Path) -> None:
    with open_slide(paint_slide(tmp_path / "a.svs", SlideSpec("immune", 3, size_px=(2400, 2000), mpp=2.0))) as slide:
        pictures = [slide.thumbnail(round(4800 / um_per_px)) for um_per_px in (8.0, 14.4)]
    fine, coarse = (tissue_mask(shown, tissue_model(shown), 4800 / shown.shape[1], method) for shown in pictures)
    assert _overlap(cv2.resize(coarse.astype(np.uint8), fine.shape[::-1]).astype(bool), fine) > 0.95


def test_faint_tissue_beside_dense_is_found_by_the_robust_method_not_by_otsus() -> None:
    picture = _slide(NUCLEI)
    picture[:, :150][DISC[:, :150]] = FAINT
    model, faint = tissue_model(picture), DISC & (np.arange(300) < 140)
    assert tissue_mask(picture, model, UM_PER_PX)[faint].mean() > 0.95
    assert tissue_mask(picture, model, UM_PER_PX, "otsu")[faint].mean() < 0.2


def test_specks_are_dropped() -> None:
    picture = _slide()
    cv2.circle(picture, (20, 20), 6, NUCLEI, -1)  # 7 000 um2
    assert not _mask(picture)[:60, :60].any()


INKS = {
    "green": (20, 110, 90),
    "pale green": (60, 160, 130),
    "bright green": (30, 120, 40),
    "blue": (40, 50, 150),
    "dark blue": (15, 25, 110),
    "black": (15, 15, 15),
    "grey": (120, 120, 120),
    "red": (215, 25, 30),
}


@pytest.mark.parametrize("ink", INKS)
def test_pen_ink_is_not_tissue(ink: str) -> None:
    picture = _slide()
    picture[10:40, 10:290] = INKS[ink]
    assert _mask(picture)[:45].mean() < 0.12  # a rim where ink fades into glass may stay


def test_black_borders_and_grey_shadows_are_not_tissue() -> None:
    picture = _slide()
    picture[:, :25] = 0
    picture[:20] = 2
    picture[280:] = (190, 189, 191)
    assert _overlap(_mask(picture), DISC) > 0.94


def test_glass_alone_is_no_tissue() -> None:
    assert not _mask(_slide(GLASS)).any()


def test_fluorescence_and_wrong_colours_are_refused() -> None:
    with pytest.raises(NotBrightfieldError, match="dark"):
        tissue_model(_slide((0, 40, 120), (0, 0, 0)))
    with pytest.raises(NotBrightfieldError, match="coloured"):
        tissue_model(_slide(glass=(250, 128, 130)))


def test_turning_the_slide_turns_the_mask() -> None:
    picture = cv2.GaussianBlur(_slide(), (0, 0), 2)
    cv2.circle(picture, (90, 120), 30, NUCLEI, -1)
    model = tissue_model(picture)
    mask = tissue_mask(picture, model, UM_PER_PX)
    turned = tissue_mask(np.ascontiguousarray(np.rot90(picture)), model, UM_PER_PX)
    assert (np.rot90(mask) == turned).mean() > 0.999


@pytest.mark.real_data
def test_real_tiles_of_every_tissue_class_are_stained_and_background_is_not(real_data: Path) -> None:
    model = TissueModel((243.0, 243.0, 243.0), 0.06)  # glass of that archive, and the firmest threshold
    for path in sorted((real_data / "tiles" / "nct_crc_he").glob("*.png")):
        tile = np.ascontiguousarray(cv2.imread(str(path))[..., ::-1])
        density = optical_density(tile, model.white)
        stained = ((excess_green(density) > model.threshold) & ~ink(density)).mean()
        assert stained < 0.02 if path.name.startswith("BACK") else stained > 0.2, path.name


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["MUC-AAQTMGMA", "MUC-TCGA-VNRCQTRY", "STR-TCGA-IAATGHRG"])
def test_real_pale_tissue_beside_dense_on_real_glass_is_found(name: str, real_data: Path) -> None:
    glass = cv2.imread(str(real_data / "tiles" / "artefacts" / "histolab_no-tissue2.png"))[:300, :300, ::-1]
    tiles = [
        cv2.resize(
            cv2.imread(str(real_data / "tiles" / "nct_crc_he" / f"{tile}.png"))[..., ::-1], (14, 14), None, 0, 0, 3
        )
        for tile in (name, "TUM-TCGA-GALLTCWV")
    ]
    pale, dense = (np.tile(np.minimum(tile / 250, 1), (22, 22, 1))[:300, :300] for tile in tiles)
    light = np.where(np.arange(300)[:, None, None] < 180, pale ** (0.35 if "STR" in name else 1), dense)
    picture = np.where(DISC[..., None], glass * light, glass).astype(np.uint8)
    mask = tissue_mask(picture, tissue_model(picture), UM_PER_PX)
    assert (mask & DISC).sum() > 0.98 * DISC.sum()
    assert (mask & DISC).sum() > 0.97 * mask.sum()


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["no-tissue-green-pen", "no-tissue-line", "no-tissue2"])
def test_real_pictures_of_pen_and_glass_hold_next_to_no_tissue(name: str, real_data: Path) -> None:
    picture = cv2.imread(str(real_data / "tiles" / "artefacts" / f"histolab_{name}.png"))[..., ::-1]
    picture = np.ascontiguousarray(picture)
    assert tissue_mask(picture, tissue_model(picture), UM_PER_PX).mean() < 0.01
