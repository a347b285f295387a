import csv
import json
from pathlib import Path

import numpy as np
import pytest

from crcjax.cli import main
from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError
from crcjax.predict.predictor import Predictor
from crcjax.runs.run_directory import open_run
from crcjax.slides.store.tile_store import open_store
from crcjax.train.crossvalidate import crossvalidate
from crcjax.train.loop import train
from crcjax.validation.report import validate


def _table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def config(small_config, tmp_path: Path):
    """A config with two folds of all 21 synthetic cases; the cohort has no splits."""
    rows = _table(Path(small_config.data.cohort))
    small_config.data.cohort = str(tmp_path / "cohort.csv")
    with open(small_config.data.cohort, "w", newline="") as file:
        table = csv.DictWriter(file, [name for name in rows[0] if name != "split"], extrasaction="ignore")
        table.writeheader()
        table.writerows(row | {"path": str(Path(small_config.data.store).parent / row["path"])} for row in rows)
    small_config.data.folds, small_config.train.steps = 2, 4
    return small_config


@pytest.mark.slow
def test_each_case_is_predicted_by_runs_that_never_saw_it_and_the_table_is_validated(config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # As launch/slurm/train.sbatch does in an array: such a run is taken as it is.
    of_fold = config.copy_and_resolve_references()
    of_fold.data.fold = 1
    train(of_fold, out / "fold-1" / "seed-0")
    written = out / "fold-1" / "seed-0" / "metrics.jsonl"
    before = written.read_text()
    crossvalidate(config, out, seeds=2)
    assert written.read_text() == before
    rows = _table(out / "predictions.csv")
    assert sorted(row["slide_id"] for row in rows) == sorted(
        row.slide_id for row in load_cohort(config.data.cohort, None).rows
    )
    for row in rows:
        for seed in (0, 1):
            run = open_run(out / f"fold-{row['fold']}" / f"seed-{seed}")
            assert row["case_id"] not in run.split_of
            assert len(run.ids("val")) > 0
    runs = _table(out / "runs.csv")
    assert [(row["fold"], row["seed"], row["chosen"]) for row in runs] == [
        (fold, seed, "yes") for fold in "01" for seed in "01"
    ]
    report = validate(out / "predictions.csv", Path(config.data.cohort), tmp_path / "report")
    assert report["flow"]["cases evaluated"] == 21
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["synthetic"]

    predictor, store = (
        Predictor(*(out / "fold-0" / f"seed-{seed}" for seed in (0, 1))),
        open_store(config.data.store, rows[0]["slide_id"]),
    )
    tiles, position = store.read_pixels(range(len(store.mask))), (store.origin / store.region_px).astype(np.float32)
    chunk = predictor.members[0].forward.chunk
    chunks = [tiles[first : first + chunk] for first in range(0, len(tiles), chunk)]
    features = [member.forward.features(member.params, chunks) for member in predictor.members]
    probs = predictor.pool(features, store.mask, position)[0].probs[0]
    np.testing.assert_allclose([float(rows[0][f"p_{name}"]) for name in config.data.classes], probs, atol=1e-5)
    assert rows[0]["model"] == predictor.model_id


@pytest.mark.slow
def test_a_sweep_selects_in_each_fold_by_inner_validation_alone_and_resumes(config, tmp_path: Path) -> None:
    table, out = tmp_path / "config.py", tmp_path / "out"
    table.write_text(f"""
from crcjax.config import get_config as default

def get_config():
    config = default()
    config.data.store, config.data.cohort = {config.data.store!r}, {config.data.cohort!r}
    config.data.regions_per_bag, config.data.batch_size, config.data.region_buckets = 4, 4, (64, 128)
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    config.train.steps, config.train.eval_every, config.optimizer.warmup_steps = 4, 2, 1
    return config
""")
    arguments = ["crossvalidate", "--config", str(table), "--out", str(out), "--config.data.folds=2"]
    arguments += ["--sweep", "optimizer.learning_rate=1e-3,1e-9"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["crcjax", *arguments])
        for _ in range(2):
            with pytest.raises(SystemExit) as status:
                main()
            assert status.value.code in (0, None)
            first = (out / "runs.csv").read_text(), (out / "predictions.csv").read_text()
    assert first == ((out / "runs.csv").read_text(), (out / "predictions.csv").read_text())
    runs = _table(out / "runs.csv")
    assert [row["optimizer.learning_rate"] for row in runs] == ["0.001", "1e-09"] * 2
    for fold in "01":
        of_fold = [row for row in runs if row["fold"] == fold]
        merit = [float(row["val_balanced_accuracy"]) - 1e-3 * float(row["val_loss"]) for row in of_fold]
        assert [row["chosen"] for row in of_fold] == ["yes" if at == int(np.argmax(merit)) else "no" for at in (0, 1)]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"optimizer.learning_rat": ["1"]}, "--sweep optimizer.learning_rat must name a number"),
        ({"data.split_seed": ["1", "2"]}, r"--sweep data\.split_seed must name a number"),
        ({"train.steps": ["4", "many"]}, "--sweep train.steps must be of type int, got 'many'"),
        ({"model.frozen": ["maybe"]}, "--sweep model.frozen must be true or false, got 'maybe'"),
    ],
)
def test_an_invalid_sweep_is_refused_before_anything_is_trained(
    config, sweep: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        crossvalidate(config, tmp_path / "out", sweep=sweep)
    assert not (tmp_path / "out").exists()


def test_without_folds_nothing_is_trained(config, tmp_path: Path) -> None:
    config.data.folds = 0
    with pytest.raises(InputError, match=r"config\.data\.folds must be at least 2, got 0; try 5"):
        crossvalidate(config, tmp_path / "out")


@pytest.mark.slow
def test_by_site_without_a_number_each_site_is_left_out_once(config, tmp_path: Path) -> None:
    config.data.folds, config.data.fold_by = 0, "site"
    config.train.steps, config.train.eval_every = 2, 2
    config.optimizer.warmup_steps = 1
    crossvalidate(config, tmp_path / "out")
    site_of = {row.slide_id: row.site for row in load_cohort(config.data.cohort, None).rows}
    folds = {(row["fold"], site_of[row["slide_id"]]) for row in _table(tmp_path / "out" / "predictions.csv")}
    assert len(folds) == len(set(site_of.values())) == len({fold for fold, _ in folds})
