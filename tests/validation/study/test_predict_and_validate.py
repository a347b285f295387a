"""One command predicts slides with a bundle, with and without stain normalisation, and validates by a plan."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from crcjax.runs.bundle_export import export_bundle
from crcjax.slides.stain.methods import METHODS
from crcjax.slides.stain.normalisation import StainNormaliser

PLAN = """title = "Painted slides"
version = "1"
classes = ["canonical", "immune", "stromal"]
seed = 1
resamples = 200
[data]
cohort = "cohort.csv"
"""


@pytest.fixture
def normalising_bundle(run: Path, tmp_path: Path) -> Path:
    """A bundle of a run with Macenko normalisation."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["stain"]["method"] = "macenko"
    (copy / "config.json").write_text(json.dumps(config))
    facts = json.loads((copy / "run.json").read_text())
    facts["stain"] = StainNormaliser("macenko", METHODS["macenko"][1]).to_json()
    (copy / "run.json").write_text(json.dumps(facts))
    return export_bundle([copy], tmp_path / "bundle").path


@pytest.mark.slow
def test_a_bundle_and_a_plan_give_predictions_with_and_without_normalisation_and_their_comparison(
    normalising_bundle: Path, painted: Path, tmp_path: Path, crcjax
) -> None:
    with open(painted / "cohort.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    with open(tmp_path / "cohort.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(row | {"path": str(painted / row["path"])} for row in rows)
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    plan.write_text(PLAN)
    done = crcjax("validate", "--plan", plan, "--bundle", normalising_bundle, "--out", out)
    assert done.returncode == 0, done.stderr
    tables = []
    for folder in ("predictions", "predictions-without-normalisation"):
        with open(out / folder / "predictions.csv") as file:
            tables.append({row["slide_id"]: row for row in csv.DictReader(file)})
    assert set(tables[0]) == set(tables[1]) == {row["slide_id"] for row in rows}
    assert {row["pipeline_id"] for row in tables[0].values()} != {row["pipeline_id"] for row in tables[1].values()}
    assert [row["p_immune"] for row in tables[0].values()] != [row["p_immune"] for row in tables[1].values()]
    results = json.loads((out / "results.json").read_text())
    assert set(results["inputs"]) == {"predictions", "without_normalisation", "cohort"}
    estimates = {estimate["id"]: estimate["value"] for estimate in results["estimates"]}
    for name, of_table in zip(("with", "without"), tables, strict=True):
        correct = [of_table[row["slide_id"]]["call"] == row["subtype"] for row in rows]
        assert estimates[f"scanners.normalisation.{name}"] == pytest.approx(sum(correct) / len(correct))

    refused = crcjax("validate", "--bundle", normalising_bundle, "--out", tmp_path / "none")
    assert (refused.returncode, "--bundle needs --plan" in refused.stderr) == (2, True)
    refused = crcjax("validate", "--plan", plan, "--slides", painted, "--out", tmp_path / "none")
    assert (refused.returncode, "--slides, --trust and --encoder-weights are for a --bundle" in refused.stderr) == (
        2,
        True,
    )
    weights = ("--encoder-weights", tmp_path / "weights.safetensors")
    refused = crcjax("validate", "--plan", plan, "--bundle", normalising_bundle, *weights, "--out", tmp_path / "none")
    assert (refused.returncode, "needs no weights of a published encoder" in refused.stderr) == (2, True)
    plan.write_text(PLAN + 'gate = "x"\n')
    refused = crcjax("validate", "--plan", plan, "--bundle", normalising_bundle, "--out", tmp_path / "none")
    assert (refused.returncode, "data.gate is no field" in refused.stderr) == (2, True)
    assert not (tmp_path / "none").exists(), "a mistake in the plan is found before slides are predicted"
