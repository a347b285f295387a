"""Stain estimates of stores and slides, and a run that is trained and predicts with normalised tiles."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError
from crcjax.predict.predictor import Predictor
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.stain.methods import METHODS
from crcjax.slides.stain.normalisation import StainNormaliser, reference_stain, stain_normaliser, stored_estimate
from crcjax.slides.store.tile_store import open_store
from crcjax.slides.synthetic.painter import SITES, SlideSpec, paint_slide
from crcjax.slides.tiling.plan import TilingParams, plan_tiles
from crcjax.slides.wsi.slide import open_slide
from crcjax.train.loop import train


@pytest.fixture
def slide(painted: Path) -> tuple[str, Path]:
    row = load_cohort(painted / "cohort.csv", None).rows[0]
    return row.slide_id, Path(str(row.path))


def _degrees(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip((np.asarray(one) * np.asarray(other)).sum(axis=-1), -1, 1)))


@pytest.mark.parametrize("method", METHODS)
def test_a_slide_and_its_lossless_store_give_the_same_estimate_which_is_kept(
    method: str, slide: tuple[str, Path], tmp_path: Path
) -> None:
    slide_id, path = slide
    params = TilingParams(("5x", "10x"), tile_px=64)
    assert tile_slides([TileJob(slide_id, path)], tmp_path, params, pixels="lossless")[0].succeeded
    store = open_store(tmp_path, slide_id)
    made = stored_estimate(store, method)
    kept = tmp_path / f"{slide_id}.zarr" / "stain" / f"{method}.json"
    assert json.loads(kept.read_text())["reliable"] is True
    with open_slide(path) as opened:
        of_slide = StainNormaliser(method, METHODS[method][1]).of_slide(opened, plan_tiles(opened, params))
    for again in (of_slide, stored_estimate(store, method)):
        for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("method", ["macenko", "vahadane"])
def test_pen_folds_and_bubbles_leave_a_slides_stains_as_they_are(method: str, tmp_path: Path) -> None:
    vectors = []
    for artefacts in ((), ("pen", "fold", "bubble")):
        path = paint_slide(tmp_path / f"{len(artefacts)}.svs", SlideSpec("stromal", 7, SITES[0], artefacts=artefacts))
        with open_slide(path) as opened:
            plan = plan_tiles(opened, TilingParams(("10x",)))
            vectors.append(StainNormaliser(method, METHODS[method][1]).of_slide(opened, plan).vectors)
    assert _degrees(*vectors).max() < 2


def test_slides_of_different_sites_are_nearer_to_each_other_once_they_are_normalised(painted: Path) -> None:
    normaliser = stain_normaliser("macenko", "standard", painted / "store")
    assert normaliser
    rows = load_cohort(painted / "cohort.csv", None).rows
    means: dict[bool, list] = {False: [], True: []}
    for row in {row.site: row for row in rows}.values():
        store = open_store(painted / "store", row.slide_id)
        tiles, estimate = store.read_pixels(range(len(store.mask)))[store.mask], normaliser.of_store(store)
        for after, pixels in ((False, tiles), (True, np.asarray(normaliser(tiles, estimate)))):
            means[after].append(pixels.reshape(-1, 3).astype(float).mean(axis=0))
    before, after = (np.std(means[key], axis=0).mean() for key in (False, True))
    assert len(means[True]) > 1
    assert after < 0.6 * before


def test_a_run_is_trained_to_a_chosen_slides_stain_and_predicts_with_it_unasked(
    small_config, painted: Path, slide: tuple[str, Path], tmp_path: Path
) -> None:
    slide_id, path = slide
    small_config.stain.method, small_config.stain.reference = "macenko", slide_id
    train(small_config, tmp_path / "run")
    predictor = Predictor(tmp_path / "run")
    expected = stored_estimate(open_store(painted / "store", slide_id), "macenko")
    found = predictor.members[0].forward.normaliser
    assert found
    np.testing.assert_allclose(found.reference.vectors, expected.vectors, rtol=1e-6)
    with open_slide(path) as opened:
        shown = predictor.predict(opened, 1)
        predictor.members[0].forward.normaliser = None
    assert np.isfinite(shown.probs).all()
    assert shown.seconds["stain"] > 0


@pytest.mark.parametrize("pixels", ["lossless", "jpeg"])
def test_tiles_are_normalised_once_when_tiling_as_they_would_be_on_the_device(
    pixels: str, slide: tuple[str, Path], tmp_path: Path
) -> None:
    slide_id, path = slide
    as_scanned = TilingParams(("5x", "10x"), tile_px=64)
    stain = reference_stain("vahadane", None, as_scanned)
    params = replace(as_scanned, stain=stain)
    for folder, how, kind in (("raw", as_scanned, "lossless"), ("stained", params, pixels)):
        assert tile_slides([TileJob(slide_id, path)], tmp_path / folder, how, pixels=kind)[0].succeeded
    raw, stained = (open_store(tmp_path / folder, slide_id) for folder in ("raw", "stained"))
    np.testing.assert_array_equal(raw.mask, stained.mask)
    np.testing.assert_array_equal(raw.quality, stained.quality)
    normaliser = StainNormaliser.from_json(stain)
    shown = (store.read_pixels(range(len(store.mask)))[store.mask] for store in (raw, stained))
    before, found = (tiles.astype(np.int16) for tiles in shown)
    expected = np.asarray(normaliser(before.astype(np.uint8), normaliser.of_store(raw))).astype(np.int16)
    off = np.abs(found - expected)
    assert off.max() <= 1 if pixels == "lossless" else off.mean() < 2.5
    assert np.abs(before - expected).mean() > 5
    # The scanned tiles' estimates stay; no other can be made, and nothing is normalised twice.
    assert _degrees(stored_estimate(stained, "macenko").vectors, stored_estimate(raw, "macenko").vectors).max() < 0.1
    with pytest.raises(InputError, match="normalised"):
        stored_estimate(stained, "reinhard")
    with pytest.raises(InputError, match=r"config\.stain\.method none"):
        normaliser.of_store(stained)


@pytest.mark.slow
def test_a_run_on_a_normalised_store_predicts_slides_as_its_tiles_were(
    small_config, painted: Path, tmp_path: Path
) -> None:
    rows = load_cohort(painted / "cohort.csv", None).rows
    params = open_store(painted / "store", rows[0].slide_id).params
    params = replace(params, stain=reference_stain("macenko", rows[0].path, params))
    store = tmp_path / "store"
    assert all(
        outcome.succeeded
        for outcome in tile_slides([TileJob(row.slide_id, Path(str(row.path))) for row in rows], store, params)
    )
    small_config.data.store = str(store)
    train(small_config, tmp_path / "run")
    predictor = Predictor(tmp_path / "run")
    assert predictor.tiling.stain == params.stain
    seen = []
    forward = predictor.members[0].forward
    forward.encode = lambda params, pixels, stain, real=forward.encode: (  # type: ignore[method-assign]
        seen.append(pixels) or real(params, pixels, stain)
    )
    with open_slide(str(rows[1].path)) as slide:
        found = predictor.predict(slide, 1)
    tiles = np.concatenate(seen)[found.mask[found.mask.any(axis=1)]]
    kept = open_store(store, rows[1].slide_id)
    assert np.abs(tiles.astype(int) - kept.read_pixels(range(len(kept.mask)))[kept.mask]).mean() < 3


def test_what_does_not_go_with_a_stain_at_tiling_is_refused(slide: tuple[str, Path], tmp_path: Path) -> None:
    slide_id, path = slide
    params = TilingParams(("10x",), tile_px=64)
    stained = replace(params, stain=reference_stain("macenko", None, params))
    with pytest.raises(InputError, match="--no-pixels"):
        tile_slides([TileJob(slide_id, path)], tmp_path, stained, pixels="none")


@pytest.mark.parametrize(("method", "reference", "words"), [("x", "standard", "choose"), ("macenko", "Z", "not in")])
def test_an_unknown_method_or_reference_is_named(method: str, reference: str, words: str, painted: Path) -> None:
    with pytest.raises(InputError, match=words):
        stain_normaliser(method, reference, painted / "store")


def test_a_damaged_estimate_is_named(slide: tuple[str, Path], tmp_path: Path) -> None:
    slide_id, path = slide
    tile_slides([TileJob(slide_id, path)], tmp_path, TilingParams(("10x",), tile_px=64))
    store = open_store(tmp_path, slide_id)
    stored_estimate(store, "reinhard")
    (store.path / "stain" / "reinhard.json").write_text("{")
    with pytest.raises(InputError, match="delete it"):
        stored_estimate(store, "reinhard")
