import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crcjax.data.cohort import SPLITS
from crcjax.errors import InputError
from crcjax.slides.preprocess.manifest import Outcome, append_outcome
from crcjax.train.setup import plan_run, training_cohort

Row = dict[str, str]


@pytest.fixture
def cohort_of(small_config, painted: Path, tmp_path: Path) -> Callable:
    """cohort_of(change) is the config of the painted cohort with `change` applied to the rows of its table."""

    def of(change: Callable[[list[Row]], list[Row]]):
        with open(painted / "cohort.csv") as file:
            rows = [row | {"path": str(painted / row["path"])} for row in csv.DictReader(file)]
        with open(tmp_path / "cohort.csv", "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(change(rows))
        small_config.data.cohort = str(tmp_path / "cohort.csv")
        return small_config

    return of


@pytest.fixture
def logged() -> list[str]:
    """The lines of the log."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.extend(f"{record.levelname} {record.getMessage()}".splitlines())

    handler = Lines()
    logging.getLogger("crcjax").addHandler(handler)
    yield lines
    logging.getLogger("crcjax").removeHandler(handler)


def test_training_logs_the_cases_of_each_split_class_and_site(small_config, logged: list[str]) -> None:
    cohort = training_cohort(small_config)
    assert {row.split for row in cohort.rows} == {"train", "val"}
    counts = {" ".join(line.split()[:-6]): line.split()[-6:] for line in logged if "(" in line}
    assert counts["immune"] == ["4", "(4)", "1", "(1)", "2", "(2)"]
    assert counts["all"] == ["12", "(12)", "3", "(3)", "6", "(6)"]
    assert not [line for line in logged if line.startswith("WARNING")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [row | {"subtype": "immune"} for row in rows], "all 12 training cases are immune; training needs"),
        (lambda rows: [row for row in rows if row["split"] != "val"], "no labelled case has split val, so no checkpoint"),
        (lambda rows: [row | {"split": "test"} for row in rows], "all labelled cases have split test"),
        (lambda rows: [row | {"subtype": ""} for row in rows], "has no labelled slide; fill in the column subtype"),
    ],
)  # fmt: skip
def test_a_cohort_that_cannot_be_trained_on_is_refused_with_the_reason(
    cohort_of: Callable, change: Callable, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        training_cohort(cohort_of(change))


def test_a_class_without_training_cases_is_a_warning(cohort_of: Callable, logged: list[str]) -> None:
    config = cohort_of(lambda rows: [row for row in rows if (row["split"], row["subtype"]) != ("train", "stromal")])
    training_cohort(config)
    assert [line for line in logged if "class stromal has no training case; the model cannot learn it" in line]


def test_a_run_that_asks_for_no_validation_cases_is_a_warning(cohort_of: Callable, logged: list[str]) -> None:
    config = cohort_of(lambda rows: [row for row in rows if row["split"] != "val"])
    config.data.val_fraction = 0.0
    training_cohort(config)
    assert [line for line in logged if line.startswith("WARNING") and "so no checkpoint can be chosen" in line]


def test_one_slide_file_under_two_cases_is_named_with_its_splits(
    small_config, painted: Path, tmp_path: Path, logged: list[str]
) -> None:
    shutil.copytree(painted / "store", tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "synthetic-0015.zarr")
    shutil.copytree(painted / "store" / "synthetic-0000.zarr", tmp_path / "store" / "synthetic-0015.zarr")
    small_config.data.store = str(tmp_path / "store")
    training_cohort(small_config)
    (line,) = [line for line in logged if "content_hash" in line]
    assert "synthetic-0000 (case synthetic-0000, train) and synthetic-0015 (case synthetic-0015, test)" in line


def test_training_leaves_out_slides_that_tiling_refused_and_logs_their_number_per_class_and_split_and_the_qc_results(
    small_config, painted: Path, tmp_path: Path, logged: list[str]
) -> None:
    all_slides = training_cohort(small_config)
    logged.clear()
    with open(painted / "cohort.csv") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    refused = ["synthetic-0000", "synthetic-0001", "synthetic-0012", "synthetic-0015"]
    store = tmp_path / "store"
    shutil.copytree(painted / "store", store)
    for name in refused:
        shutil.rmtree(store / f"{name}.zarr")
        append_outcome(store, Outcome(name, f"{name}.svs", "no_tissue", "no stained tissue was found"))
    reviewed = store / "synthetic-0002.zarr" / "zarr.json"
    group = json.loads(reviewed.read_text())
    result = {"verdict": "review", "coverage": 0.6, "reasons": ["40% of the tissue is blurred"]}
    group["attributes"]["verdict"] |= result
    reviewed.write_text(json.dumps(group))
    small_config.data.store = str(store)
    plan = plan_run(small_config)
    names = [row.slide_id for row in plan.data.cohort.rows]
    assert names == [row.slide_id for row in all_slides.rows if row.slide_id not in refused]
    counts = {split: [rows[name]["subtype"] for name in refused if rows[name]["split"] == split] for split in SPLITS}
    text = "; ".join(
        f"{split}: {', '.join(f'{name} {of_split.count(name)}' for name in sorted(set(of_split)))}"
        for split, of_split in counts.items()
        if of_split
    )
    (line,) = [line for line in logged if "tiling refused" in line]
    assert f"tiling refused 4 of 21 slides, which are left out: {text}; 4 of 21 cases have no other slide" in line
    for name in refused:
        place = f"slide {name} ({rows[name]['split']}, {rows[name]['subtype']})"
        assert [line for line in logged if f"{place}: refused, no_tissue: no stained tissue was found" in line]
    assert "INFO QC results of 12 slides: accept 11, review 1" in logged
    subtype = rows["synthetic-0002"]["subtype"]
    expected = f"slide synthetic-0002 (train, {subtype}): review, 60% of the tissue kept; 40% of the tissue is blurred"
    assert f"INFO {expected}" in logged
    append_outcome(store, Outcome("synthetic-0000", "synthetic-0000.svs", "timeout", "took longer than 5 s"))
    with pytest.raises(InputError, match="1 of 13 slides of the cohort are not in the store"):
        plan_run(small_config)
