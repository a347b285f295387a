"""Published tables through the command line give the published figures."""

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from crcjax.validation.agreement import krippendorff_alpha

pytestmark = pytest.mark.real_data
Validate = Callable[..., tuple[dict, dict]]


@pytest.fixture
def validate(crcjax, tmp_path: Path) -> Validate:
    """validate(plan): the estimates and tests of results.json, by id."""

    def run(plan: str) -> tuple[dict, dict]:
        path = tmp_path / "plan.toml"
        path.write_text('title = "Published table"\nversion = "1"\nseed = 0\nresamples = 200\n' + plan)
        done = crcjax("validate", "--plan", path, "--out", tmp_path / "report")
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / "report" / "results.json").read_text())
        return tuple({entry["id"]: entry for entry in results[name]} for name in ("estimates", "tests"))  # type: ignore[return-value]

    return run


@pytest.fixture(scope="module")
def expected(real_data: Path) -> dict:
    return json.loads((real_data / "stats" / "expected.json").read_text())


def _rows(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from csv.DictReader(file)


def test_583_predictions_of_microsatellite_instability(real_data: Path, validate: Validate, expected: dict) -> None:
    table = real_data / "tables" / "histobistro_msi_predictions_583.csv"
    estimates, _ = validate(
        f'classes = ["0", "1"]\n[data]\npredictions = "{table}"\ncohort = "{table}"\n'
        '[columns.predictions]\ncase_id = "patient"\nlogit = "logits"\ntarget = "ground_truth"\n'
        '[columns.cohort]\ncase_id = "patient"\nsubtype = "ground_truth"\n'
    )
    known = expected["histobistro_583"]
    auroc = estimates["ranking.auroc.1"]
    assert auroc["n"] == known["n"]
    assert auroc["value"] == pytest.approx(known["auroc"], abs=1e-12)
    logits = np.log([x / (1 - x) for x in (auroc["ci_low"], auroc["value"], auroc["ci_high"])])
    slope = auroc["value"] * (1 - auroc["value"])
    assert (logits[2] - logits[0]) / 2 / 1.959963984540054 * slope == pytest.approx(known["delong_se"], rel=1e-9)
    assert estimates["ranking.average_precision.1"]["value"] == pytest.approx(known["auprc_sklearn_AP"], abs=1e-12)


def test_two_experts_of_160_tiles(real_data: Path, validate: Validate, write_csv, tmp_path: Path) -> None:
    tiles = list(_rows(real_data / "tables" / "histobistro_two_experts_160_tiles.csv"))
    classes = sorted({row[f"expert{n}_first"] for row in tiles for n in (1, 2)})
    names = [f"{row['patient']}-{row['tile']}" for row in tiles]
    write_csv(
        tmp_path / "p.csv", [{"case_id": n, "call": row["expert1_first"]} for n, row in zip(names, tiles, strict=True)]
    )
    write_csv(
        tmp_path / "c.csv",
        [{"case_id": n, "subtype": row["expert2_first"]} for n, row in zip(names, tiles, strict=True)],
    )
    estimates, _ = validate(f'classes = {json.dumps(classes)}\n[data]\npredictions = "p.csv"\ncohort = "c.csv"\n')
    assert round(estimates["agreement.kappa"]["value"], 3) == 0.311
    assert estimates["agreement.overall"]["value"] == 0.7875


def test_37_readers_of_640_regions(real_data: Path, validate: Validate, write_csv, tmp_path: Path) -> None:
    """The majority is both system and reference; every reader reads regions once or more, and some not at all."""
    calls: dict[tuple[str, str], str] = {}
    for row in _rows(real_data / "tables" / "didsr_pilotHTT_tils_multireader.csv.gz"):
        calls.setdefault((row["caseID"], row["readerID"]), row["labelROI"])
    cases, readers = (sorted({key[part] for key in calls}) for part in (0, 1))
    classes = sorted(set(calls.values()))
    ratings = np.array([[classes.index(calls[c, r]) if (c, r) in calls else -1 for r in readers] for c in cases])
    majority = [classes[int(np.bincount(row[row >= 0]).argmax())] for row in ratings]
    write_csv(tmp_path / "r.csv", [{"case_id": c, "reader": r, "call": call} for (c, r), call in calls.items()])
    write_csv(tmp_path / "p.csv", [{"case_id": c, "call": call} for c, call in zip(cases, majority, strict=True)])
    write_csv(tmp_path / "c.csv", [{"case_id": c, "subtype": call} for c, call in zip(cases, majority, strict=True)])
    data = '[data]\npredictions = "p.csv"\ncohort = "c.csv"\nreaders = "r.csv"\n'
    estimates, _ = validate(f"classes = {json.dumps(classes)}\n{data}")
    assert (len(readers), len(cases)) == (37, 640)
    alpha = estimates["agreement.readers.alpha"]
    assert alpha["value"] == pytest.approx(
        krippendorff_alpha(ratings, len(classes), 0, replicates=100).value, abs=1e-12
    )
    assert estimates["agreement.readers.system"]["value"] > estimates["agreement.readers.pairwise"]["value"]


def _survival(write_csv, name: str, rows: list[dict], folder: Path, further: str = "") -> str:
    """A plan whose classes are the groups of a table, called without an error."""
    write_csv(folder / "c.csv", rows)
    write_csv(folder / "p.csv", [{"case_id": row["case_id"], "call": row["subtype"]} for row in rows])
    classes = sorted({row["subtype"] for row in rows}, key=lambda group: (group != "Obs", group))
    return (
        f'classes = {json.dumps(classes)}\n[data]\npredictions = "p.csv"\ncohort = "c.csv"\n[[survival]]\nid = "{name}"\n'
        f'title = "{name}"\ntime = "time"\nevent = "event"\ntime_zero = "study entry"\nunit = "days"\nhorizon = 100\n{further}'
    )


def test_colon_cancer_trial(real_data: Path, validate: Validate, expected: dict, write_csv, tmp_path: Path) -> None:
    rows = [
        {"case_id": row["id"], "subtype": row["rx"], "time": row["time"], "event": row["status"]}
        for row in _rows(real_data / "stats" / "colon.csv")
        if row["etype"] == "2"
    ]
    estimates, tests = validate(_survival(write_csv, "colon", rows, tmp_path))
    known = expected["logrank_colon_death_rx3"]
    test = tests["survival.colon.log_rank.reference"]
    assert (test["statistic"], test["df"]) == (pytest.approx(known["chisq"], rel=1e-9), known["df"])
    known = expected["cox_colon_death_rx"]
    for group, name in (("Lev", "lev"), ("Lev+5FU", "lev5fu")):
        ratio = estimates[f"survival.colon.hazard_ratio.reference.{group}"]
        assert np.log(ratio["value"]) == pytest.approx(known["statsmodels_coef"][name], abs=1e-6)
        width = np.log(ratio["ci_high"] / ratio["ci_low"]) / 2 / 1.959963984540054
        assert width == pytest.approx(known["se"][name], abs=1e-6)


def test_lung_cancer_by_sex(real_data: Path, validate: Validate, expected: dict, write_csv, tmp_path: Path) -> None:
    rows = [
        {"case_id": str(number), "subtype": row["sex"], "time": row["time"], "event": row["status"]}
        | {"age": row["age"], "ecog": row["ph.ecog"]}
        for number, row in enumerate(_rows(real_data / "stats" / "lung.csv"))
    ]
    estimates, tests = validate(_survival(write_csv, "lung", rows, tmp_path, 'adjust = ["age", "ecog"]\n'))
    known = expected["logrank_lung_sex"]
    assert tests["survival.lung.log_rank.reference"]["statistic"] == pytest.approx(known["chisq"], rel=1e-9)
    known = expected["cox_lung_age_sex_ecog"]
    ratio = estimates["survival.lung.adjusted_hazard_ratio.reference.2"]
    assert np.log(ratio["value"]) == pytest.approx(known["statsmodels_coef"]["sex"], abs=1e-6)
    assert (ratio["n"], ratio["n_excluded"]) == (known["n"], 1)


def test_recidivism_of_rossi(real_data: Path, validate: Validate, expected: dict, write_csv, tmp_path: Path) -> None:
    others = ("age", "race", "wexp", "mar", "paro", "prio")
    rows = [
        {"case_id": str(number), "subtype": row["fin"], "time": row["week"], "event": row["arrest"]}
        | {name: row[name] for name in others}
        for number, row in enumerate(_rows(real_data / "stats" / "rossi.csv"))
    ]
    plan = _survival(write_csv, "rossi", rows, tmp_path, f"adjust = {json.dumps(others)}\n").replace(
        "horizon = 100", "horizon = 52"
    )
    ratio = validate(plan)[0]["survival.rossi.adjusted_hazard_ratio.reference.1"]
    known = expected["cox_rossi"]
    assert np.log(ratio["value"]) == pytest.approx(known["statsmodels_coef"]["fin"], abs=1e-6)
    assert ratio["n"] == known["n"]
