"""Published and real tables: 583 MSI predictions, two experts, 37 readers, and the kappas of R and SAS."""

import csv
import gzip
import json

import numpy as np
import pytest
from scipy import stats

from crcjax.validation.agreement import MISSING, cohen_kappa, fleiss_kappa, kappa_of_units, krippendorff_alpha
from crcjax.validation.precision_recall import average_precision
from crcjax.validation.ranking import auroc_estimate

pytestmark = pytest.mark.real_data
Z = stats.norm.ppf(0.975)


@pytest.fixture(scope="module")
def expected(real_data) -> dict:
    return json.loads((real_data / "stats" / "expected.json").read_text())


def _rows(path) -> list[dict]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


def test_583_predictions_of_msi_have_the_recorded_auroc_error_and_average_precision(real_data, expected) -> None:
    rows, wanted = _rows(real_data / "tables" / "histobistro_msi_predictions_583.csv"), expected["histobistro_583"]
    positive, score = (
        np.array([row["ground_truth"] == "1" for row in rows]),
        np.array([float(row["logits"]) for row in rows]),
    )
    assert (len(positive), positive.sum()) == (wanted["n"], wanted["pos"])
    estimate = auroc_estimate(positive, score)
    assert estimate.value == pytest.approx(wanted["auroc"], abs=1e-9)
    width = np.diff(stats.logistic.ppf([estimate.ci_low, estimate.ci_high]))[0] / 2 / Z
    assert width * estimate.value * (1 - estimate.value) == pytest.approx(wanted["delong_se"], abs=1e-9)
    area = average_precision(positive, score, 0, replicates=200).area
    assert area.value == pytest.approx(wanted["auprc_sklearn_AP"], abs=1e-9)


def test_two_experts_agree_on_160_tiles_with_the_recorded_kappa_by_patient(real_data) -> None:
    rows = _rows(real_data / "tables" / "histobistro_two_experts_160_tiles.csv")
    names, cells = np.unique([[row["expert1_first"], row["expert2_first"]] for row in rows], return_inverse=True)
    first, second = cells.reshape(-1, 2).T
    _, patient = np.unique([row["patient"] for row in rows], return_inverse=True)
    by_tile = kappa_of_units(first, second, len(names))
    by_patient = kappa_of_units(first, second, len(names), patient)
    assert by_patient.value == pytest.approx(0.311, abs=5e-4)
    assert by_tile.value == by_patient.value
    assert by_patient.n_clusters == len(np.unique(patient))


def test_37_readers_have_an_alpha_with_their_many_missing_ratings(real_data) -> None:
    rows = _rows(real_data / "tables" / "didsr_pilotHTT_tils_multireader.csv.gz")
    readers = {name: i for i, name in enumerate(sorted({row["readerID"] for row in rows}))}
    cases = {name: i for i, name in enumerate(sorted({row["caseID"] for row in rows}))}
    labels = {name: i for i, name in enumerate(sorted({row["labelROI"] for row in rows} - {""}))}
    ratings = np.full((len(cases), len(readers)), MISSING)
    for row in rows:
        ratings[cases[row["caseID"]], readers[row["readerID"]]] = labels.get(row["labelROI"], MISSING)
    alpha = krippendorff_alpha(ratings, len(labels), seed=0, replicates=500)
    assert len(readers) == 37
    assert (alpha.n, alpha.n_excluded) == (640 - alpha.n_excluded, int(((ratings != MISSING).sum(axis=1) < 2).sum()))
    # The mean over cases of how often two readers agree, against how often two readers of any case would.
    counts = np.stack([(ratings == k).sum(axis=1) for k in range(len(labels))], axis=1)
    counts = counts[counts.sum(axis=1) >= 2]
    size, total = counts.sum(axis=1), counts.sum(axis=0)
    disagree = (size**2 - (counts**2).sum(axis=1)) @ (1 / (size - 1))
    by_chance = (total.sum() ** 2 - (total**2).sum()) / (total.sum() - 1)
    assert alpha.value == pytest.approx(1 - disagree / by_chance)
    assert alpha.ci_low < alpha.value < alpha.ci_high


def test_kappas_equal_those_of_r_and_sas(expected) -> None:
    published = expected["kappa"]
    for name, scale in (("sas_unweighted", "nominal"), ("sas_linear_weighted", "linear")):
        estimate, wanted = cohen_kappa(np.array(published["sas_table"]), scale), published[name]
        assert estimate.value == pytest.approx(wanted["kappa"], abs=5e-5)
        assert (estimate.ci_low, estimate.ci_high) == pytest.approx(wanted["ci"], abs=1e-4)
        assert (estimate.ci_high - estimate.ci_low) / 2 / Z == pytest.approx(wanted["ase"], abs=5e-5)
    wanted = published["anxiety_raters23_dropping_empty_category4"]
    ratings = np.array(published["anxiety_20x3_F_order"]).reshape(20, 3, order="F")[:, 1:]
    _, classes = np.unique(ratings, return_inverse=True)
    first, second = classes.reshape(20, 2).T
    for name, scale in (("unweighted", "nominal"), ("linear", "linear"), ("quadratic", "quadratic")):
        assert kappa_of_units(first, second, 5, scale=scale).value == pytest.approx(wanted[name]["kappa"], abs=1e-7)
    diagnoses = np.array(published["diagnoses_fleiss1971"]) - 1
    assert fleiss_kappa(diagnoses, 5, 0, 50).value == pytest.approx(published["diagnoses_fleiss_kappa"], abs=1e-7)
