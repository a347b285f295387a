"""The commands of docs/example_real_tissue.md, on a small set of real mosaics."""

import csv
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crcjax.slides.wsi.slide import open_slide

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def real_mosaics():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("real_mosaics")
    sys.modules.pop("real_mosaics", None)


def test_no_image_is_in_two_mosaics_and_augmented_pairs_stay_together(real_mosaics, real_data: Path) -> None:
    mosaics = list(real_mosaics.mosaics(real_data / "tiles"))
    images = [image for mosaic in mosaics for image in (*mosaic.images, *mosaic.shared)]
    assert len(set(images)) == len(images)
    assert all(image.exists() for image in images)
    assert {mosaic.subtype for mosaic in mosaics} == {"adenocarcinoma", "benign"}
    by_pair = {
        frozenset(int(image.stem.strip("acn")) // 2 for image in mosaic.images)
        for mosaic in mosaics
        if mosaic.site == "lc25000"
    }
    assert all(len(pair) == 1 for pair in by_pair)


def test_a_mosaic_is_a_slide_with_its_resolution_and_the_same_pixels_each_time(
    real_mosaics, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_mosaics, "PATCHES", 2)
    tables = [real_mosaics.write_cohort(real_data / "tiles", tmp_path / name) for name in ("one", "two")]
    with open(tables[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["case_id"] for row in rows}) == 21
    for row in rows[::7]:
        with open_slide(tables[0].parent / row["path"]) as slide:
            assert slide.info.mpp == pytest.approx((0.5, 0.5))
            assert slide.info.size == (4 * 224, 4 * 224)
        assert (tables[0].parent / row["path"]).read_bytes() == (tables[1].parent / row["path"]).read_bytes()


@pytest.mark.slow
def test_the_commands_of_the_page_run_one_after_another_and_give_the_rows_of_its_table(
    real_mosaics,
    real_data: Path,
    crcjax: Callable[..., subprocess.CompletedProcess],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(real_mosaics, "PATCHES", 3)
    monkeypatch.chdir(TOOLS.parent)
    table = real_mosaics.write_cohort(real_data / "tiles", tmp_path)
    lines = table.read_text().splitlines()
    # Four mosaics of each class and source: enough for training, validation and test.
    kept = [line for line in lines[1:] if line.split(",")[0][-1] in "0123"]
    table.write_text("\n".join([lines[0], *kept]) + "\n")
    small = {"--config.train.steps=100": "--config.train.steps=4", "--config.data.folds=5": "--config.data.folds=2"}
    commands = real_mosaics.page_commands(tmp_path)
    assert [command[1] for command in commands] == [
        *("tile", "overview", "train", "predict", "validate"),
        *("crossvalidate", "validate") * 2,
    ]
    rows = []
    for command in commands:
        small_model = (
            ["--config.model.width=8", "--config.optimizer.warmup_steps=1"]
            if command[1] in ("train", "crossvalidate")
            else []
        )
        words = [*[small.get(word, word) for word in command[1:]], *small_model]
        if command[1] == "train":
            # It reads the flags of the whole process.
            start = [sys.executable, "-m", "crcjax.cli", *words]
            done = subprocess.run(start, capture_output=True, text=True)
        else:
            done = crcjax(*words)
        assert done.returncode == 0, done.stderr
        if command[1] == "validate":
            rows.append(real_mosaics.result(Path(command[-1]), "evaluation", 0.0))
    # The test cases of one run, then every case by a run that did not see it.
    assert [row["mosaics"] for row in rows] == ["3", "16", "16"] or [row["mosaics"] for row in rows] == [
        "4",
        "16",
        "16",
    ]
    assert all("(" in row["accuracy"] and "(" in row["macro AUROC"] for row in rows)
