import cv2
import numpy as np
import pytest

from crcjax.slides.synthetic.painter import SITES, SlideSpec, _scene, paint_block
from crcjax.slides.synthetic.patterns import PATTERNS, add_patterns
from crcjax.slides.synthetic.tissue_map import MAP_UM, Tissue, architecture
from crcjax.slides.tiling.quality_control import KEPT, QUALITY_NAMES, QualityLimits, score_tiles, tile_reasons
from crcjax.slides.tiling.tissue_segmentation import tissue_model

FORMER_MAX_FOLD = 1.75  # the limit that discarded the dysplastic epithelium of real slides


def _tiles(spec: SlideSpec, kind: Tissue) -> tuple[list[np.ndarray], np.ndarray]:
    """Tiles of 128 µm that are mostly of one kind of tissue, and the slide's thumbnail."""
    pixels, kinds = paint_block(spec, 0, 0, *spec.size_px), _scene(spec).ground.kinds
    side, cells = round(128 / spec.mpp), round(128 / MAP_UM)
    step = side // cells
    tiles = [
        pixels[y * step : y * step + side, x * step : x * step + side]
        for y in range(0, kinds.shape[0] - cells + 1, cells // 2)
        for x in range(0, kinds.shape[1] - cells + 1, cells // 2)
        if (kinds[y : y + cells, x : x + cells] == kind).mean() > 0.8
    ]
    return tiles, cv2.resize(pixels, None, fx=1 / 16, fy=1 / 16, interpolation=cv2.INTER_AREA)


def test_crowded_epithelium_scores_like_a_fold_and_none_of_it_is_excluded() -> None:
    scores = []
    for i, name in enumerate(("stratified", "villous") * 3):
        spec = SlideSpec("stromal", 40 + i // 2, SITES[i // 2], (1536, 1280), 0.5, patterns=(name,))
        tiles, thumbnail = _tiles(spec, PATTERNS[name])
        assert tiles
        scores.append(score_tiles(tiles, tissue_model(thumbnail), 0.5))
    scored = np.concatenate(scores)
    assert (scored[:, QUALITY_NAMES.index("fold")] > FORMER_MAX_FOLD).mean() > 0.3
    assert (tile_reasons(scored, QualityLimits()) == KEPT).all()


@pytest.mark.parametrize("names", [tuple(PATTERNS), ("mucosa", "submucosa")], ids=["all", "two"])
def test_patterns_share_the_stroma_and_the_simple_glands_equally_and_leave_a_fifth(names: tuple[str, ...]) -> None:
    before = architecture("immune", 4, 3000.0, 2400.0)
    after = add_patterns(before, names, 4)
    free = np.isin(before, (Tissue.STROMA, Tissue.GLANDS))
    for name in names:
        assert (after == PATTERNS[name]).sum() == pytest.approx(0.8 * free.sum() / len(names), rel=0.02)
    np.testing.assert_array_equal(after[~free], before[~free])
