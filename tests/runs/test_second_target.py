"""A target other than the subtype needs no other format."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

from crcjax.runs.bundle_export import export_bundle
from crcjax.train.loop import train
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.predictions_table import table_text


def test_another_target_and_cancer_pass_from_the_cohort_through_bundle_and_predictions_to_the_report(
    crcjax: Callable, small_config, painted: Path, tmp_path: Path
) -> None:
    with open(painted / "cohort.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["MSI Status"] = "MSI-H" if row.pop("subtype") == "immune" else "MSS"
        row["path"] = str(painted / row["path"])
    cohort = tmp_path / "cohort.csv"
    cohort.write_text(table_text(rows))
    small_config.data.cohort, small_config.data.label = str(cohort), "msi_status"
    small_config.data.classes, small_config.data.cancer_type = ("MSI-H", "MSS"), "endometrial"
    train(small_config, tmp_path / "run")

    bundle = export_bundle([tmp_path / "run"], tmp_path / "bundle")
    target = {"name": "msi_status", "classes": ["MSI-H", "MSS"], "cancer_type": "endometrial"}
    assert json.loads((bundle.path / "bundle.json").read_text())["target"] == target
    assert "msi_status of endometrial cancer" in (bundle.path / "model_card.md").read_text()
    assert not [file.name for file in bundle.path.iterdir() if b"subtype" in file.read_bytes()]

    by_store = ("--cohort", cohort, "--store", painted / "store", "--out", tmp_path / "out")
    assert crcjax("predict", "--bundle", bundle.path, *by_store).returncode == 0
    predictions = tmp_path / "out" / "predictions.csv"
    assert "subtype" not in predictions.read_text()
    table = load_predictions(predictions)
    assert (table.target_name, table.classes) == ("msi_status", ("MSI-H", "MSS"))
    assert [row.target for row in table.rows] == [row["MSI Status"] for row in rows]
    slide = crcjax("predict", rows[-1]["path"], "--bundle", bundle.path, "--cohort", cohort, "--out", tmp_path / "one")
    assert slide.returncode == 0, slide.stderr
    (one,) = load_predictions(tmp_path / "one" / "predictions.csv").rows
    assert (one.target, one.target_name) == (rows[-1]["MSI Status"], "msi_status")

    validated = crcjax("validate", "--predictions", predictions, "--cohort", cohort, "--out", tmp_path / "report")
    assert validated.returncode == 0, validated.stderr
    calibrate = ("--predictions", predictions, "--cohort", cohort, "--out", tmp_path / "calibration.json")
    assert crcjax("calibrate", *calibrate).returncode == 0
    other = crcjax("validate", *calibrate, "--label", "grade")
    assert (other.returncode, "no slide has a reference label; add the column grade" in other.stderr) == (2, True)
