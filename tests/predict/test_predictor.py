"""A trained run predicts the same whatever the threads, chunks, padding and order of regions; what is no run is named."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from crcjax.data.cohort import Cohort, SlideRow
from crcjax.errors import InputError, OutputError
from crcjax.models.prediction import Prediction
from crcjax.predict.predict_slides import PredictJob, predict_slides, prediction_fields
from crcjax.predict.predict_store import predict_stored
from crcjax.predict.predictor import Predictor, SlidePrediction
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.tile_store import open_store
from crcjax.slides.tiling.plan import TilingParams
from crcjax.slides.wsi.slide import open_slide
from crcjax.validation.calibration import Calibration, calibrate, load_calibration
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.predictions_table import PredictionRow, write_predictions, write_table
from crcjax.validation.statistics import entropy

CLASSES = ("canonical", "immune", "stromal")
CASES = {"synthetic-0000": "train", "synthetic-0012": "val", "synthetic-0015": ""}


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(run)


@pytest.fixture(scope="module")
def slide(painted: Path) -> Path:
    return painted / "slides" / "synthetic-0015.svs"


def _predict(predictor: Predictor, path: Path, threads: int = 2) -> SlidePrediction:
    with open_slide(path) as slide:
        return predictor.predict(slide, threads)


def _with(run: Path, copy: Path, **data: object) -> Path:
    """A copy of a run with other values of config.data."""
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"] |= data
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_probabilities_sum_to_one_and_attention_lies_on_kept_tiles_alone(predictor: Predictor, slide: Path) -> None:
    found = _predict(predictor, slide)
    assert found.probs.sum() == pytest.approx(1, abs=1e-6)
    attention = np.asarray(found.prediction.region_attention[0])
    assert attention.shape == (len(found.origin),)
    assert attention.sum() == pytest.approx(1, abs=1e-5)
    assert (attention[~found.mask.any(axis=1)] == 0).all()


def test_the_number_of_threads_changes_no_bit(predictor: Predictor, slide: Path) -> None:
    one, many = (_predict(predictor, slide, threads) for threads in (1, 5))
    np.testing.assert_array_equal(one.prediction.alpha, many.prediction.alpha)
    np.testing.assert_array_equal(one.prediction.region_attention, many.prediction.region_attention)


def test_slides_of_a_store_that_are_damaged_or_not_there_are_named_and_the_others_predicted(
    run: Path, painted: Path, tmp_path: Path
) -> None:
    names = [f"synthetic-{number:04d}" for number in (0, 1, 12, 15)]
    for name in names:
        shutil.copytree(painted / "store" / f"{name}.zarr", tmp_path / f"{name}.zarr")
    cohort = Cohort(tuple(SlideRow(name, name) for name in ("absent", *names)), CLASSES)
    whole = predict_stored([run], tmp_path, cohort)
    assert [row.status for row in whole] == ["failed", "ok", "ok", "ok", "ok"]
    shutil.rmtree(tmp_path / f"{names[0]}.zarr" / "mask")
    shutil.rmtree(tmp_path / f"{names[2]}.zarr" / "pixels" / "streams")
    rows = predict_stored([run], tmp_path, cohort)
    assert [row.status for row in rows] == ["failed", "failed", "ok", "failed", "ok"]
    assert [name in row.reason for name, row in zip(names, rows[1:], strict=True)] == [True, False, True, False]
    assert (rows[2], rows[4]) == (whole[2], whole[4])
    for name in names[1:]:
        shutil.rmtree(tmp_path / f"{name}.zarr" / "mask")
    with pytest.raises(InputError, match=f"none of the slides can be read; the first: .*{names[0]}"):
        predict_stored([run], tmp_path, cohort)


def test_a_slide_that_tiling_refused_is_a_no_call_with_the_reason_and_every_other_row_has_the_stores_qc_result(
    run: Path, predictor: Predictor, painted: Path, tmp_path: Path
) -> None:
    store, empty, name = tmp_path / "store", tmp_path / "empty.tif", "synthetic-0015"
    options = {"tile": (240, 240), "resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER", "compression": "deflate"}
    tifffile.imwrite(empty, np.full((720, 720, 3), 240, np.uint8), photometric="rgb", **options)
    shutil.copytree(painted / "store" / f"{name}.zarr", store / f"{name}.zarr")
    outcomes = tile_slides([TileJob("empty", empty)], store, TilingParams(("10x",), tile_px=64))
    assert [outcome.status for outcome in outcomes] == ["no_tissue"]
    cohort = Cohort((SlideRow("empty", "empty"), SlideRow(name, name)), CLASSES)
    jobs = [PredictJob("empty", "empty", empty), PredictJob(name, name, painted / "slides" / f"{name}.svs")]
    by_store, by_file = predict_stored([run], store, cohort), predict_slides(predictor, jobs, tmp_path / "out")
    qc = open_store(store, name).qc
    assert 0 < qc.coverage <= 1
    for refused, predicted in (by_store, by_file):
        assert (refused.status, refused.qc_verdict, refused.qc_coverage) == ("not_evaluable", "refused", 0)
        assert refused.reason == f"no_tissue: {refused.qc_reasons}"
        assert refused.qc_reasons == outcomes[0].reason != ""
        assert predicted.status == "ok"
        assert (predicted.qc_verdict, predicted.qc_reasons) == (qc.status, "; ".join(qc.reasons))
        assert predicted.qc_coverage == pytest.approx(qc.coverage, abs=0.005)
    assert load_predictions(tmp_path / "out" / "predictions.csv").rows[0].qc_reasons == outcomes[0].reason


@pytest.mark.parametrize("off", [2e-7, 6e-8, 0.0])
@pytest.mark.parametrize("method", ["lac", "aps"])
def test_what_was_calibrated_on_all_but_certain_calls_is_met_by_their_like(
    off: float, method: str, tmp_path: Path
) -> None:
    """With rounded probabilities the threshold would be 0, and the set of a slide like all those empty."""

    def row_of(number: int, calibration: Calibration | None = None) -> PredictionRow:
        probs, none = np.array([[1 - off, off, 0.0]], np.float32), np.zeros((1, 1), np.float32)
        attention = none, none[..., None], none[..., None, None]
        found = Prediction(np.log(probs + 1e-30), probs, none, *attention, None, None, none[0], none[0])
        slide_id = f"s{number}"
        unpredicted = PredictionRow(slide_id, f"c{number}", "ok", model="m", split="val")
        return replace(unpredicted, **prediction_fields(found, CLASSES, calibration, slide_id))

    rows = [row_of(i) for i in range(20)]
    write_predictions(tmp_path / "predictions.csv", rows, CLASSES)
    labels = [{"slide_id": row.slide_id, "case_id": row.case_id, "subtype": row.call} for row in rows]
    write_table(tmp_path / "cohort.csv", labels)
    tables = tmp_path / "predictions.csv", tmp_path / "cohort.csv", tmp_path / "calibration.json"
    calibrate(*tables, method=method, error=0.1, by_site=False)
    fitted = load_calibration(tables[2], "m", CLASSES)
    again = [row_of(i, fitted) for i in range(20)]
    assert sum("canonical" in (row.conformal_set or ()) for row in again) >= (20 if method == "lac" else 19)
    assert sum(again[0].probs) == pytest.approx(1)
    assert np.argmax(again[0].probs) == 0


def test_a_run_loaded_twice_is_the_same_model(run: Path, predictor: Predictor, slide: Path) -> None:
    again = Predictor(run)
    assert again.model_id == predictor.model_id
    assert re.fullmatch("[0-9a-f]{12}", again.model_id)
    np.testing.assert_array_equal(_predict(again, slide).probs, _predict(predictor, slide).probs)


@pytest.mark.parametrize("data", [{"region_buckets": [512]}, {"region_buckets": [7]}, {"regions": 3}])
def test_padding_and_chunks_change_nothing_but_rounding(
    data: dict, run: Path, predictor: Predictor, slide: Path, tmp_path: Path
) -> None:
    wanted, found = _predict(predictor, slide), _predict(Predictor(_with(run, tmp_path / "run", **data)), slide)
    np.testing.assert_allclose(found.probs, wanted.probs, atol=1e-5)
    attention = [each.prediction.region_attention for each in (found, wanted)]
    np.testing.assert_allclose(*attention, atol=1e-5)


def test_the_order_of_regions_changes_nothing_but_rounding(predictor: Predictor, slide: Path) -> None:
    found = _predict(predictor, slide)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(*found.mask.shape, 16)).astype(np.float32)
    position = (found.origin / found.region_px).astype(np.float32)
    order = rng.permutation(len(found.mask))
    pool = predictor.members[0].forward.pool
    wanted = pool(predictor.members[0].params, features, found.mask, position)
    shuffled = pool(predictor.members[0].params, features[order], found.mask[order], position[order])
    np.testing.assert_allclose(shuffled.probs, wanted.probs, atol=1e-5)
    np.testing.assert_allclose(shuffled.region_attention[0], wanted.region_attention[0][order], atol=1e-5)


def test_what_masked_tiles_hold_changes_no_bit(predictor: Predictor, slide: Path) -> None:
    found = _predict(predictor, slide)
    mask = found.mask.copy()
    mask[::2] = False
    features = np.random.default_rng(0).normal(size=(*mask.shape, 16)).astype(np.float32)
    position = (found.origin / found.region_px).astype(np.float32)
    other = np.where(mask[..., None], features, 1e3).astype(np.float32)
    one, two = (
        predictor.members[0].forward.pool(predictor.members[0].params, each, mask, position)
        for each in (features, other)
    )
    np.testing.assert_array_equal(one.alpha, two.alpha)


def test_slides_that_the_run_was_fitted_or_chosen_on_are_told(
    predictor: Predictor, painted: Path, tmp_path: Path
) -> None:
    """By the slide's id, or by the case's if the slide is another one."""
    paths = {name: painted / "slides" / f"{name}.svs" for name in CASES}
    jobs = [PredictJob(name, "x", path) for name, path in paths.items()]
    jobs += [PredictJob(f"again-{name}", name, path) for name, path in paths.items()]
    rows = predict_slides(predictor, jobs, tmp_path)
    assert [row.split for row in rows] == [*CASES.values()] * 2
    with open(tmp_path / "predictions.csv", newline="") as file:
        assert [row["split"] for row in csv.DictReader(file)] == [*CASES.values()] * 2


def test_an_ensemble_of_one_run_twice_has_no_disagreement_and_dropout_has(
    run: Path, predictor: Predictor, slide: Path
) -> None:
    alone, twice = _predict(predictor, slide), _predict(Predictor(run, run), slide)
    np.testing.assert_allclose(twice.probs, alone.probs, rtol=1e-6)
    np.testing.assert_allclose(twice.prediction.expected_entropy, entropy(alone.probs), rtol=1e-4)
    dropped = _predict(Predictor(run, dropout_samples=5), slide)
    assert entropy(dropped.probs) > float(dropped.prediction.expected_entropy[0])
    np.testing.assert_array_equal(dropped.probs, _predict(Predictor(run, dropout_samples=5), slide).probs)


def test_slides_of_a_store_are_predicted_with_dropout_too(run: Path, painted: Path, tmp_path: Path) -> None:
    cohort = Cohort((SlideRow("synthetic-0000", "a"),), CLASSES)
    whole, dropped = (predict_stored([run], painted / "store", cohort, dropout_samples=n)[0] for n in (0, 5))
    assert dropped.model == f"{whole.model} dropout 5"
    assert whole.mutual_information == pytest.approx(0, abs=1e-6)
    assert dropped.mutual_information > 1e-6
    without = _with(run, tmp_path / "without")
    config = json.loads((without / "config.json").read_text())
    config["model"]["dropout"] = 0.0
    (without / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="without: was trained without dropout; predict without --dropout-samples"):
        predict_stored([without], painted / "store", cohort, dropout_samples=5)


def test_runs_of_other_models_are_no_ensemble(run: Path, tmp_path: Path) -> None:
    other = _with(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["model"]["mil"] = "mean"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"other: another config\.model than"):
        Predictor(run, other)


@pytest.mark.parametrize("attribution", ["gradient", "occlusion", "region_occlusion"])
def test_attributions_lie_on_kept_tiles_and_reach_the_attention_file(
    attribution: str, run: Path, slide: Path, tmp_path: Path
) -> None:
    calibration = Calibration("any", CLASSES, 2.0, "lac", 0.1, {"": 1.0}, {"": 30})
    job = PredictJob("a", "a", slide)
    (row,) = predict_slides(Predictor(run, attribution=attribution), [job], tmp_path, calibration=calibration)
    assert (row.conformal_set, row.calibration) == (CLASSES, calibration.id)
    with np.load(tmp_path / "attention" / "a.npz") as saved:
        assert saved["attribution"].any()
        assert not saved["attribution"][saved["slot_attention"] == 0].any()


def test_a_folder_that_cannot_be_written_is_named(predictor: Predictor, slide: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: cannot be written"):
        predict_slides(predictor, [PredictJob("a", "a", slide)], tmp_path / "file")


def _empty(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()


def _truncated(run: Path) -> None:
    (run / "config.json").write_text((run / "config.json").read_text()[:200])


def _without_tiling(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    del facts["tiling"]
    (run / "run.json").write_text(json.dumps(facts))


def _without_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def _without_steps(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_empty, "is not a run directory"),
        (_truncated, "is not a run directory"),
        (_without_tiling, "is not a run directory"),
        (_without_checkpoints, "has no checkpoints; train it"),
        (_without_steps, "has no checkpoint yet; train it further"),
    ],
)
def test_a_wrong_or_unfinished_run_is_named_with_the_remedy(
    damage: Callable[[Path], None], words: str, run: Path, tmp_path: Path
) -> None:
    copy = _with(run, tmp_path / "broken")
    damage(copy)
    with pytest.raises(InputError, match=f"broken: {words}"):
        Predictor(copy)


def test_with_a_key_nothing_that_is_written_or_printed_names_the_slides(
    run: Path, painted: Path, tmp_path: Path
) -> None:
    key, folder = tmp_path / "key", tmp_path / "patient-Doe"
    key.write_text("k" * 32)
    key.chmod(0o600)
    folder.mkdir()
    shutil.copy(painted / "slides" / "synthetic-0015.svs", folder / "S19-04711.svs")
    (folder / "S19-empty.svs").touch()
    index = (
        "NoLayers=1",
        "NoJpegColumns=1",
        "NoJpegRows=1",
        "ImageFile=a.jpg",
        "MapFile=Jim_Doe.jpg",
    )  # which is not there
    (folder / "S19-lacking.vms").write_text("\n".join(["[Virtual Microscope Specimen]", *index]))
    (folder / "a.jpg").touch()
    command = [sys.executable, "-m", "crcjax.cli", "predict", str(folder), "--run", str(run)]
    command += ["--out", str(tmp_path / "out"), "--pseudonym-key", str(key)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 3
    contents = [done.stderr.encode(), *(path.read_bytes() + str(path.relative_to(tmp_path)).encode() for path in files)]
    for word in (b"S19-", b"Doe"):
        assert not any(word in content for content in contents), word
