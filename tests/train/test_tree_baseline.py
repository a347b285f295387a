import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from crcjax.cli import main
from crcjax.data.cohort import load_cohort
from crcjax.data.splits import fold_of
from crcjax.errors import InputError
from crcjax.slides.store.features import write_features
from crcjax.slides.store.tile_store import open_store
from crcjax.train.tree_baseline import bag_extremes, crossvalidate_trees
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.report import validate

ORIGIN = {"encoder": "theirs", "weights_sha256": None, "mpp": [1.0], "magnifications": ["10x"], "dtype": "float32"}


@pytest.fixture(scope="module")
def features(painted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the painted store. One tile of each slide has the feature of its subtype; the features `noise` are noise."""
    store, rng = tmp_path_factory.mktemp("trees") / "store", np.random.default_rng(0)
    shutil.copytree(painted / "store", store)
    cohort = load_cohort(painted / "cohort.csv", None)
    for row in cohort.rows:
        values = rng.normal(size=(*open_store(store, row.slide_id).mask.shape, 6)).astype(np.float32)
        write_features(store, row.slide_id, "noise", values, ORIGIN)
        region, slot = np.argwhere(open_store(store, row.slide_id).mask)[0]
        values[region, slot, cohort.classes.index(str(row.label))] = 9
        write_features(store, row.slide_id, "theirs", values, ORIGIN)
    return store


@pytest.fixture
def config(small_config, features: Path):
    small_config.data.store, small_config.data.features, small_config.model.encoder = str(features), True, "theirs"
    small_config.data.folds = 3
    return small_config


def _accuracy(predictions: Path, cohort: Path) -> float:
    subtype_of = {row.slide_id: row.label for row in load_cohort(cohort, None).rows}
    return float(np.mean([row.call == subtype_of[row.slide_id] for row in load_predictions(predictions).rows]))


def test_the_extremes_of_a_bag_are_those_of_its_valid_instances() -> None:
    rng = np.random.default_rng(0)
    features, mask = rng.normal(size=(5, 4, 3)), rng.random((5, 4)) < 0.5
    valid = [features[i, j] for i, j in zip(*mask.nonzero(), strict=True)]
    expected = [*np.min(valid, axis=0), *np.max(valid, axis=0)]
    np.testing.assert_allclose(bag_extremes(features, mask), expected, rtol=1e-6)
    assert not bag_extremes(features, np.zeros_like(mask)).any()


def test_the_command_predicts_every_case_of_the_folds_by_trees_and_the_table_is_validated(
    config, tmp_path: Path
) -> None:
    fields = [f"--config.data.{name}={config.data[name]}" for name in ("store", "cohort", "folds", "features")]
    arguments = ["crossvalidate", "--config", "configs/abmil.py", "--out", str(tmp_path / "out"), *fields]
    arguments += ["--config.model.encoder=theirs", "--baseline", "trees"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        patch.setattr("sys.argv", ["crcjax", *arguments])
        with pytest.raises(SystemExit) as status:
            main()
        assert status.value.code in (0, None)
        patch.setattr("sys.argv", ["crcjax", *arguments, "--seeds", "2"])
        with pytest.raises(SystemExit) as status:
            main()
        assert status.value.code == 2
    path, cohort = tmp_path / "out" / "predictions-trees.csv", load_cohort(config.data.cohort, config.data.classes)
    with open(path, newline="") as file:
        folds = {row["case_id"]: int(row["fold"]) for row in csv.DictReader(file)}
    assert folds == fold_of(cohort, 3, "case", config.data.split_seed)
    assert _accuracy(path, Path(config.data.cohort)) > 0.8
    report = validate(path, Path(config.data.cohort), tmp_path / "report")
    assert report["flow"]["cases evaluated"] == len(folds) == 15


def test_trees_never_see_the_case_that_they_predict(config, tmp_path: Path) -> None:
    # Each tree that has seen a case predicts its class, whatever the features are.
    config.model.encoder = "noise"
    path = crossvalidate_trees(config, tmp_path / "out")
    assert _accuracy(path, Path(config.data.cohort)) < 0.7


def test_the_slides_of_a_case_form_one_bag_and_refused_slides_are_no_calls(config, tmp_path: Path) -> None:
    rows = load_cohort(config.data.cohort, None).rows
    table = tmp_path / "cohort.csv"
    # The second slide of each class joins the case of the first.
    first_of_class = {str(row.label): row.case_id for row in reversed(rows)}
    cases = [first_of_class[str(row.label)] if row in rows[:6] else row.case_id for row in rows]
    lines = [f"{row.slide_id},{case},{row.label}" for row, case in zip(rows, cases, strict=True)]
    store = tmp_path / "store"
    shutil.copytree(config.data.store, store)
    shutil.rmtree(store / f"{rows[-1].slide_id}.zarr")
    refusal = {"slide_id": rows[-1].slide_id, "path": "", "status": "no_tissue", "reason": "no tissue; check the file"}
    with open(store / "manifest.jsonl", "a") as manifest:
        manifest.write(json.dumps(refusal | {"tiles": 0, "seconds": 0.0}) + "\n")
    table.write_text("slide_id,case_id,subtype\n" + "\n".join(lines) + "\n")
    config.data.cohort, config.data.store, config.data.unit = str(table), str(store), "case"
    predicted = {row.slide_id: row for row in load_predictions(crossvalidate_trees(config, tmp_path / "out")).rows}
    refused = predicted.pop(rows[-1].slide_id)
    assert (refused.status, refused.reason) == ("not_evaluable", "no_tissue: no tissue; check the file")
    by_case: dict[str, set] = {}
    for row in predicted.values():
        by_case.setdefault(row.case_id, set()).add(row.probs)
    assert len(by_case) < len(predicted)
    assert {len(probs) for probs in by_case.values()} == {1}


def test_without_stored_features_the_trees_are_refused(config, tmp_path: Path) -> None:
    config.data.features = False
    with pytest.raises(InputError, match=r"config\.data\.features must be True for the tree baseline"):
        crossvalidate_trees(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
