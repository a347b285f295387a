"""The commands as a user types them, in processes of their own where the exit status matters."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from crcjax.slides.painter import SlideSpec, paint_slide
from crcjax.slides.store import open_store
from crcjax.train.loop import train

COMMAND = [sys.executable, "-m", "crcjax.cli"]


def _crcjax(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good slide and five bad ones."""
    folder = tmp_path_factory.mktemp("slides")
    good = paint_slide(folder / "good.svs", SlideSpec("immune", 3, size_px=(800, 640), mpp=1.0))
    (folder / "good.truth.npz").unlink()
    (folder / "empty.svs").touch()
    (folder / "text.svs").write_text("slide_id,case_id\n")
    (folder / "cut.svs").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    return folder


@pytest.fixture(scope="module")
def run(painted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained run."""
    from crcjax.config import get_config

    config = get_config()
    config.data.store, config.data.cohort = str(painted / "store"), str(painted / "cohort.csv")
    config.data.regions, config.data.bags, config.data.region_buckets = 4, 4, (64, 128)
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    config.train.steps, config.optimizer.warmup_steps = 4, 2
    path = tmp_path_factory.mktemp("run")
    train(config, path)
    return path


def test_help_is_quick_and_documents_the_exit_statuses() -> None:
    start = time.monotonic()
    shown = " ".join(_crcjax("--help").stdout.split())
    assert time.monotonic() - start < 10
    for words in ("0 everything was done", "1 the run finished, but slides", "2 wrong arguments", "3 stopped because"):
        assert words in shown


def test_tiling_names_each_bad_slide_finishes_the_good_one_and_exits_1(slides: Path, tmp_path: Path) -> None:
    absent = slides / "absent.svs"
    done = _crcjax("tile", slides, absent, "--out", tmp_path, "--mag", "10x", "--tile-px", 64)
    assert done.returncode == 1
    for name, words in {
        "empty.svs": "the file is empty",
        "text.svs": "not a slide",
        "cut.svs": "damaged, cut off",
        "absent.svs": "no such file",
    }.items():
        lines = [line for line in done.stderr.splitlines() if name in line]
        assert len(lines) == 1, done.stderr
        assert words in lines[0]
    assert "Traceback" not in done.stderr
    assert "1 of 5 slides tiled" in done.stderr
    assert open_store(tmp_path, "good").pixels == "jpeg"
    again = _crcjax("tile", slides / "good.svs", "--out", tmp_path, "--mag", "10x", "--tile-px", 64)
    assert again.returncode == 0
    other = _crcjax("tile", slides / "good.svs", "--out", tmp_path, "--mag", "10x", "--tile-px", 128)
    assert other.returncode == 2
    assert "tile_px 64, not 128" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mag", "20"], "magnification '20'"),
        (["--mag", "20x,30x"], "do not differ by a power of two"),
        (["--tile-px", "4"], "tile_px 4"),
        (["--mpp", "250"], "--mpp 250"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(slides: Path, tmp_path: Path, arguments: list, words: str) -> None:
    done = _crcjax("tile", slides / "good.svs", "--out", tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_stops_with_status_3_and_leaves_nothing_that_looks_finished(slides: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(4 * 2**20 - 200_000))
    done = _crcjax("tile", slides / "good.svs", "--out", small_disk / "store", "--mag", "10x", "--tile-px", 256)
    assert done.returncode == 3, done.stderr
    assert "store: cannot be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(small_disk.rglob("*.zarr"))


def test_a_cohort_gives_ids_and_an_absent_file_is_one_failed_line(slides: Path, run: Path, tmp_path: Path) -> None:
    table = tmp_path / "cohort.csv"
    table.write_text(f"slide_id,case_id,path\nA-1,A,{slides / 'good.svs'}\nB-1,B,absent.svs\n")
    tiled = _crcjax("tile", "--cohort", table, "--out", tmp_path / "store", "--mag", "10x", "--tile-px", 64)
    assert tiled.returncode == 1
    assert open_store(tmp_path / "store", "A-1").info.synthetic
    predicted = _crcjax("predict", "--run", run, "--cohort", table, "--out", tmp_path / "out")
    assert predicted.returncode == 1
    with open(tmp_path / "out" / "predictions.csv") as file:
        first, second = csv.DictReader(file)
    assert (first["slide_id"], first["case_id"], first["status"], first["synthetic"]) == ("A-1", "A", "ok", "yes")
    probs = [float(first[f"p_{name}"]) for name in ("canonical", "immune", "stromal")]
    assert sum(probs) == pytest.approx(1, abs=1e-5)
    assert float(first["entropy"]) == pytest.approx(-sum(p * np.log(p) for p in probs), abs=1e-3)
    assert (second["status"], second["p_immune"]) == ("missing", "")
    assert "no such file" in second["reason"]
    assert (tmp_path / "out" / "heatmaps" / "A-1.png").exists()
    with np.load(tmp_path / "out" / "attention" / "A-1.npz") as saved:
        assert saved["attention"].sum() == pytest.approx(1, abs=1e-5)
        assert len(saved["origin"]) == len(saved["attention"])


def test_predicting_from_the_file_equals_predicting_from_the_store(painted: Path, run: Path, tmp_path: Path) -> None:
    from crcjax.infer.predictor import Predictor
    from crcjax.slides.executor import TileJob, tile_slides
    from crcjax.slides.reader import open_slide

    predictor = Predictor(run)
    path = sorted((painted / "slides").glob("*.svs"))[0]
    tile_slides([TileJob("a", path)], tmp_path, predictor.tiling, pixels="lossless")
    store = open_store(tmp_path, "a")
    with open_slide(path) as slide:
        found = predictor.predict(slide, threads=2)
    assert (found.origin == store.origin).all()
    assert (found.mask == store.mask).all()
    forward, pixels = predictor._forward, store.read_pixels(range(len(store.mask)))
    chunks = (pixels[start : start + forward.chunk] for start in range(0, len(pixels), forward.chunk))
    stored = forward.bag(predictor._params, chunks, store.mask)
    np.testing.assert_array_equal(found.prediction.probs, stored.probs)


def test_validation_reports_the_held_out_cases_and_the_attention(painted: Path, run: Path, tmp_path: Path) -> None:
    predicted = _crcjax("predict", "--run", run, "--cohort", painted / "cohort.csv", "--out", tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    done = _crcjax(
        *("validate", "--predictions", tmp_path / "predictions.csv", "--cohort", painted / "cohort.csv"),
        *("--out", tmp_path / "report", "--truth", painted / "slides"),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["synthetic"] is True
    assert metrics["flow"]["cases evaluated"] == 6
    assert set(metrics["attention"]) == {"canonical", "immune", "stromal", "immune and stromal"}


def test_a_folder_that_is_no_run_is_named(slides: Path, tmp_path: Path) -> None:
    done = _crcjax("predict", "--run", tmp_path, slides / "good.svs", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "is no run directory" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_doctor_finds_nothing_wrong_here() -> None:
    done = _crcjax("doctor")
    assert done.returncode == 0, done.stdout
    for words in ("OpenSlide 4", "(cpu)", "disk free", "nothing is wrong"):
        assert words in done.stdout
