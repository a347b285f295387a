"""A share of the regions is chosen so that it holds every tissue in its share, and is predicted in place of the slide."""

from pathlib import Path

import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.predict.region_selection import select_regions, spread
from crcjax.slides.tiling.plan import TilingParams, plan_tiles
from crcjax.slides.wsi.slide import open_slide


@pytest.fixture(scope="module")
def slide(painted: Path) -> Path:
    return Path(str(load_cohort(painted / "cohort.csv", None).rows[-1].path))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
def test_the_chosen_regions_are_the_share_of_the_plans_in_their_order(share: float, slide: Path) -> None:
    with open_slide(slide) as opened:
        plan = plan_tiles(opened, TilingParams(("10x",), tile_px=64))
        chosen = select_regions(plan, opened.info.size[0], share)
    assert len(chosen.origin) == len(chosen.mask) == max(8, np.ceil(share * len(plan.origin)))
    places = [plan.origin.tolist().index(origin) for origin in chosen.origin.tolist()]
    assert places == sorted(set(places))
    np.testing.assert_array_equal(chosen.mask, plan.mask[places])


def test_every_tissue_is_chosen_in_its_share() -> None:
    rng = np.random.default_rng(0)
    tissue = rng.permutation(np.repeat([0, 1, 2], [600, 300, 100]))
    appearance = (np.eye(3)[tissue] * [0, 1, 3] + rng.normal(0, 0.02, (1000, 3))).astype(np.float32)
    chosen = spread(appearance, 200)
    assert np.bincount(tissue[chosen]).tolist() == pytest.approx([120, 60, 20], abs=1)


def test_a_row_states_the_regions_that_were_encoded_and_has_an_id_of_its_own(
    run: Path, slide: Path, tmp_path: Path
) -> None:
    job = [PredictJob("s", "s", slide)]
    (whole,) = predict_slides(Predictor(run), job, tmp_path)
    predictor = Predictor(run, region_share=0.25)
    (part,) = predict_slides(predictor, job, tmp_path)
    assert whole.regions
    assert part.regions
    assert part.regions <= max(8, np.ceil(whole.regions / 4) + 1) < whole.regions
    assert part.model == whole.model
    assert part.pipeline_id != whole.pipeline_id
    assert Predictor(run, region_share=1.0).predicted_by().pipeline_id == whole.pipeline_id
    # Every region counts once: what is not read has no part in the prediction.
    (again,) = predict_slides(predictor, job, tmp_path)
    assert again.probs == part.probs


def test_an_impossible_share_is_refused(run: Path) -> None:
    for share in (0.0, -1.0, 1.5):
        with pytest.raises(InputError, match="region share must be above 0 and at most 1"):
            Predictor(run, region_share=share)
