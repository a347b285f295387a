"""Run directories that are resumed, and a stored run of an older version.

old_run.tar.xz holds a run that was stopped at step 4 of 6, its store, its cohort and its predictions, as the version at
commit 5aaf409 wrote them, with the config fields that have since been renamed at values other than their defaults.
"""

import csv
import tarfile
from pathlib import Path

import pytest

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError
from crcjax.main import main
from crcjax.predict.predict_store import predict_stored
from crcjax.runs.checkpoint import newest_step
from crcjax.runs.run_directory import open_run, start_run
from crcjax.slides.tiling.plan import TilingParams

ROOT = Path(__file__).parents[2]


def test_a_run_of_an_older_version_opens_predicts_the_same_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(Path(__file__).parent / "old_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    config = open_run("run").config
    assert (config.data.batch_size, config.data.regions_per_bag, config.data.sampling_seed) == (2, 3, 5)
    assert (config.augment.stain_swap_prob, config.augment.jpeg_min_quality) == (0.25, 70.0)
    assert (config.train.replica_check_every, config.mesh.fsdp_min_size) == (50, 512)
    cohort = load_cohort("cohort.csv", None)
    predicted = {row.slide_id: row for row in predict_stored([Path("run")], Path("store"), cohort)}
    with open("predictions.csv") as file:
        for row in csv.DictReader(file):
            for name in ("p_canonical", "p_immune", "p_stromal"):
                assert float(predicted[row["slide_id"]].to_csv(config.data.classes)[name]) == pytest.approx(
                    float(row[name]), abs=1e-5
                )
    # The command line of that version, with its names.
    fields = {
        **{"data.store": "./store/", "data.cohort": tmp_path / "cohort.csv", "data.bags": 2, "data.regions": 3},
        **{"data.draw_seed": 5, "data.region_buckets": "(16,)", "model.width": 4, "model.features": 8},
        **{"model.attention": 4, "model.heads": 2, "train.steps": 6, "train.eval_every": 4},
        **{"train.checkpoint_every": 4, "train.log_every": 1, "train.agree_every": 50, "optimizer.warmup_steps": 2},
        **{"mesh.shard_params": 512, "augment.exchange": 0.25, "augment.jpeg": 30, "augment.blur": 0.5},
    }
    (tmp_path / "default.py").write_text("from crcjax.config import get_config\n")
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    assert main(["--config=default.py", "--workdir=run", *arguments]) == 0
    assert newest_step(Path("run")) == 6
    error = capsys.readouterr().err
    assert "run: resuming from step 4" in error
    assert "crcjax: --config.augment.jpeg is now --config.augment.jpeg_min_quality" in error


def test_different_spellings_of_the_same_paths_are_the_same_run(
    run: Path, small_config, painted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_run(run)
    cohort = load_cohort(small_config.data.cohort, None)
    rows = tuple(row for row in cohort.rows if row.split in ("train", "val"))
    resumed = type(cohort)(rows, cohort.classes)
    monkeypatch.chdir(painted)
    for store, table in (
        ("store", "cohort.csv"),
        ("./store/", "./cohort.csv"),
        (f"{painted}/store/", "../" + painted.name + "/cohort.csv"),
    ):
        config = opened.config.copy_and_resolve_references()
        config.data.store, config.data.cohort = store, table
        start_run(run, config, opened.tiling, resumed)
    config.data.store = "other"
    with pytest.raises(InputError, match=r"another config \(data\.store was '.*/store', is '.*/other'\); give another"):
        start_run(run, config, opened.tiling, resumed)


def test_slides_tiled_differently_are_refused_with_the_value_that_differs(run: Path, small_config) -> None:
    opened, cohort = open_run(run), load_cohort(small_config.data.cohort, None)
    with pytest.raises(InputError, match=r"tiled in another way \(tile_px was 64, is 128\); give another --workdir"):
        start_run(run, opened.config, TilingParams(("10x",), tile_px=128), cohort)
