"""Bags of all slides of a case, from the store to the report."""

import csv
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logit

from crcjax.data.bags import open_slides, open_stores
from crcjax.data.case_bags import by_unit, separate_slides
from crcjax.data.cohort import Cohort, load_cohort
from crcjax.data.loader import train_batches
from crcjax.errors import InputError
from crcjax.parallel.mesh import local_mesh
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predict_store import predict_stored
from crcjax.predict.predictor import Predictor
from crcjax.train.loop import train
from crcjax.validation.report import validate


@pytest.fixture
def pairs(painted: Path, small_config, tmp_path: Path) -> Path:
    """The synthetic cohort with two slides of one split and subtype per case; its config has the unit case."""
    with open(painted / "cohort.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    slide_count: dict[tuple, int] = {}
    for row in rows:
        kind = row["split"], row["subtype"]
        slide_count[kind] = slide_count.get(kind, -1) + 1
        row["case_id"] = f"{'-'.join(kind)}-{slide_count[kind] // 2}"
        row["path"] = str(painted / row["path"])
    with open(tmp_path / "cohort.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    small_config.data.cohort, small_config.data.unit = str(tmp_path / "cohort.csv"), "case"
    return tmp_path


def _train(config) -> Cohort:
    return load_cohort(config.data.cohort, config.data.classes).split("train")


def test_the_bag_of_a_case_has_the_regions_of_all_its_slides_and_slides_do_not_overlap(
    painted: Path, pairs: Path, small_config
) -> None:
    cohort = _train(small_config)
    slides = open_stores(small_config.data.store, cohort)
    cases, stores, _ = by_unit("case", cohort, slides, [])
    assert [row.case_id for row in cases.rows] == list(cohort.cases)
    assert len(stores) == 6
    for row, store in zip(cases.rows, stores, strict=True):
        own = [slide for slide, of in zip(slides, cohort.rows, strict=True) if of.case_id == row.case_id]
        assert len(own) == 2
        backwards = np.arange(len(store.mask))[::-1]
        pixels = np.concatenate([slide.read_pixels(range(len(slide.mask))) for slide in own])
        np.testing.assert_array_equal(store.read_pixels(backwards), pixels[::-1])
        assert len(store.read_pixels([])) == 0
        first, second = np.split(store.origin, [len(own[0].mask)])
        apart = first[:, None, 1] - second[None, :, 1]
        assert np.abs(apart).min() > 60
        assert (np.sign(apart) == np.sign(apart[0, 0])).all()
        for places, slide in zip((first, second), own, strict=True):
            np.testing.assert_allclose(
                places - places[0], (slide.origin - slide.origin[0]) / slide.region_px, rtol=1e-5
            )


def test_positions_of_a_cases_slides_do_not_depend_on_their_order() -> None:
    rng = np.random.default_rng(0)
    slides = [rng.uniform(0, 30, (n, 2)).astype(np.float32) for n in (5, 9, 0, 7)]
    moved = separate_slides(slides)
    np.testing.assert_array_equal(moved[1], slides[1])
    again = separate_slides(slides[::-1])[::-1]
    for one, other in zip(moved, again, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(separate_slides(slides[:1])[0], slides[0])


def test_training_samples_cases_and_regions_of_all_their_slides(pairs: Path, small_config) -> None:
    cohort = _train(small_config)
    cases, stores, _ = by_unit("case", cohort, open_stores(small_config.data.store, cohort), [])
    rows = [store.read_pixels(range(len(store.mask))) for store in stores]
    from_both = 0
    for bag in train_batches(cohort, small_config, local_mesh(), 0):
        for tiles, label in zip(np.asarray(bag.tiles), np.asarray(bag.label), strict=True):
            at = [{i for i, row in enumerate(slide_rows) if (row == tiles[0]).all()} for slide_rows in rows]
            (case,) = (i for i, found in enumerate(at) if found)
            assert cases.rows[case].label == cases.classes[label]
            first = len(stores[case].stores[0].mask)
            of = {next(i for i, row in enumerate(rows[case]) if (row == tile).all()) < first for tile in tiles}
            from_both += len(of) == 2
    assert from_both > 6


@pytest.mark.slow
def test_a_run_by_case_predicts_every_slide_of_a_case_alike_and_is_validated(
    pairs: Path, small_config, tmp_path: Path
) -> None:
    data = small_config.data
    data.region_sampling, data.mine_slides, data.mine_regions, data.mine_every = "spread", 0.25, 0.25, 2
    train(small_config, tmp_path / "run")
    predictor = Predictor(tmp_path / "run")
    test = load_cohort(small_config.data.cohort, None).split("test").rows
    jobs = [PredictJob(row.slide_id, row.case_id, Path(str(row.path))) for row in test]
    rows = predict_slides(predictor, jobs, tmp_path / "out")
    assert [row.slide_id for row in rows] == [job.slide_id for job in jobs]
    assert len({row.case_id for row in rows}) == len(rows) / 2
    for case in {row.case_id for row in rows}:
        one, other = (row for row in rows if row.case_id == case)
        assert (one.probs, one.vacuity, one.call) == (other.probs, other.vacuity, other.call)
        shares = [np.load(tmp_path / "out" / "attention" / f"{row.slide_id}.npz")["attention"] for row in (one, other)]
        assert sum(share.sum() for share in shares) == pytest.approx(1, abs=1e-5)
        assert all(share.sum() > 0 for share in shares)
    cohort = load_cohort(small_config.data.cohort, small_config.data.classes).split("test")
    stored = predict_stored([tmp_path / "run"], Path(small_config.data.store), cohort, out=tmp_path / "stored")
    for one, other in zip(rows, stored, strict=True):
        # The store's tiles are JPEG.
        np.testing.assert_allclose(logit(one.probs), logit(other.probs), atol=0.02)
        shares = [np.load(tmp_path / out / "attention" / f"{one.slide_id}.npz") for out in ("out", "stored")]
        np.testing.assert_array_equal(shares[0]["origin"], shares[1]["origin"])
        largest = shares[0]["attention"].max()
        np.testing.assert_allclose(shares[0]["attention"], shares[1]["attention"], atol=0.1 * largest)
    shuffled = predict_slides(predictor, jobs[::-1], tmp_path / "again")
    for one, other in zip(rows, shuffled[::-1], strict=True):
        assert one.probs == pytest.approx(other.probs, abs=2e-6)
    metrics = validate(tmp_path / "out" / "predictions.csv", Path(small_config.data.cohort), tmp_path / "out")
    assert metrics["flow"]["cases evaluated"] == len(rows) / 2


def test_a_case_is_predicted_without_a_slide_that_cannot_be_read(painted: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["unit"] = "case"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    predictor = Predictor(tmp_path / "run")
    row = load_cohort(painted / "cohort.csv", None).split("test").rows[0]
    (tmp_path / "broken.svs").write_bytes(b"")
    alone, broken = (
        PredictJob(row.slide_id, "a", Path(str(row.path))),
        PredictJob("broken", "a", tmp_path / "broken.svs"),
    )
    good, bad = predict_slides(predictor, [alone, broken], tmp_path / "out")
    assert bad.status not in ("", "ok")
    assert bad.probs == ()
    (single,) = predict_slides(predictor, [alone], tmp_path / "single")
    assert good.probs == single.probs


def test_evaluation_is_by_case(pairs: Path, small_config) -> None:
    from crcjax.models.mil import build_model, params_of
    from crcjax.predict.forward import Forward
    from crcjax.predict.stored_bags import Evaluation

    model = build_model(small_config.model, 3, 0)
    forward = Forward(model, (64,), 4, local_mesh())
    cohort = _train(small_config)
    found = Evaluation(open_slides(small_config.data.store, cohort), forward, "case").metrics(params_of(model))
    cases, stores, _ = by_unit("case", cohort, open_stores(small_config.data.store, cohort), [])
    losses = []
    for row, store in zip(cases.rows, stores, strict=True):
        pixels, mask = store.read_pixels(range(len(store.mask))), store.mask
        probs = model(jnp.asarray(pixels)[None], jnp.asarray(mask)[None], jnp.asarray(store.origin)[None]).probs
        losses.append(-np.log(float(probs[0, cases.classes.index(str(row.label))])))
    assert found is not None
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_an_unknown_unit_and_stains_of_many_slides_are_refused(pairs: Path, small_config, tmp_path: Path) -> None:
    small_config.stain.method = "macenko"
    with pytest.raises(InputError, match=r"config\.data\.unit must be slide with .* crcjax tile --stain"):
        train(small_config, tmp_path / "run")
    small_config.stain.method, small_config.data.unit = "none", "patient"
    with pytest.raises(InputError, match=r"config\.data\.unit must be one of slide, case, got 'patient'"):
        train(small_config, tmp_path / "other")
