"""The whole validator on a simulated trial and on small ones: results, files, the page in a browser, and bad input."""

import csv
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError, OutputError
from crcjax.validation.study.sections import SECTIONS
from crcjax.validation.study.simulation.simulate_trial import simulate_trial
from crcjax.validation.study.validator import EPOCValidator

Write = Callable[..., Path]
# Cells of numbers whose text takes more lines than it has: an interval is broken.
BROKEN_CELLS = """() => [...document.querySelectorAll('td.n')].filter(cell => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  const lines = new Set([...range.getClientRects()].filter(box => box.width > 1).map(box => Math.round(box.top)));
  return lines.size > cell.textContent.split('\\n').length;
}).map(cell => cell.textContent)"""
FIELDS = ["id", "value", "ci_low", "ci_high", "level", "method", "n", "n_clusters", "n_excluded", "warnings"]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_trial(tmp_path_factory.mktemp("trial"))


@pytest.fixture(scope="module")
def report(trial: Path, crcjax, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    done = crcjax("validate", "--plan", trial, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "passed: Macro AUROC: " in done.stderr
    return out


def _results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def _estimates(results: dict) -> dict[str, dict]:
    return {estimate["id"]: estimate for estimate in results["estimates"]}


def test_every_estimate_has_all_fields_and_numbers_or_null(report: Path) -> None:
    results = _results(report)
    assert results["synthetic"]
    assert len(results["estimates"]) > 200
    for estimate in results["estimates"]:
        assert list(estimate) == FIELDS
        assert estimate["method"]
        assert estimate["value"] is not None or estimate["warnings"], estimate
        if None not in (limits := [estimate[name] for name in ("ci_low", "value", "ci_high")]):
            assert limits == sorted(limits), estimate
    ids = [estimate["id"] for estimate in results["estimates"]] + [test["id"] for test in results["tests"]]
    assert len(ids) == len(set(ids))
    assert [gate["verdict"] for gate in results["gates"]].count("passed") >= 2


def test_the_flow_ends_with_the_patients_that_are_analysed(report: Path) -> None:
    flow = _results(report)["flow"]
    assert [step["patients"] for step in flow] == [160, 156, 156, 153, 151, 150, 147]
    for before, after in itertools.pairwise(flow):
        assert before["patients"] - after["patients"] == sum(after["removed"].values())
    accuracy = _estimates(_results(report))
    assert accuracy["decisions.accuracy"]["n"] == 147
    assert accuracy["decisions.accuracy_all_comers"]["n"] == 150


def test_every_section_is_computed_and_shown_without_an_error_or_an_empty_figure(report: Path, browser) -> None:
    results = _results(report)
    assert [section["missing"] for section in results["sections"]] == [""] * len(SECTIONS)
    with browser(report / "report.html") as opened:
        assert opened.errors == []
        assert opened.overflow() == 0
        headings = opened.page.locator("main h2").all_inner_texts()
        titles = [f"{number} {title}" for number, _, title, _ in SECTIONS]
        assert headings == [
            "Flow of patients",
            "Primary endpoint",
            *titles,
            "Misclassified cases",
            "Plan and provenance",
        ]
        assert opened.empty_images() == []
        assert opened.page.locator("figure img").count() == len(list((report / "figures").glob("*.svg")))
        verdicts = opened.page.locator(".gates .verdict")
        assert verdicts.all_inner_texts() == [gate["verdict"] for gate in results["gates"]]
        assert opened.page.locator(".gates").bounding_box()["y"] < 400, "verdicts are the first thing on the page"
        assert opened.page.evaluate(BROKEN_CELLS) == []


def test_the_page_needs_nothing_and_says_what_it_is(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert 'src="http' not in page
    assert page.count("SYNTHETIC DATA") >= 3
    for words in ("FDA", "clinically validated", "compliant", "ground truth", "approved"):
        assert words not in page
    assert "Research use only" in page


def test_tables_and_figures_are_files_too(report: Path) -> None:
    with open(report / "tables" / "estimates.csv") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    results = _estimates(_results(report))
    assert set(rows) == set(results)
    assert float(rows["ranking.macro_auroc"]["ci_low"]) == results["ranking.macro_auroc"]["ci_low"]
    with open(report / "cases.csv") as file:
        cases = list(csv.DictReader(file))
    assert len(cases) == 147
    assert [row["is_correct"] for row in cases] == sorted(row["is_correct"] for row in cases)
    assert {"flow.svg", "confusion.svg", "bland_altman.svg", "km_pfs_reference.svg"} <= {
        path.name for path in (report / "figures").iterdir()
    }


@pytest.mark.slow
def test_the_same_tables_give_the_same_bytes(trial: Path, report: Path, tmp_path: Path) -> None:
    EPOCValidator(trial).write(tmp_path)
    for name in ("results.json", "report.html", "cases.csv"):
        assert (tmp_path / name).read_bytes() == (report / name).read_bytes(), name


def test_the_order_of_rows_and_the_names_of_patients_change_no_number(small_trial: Write, tmp_path: Path) -> None:
    plan = small_trial(data="", plan="")
    first = EPOCValidator(plan).run().estimates
    for name in ("p.csv", "c.csv"):
        lines = (tmp_path / name).read_text().splitlines()
        order = np.random.default_rng(1).permutation(len(lines) - 1) + 1
        text = "\n".join([lines[0], *(re.sub(r",c(\d+)", r",patient-\1", lines[place]) for place in order)])
        (tmp_path / name).write_text(text + "\n")
    second = EPOCValidator(plan).run().estimates
    assert list(first) == list(second)
    for id, estimate in first.items():
        other = second[id]
        assert estimate.value == pytest.approx(other.value, nan_ok=True), id
        if "bootstrap" not in estimate.method:
            assert estimate.ci_low == pytest.approx(other.ci_low, nan_ok=True), id


def test_a_plan_of_predictions_and_cohort_alone_says_what_the_study_lacks(small_trial: Write, tmp_path: Path) -> None:
    results = EPOCValidator(small_trial()).run()
    missing = {section.id: section.missing for section in results.sections if section.missing}
    assert missing["comparison"] == "The plan names no comparator (data.comparator and comparison)."
    assert missing["scanners"] == "The plan names no scanner study (scanners)."
    assert missing["survival"] == "The plan names no outcome (survival)."
    assert {"decisions", "ranking", "agreement", "calibration", "uncertainty", "sites"} & set(missing) == set()
    page = EPOCValidator(small_trial()).write(tmp_path / "out").read_text()
    assert "The plan names no scanner study" in page
    assert "SYNTHETIC" not in page
    assert "The plan states no gates: this report describes, and decides nothing." in page


def test_an_empty_class_and_a_single_site_are_one_message_each_and_no_wrong_number(small_trial: Write) -> None:
    plan = small_trial(cohort=lambda row: row | {"site": "north", "subtype": row["subtype"].replace("c", "b")})
    results = EPOCValidator(plan).run()
    assert results.messages == (
        "No analysed patient has the reference class c: statistics over all classes are not determined.",
        "All analysed patients are of one site (north): nothing follows for other sites.",
    )
    estimates = results.estimates
    for name in ("decisions.balanced_accuracy", "ranking.macro_auroc", "decisions.sensitivity.c", "ranking.auroc.c"):
        assert np.isnan(estimates[name].value), name
        assert estimates[name].warnings, name
    assert "class c" in estimates["decisions.balanced_accuracy"].warnings[0] or "c has" in str(
        estimates["decisions.balanced_accuracy"].warnings
    )
    assert np.isfinite(estimates["decisions.accuracy"].value)
    (sites,) = (section for section in results.sections if section.id == "sites")
    assert sites.missing == "Nothing can be said about other sites: all patients are of one site (north)."


def test_without_an_analysable_patient_the_flow_says_where_they_went(small_trial: Write) -> None:
    with pytest.raises(
        InputError, match=r"no patient of the population all has .*evaluable 60; reference available: analysed 0"
    ):
        EPOCValidator(small_trial(cohort=lambda row: row | {"subtype": ""})).run()


@pytest.mark.parametrize("patients", [1, 2, 3, 5])
def test_a_handful_of_patients_gives_a_report_and_no_exception(
    small_trial: Write, patients: int, tmp_path: Path
) -> None:
    plan = small_trial(cohort=lambda row: row if int(row["slide_id"][1:]) < patients else None)
    validator = EPOCValidator(plan)
    results = validator.run()
    validator.write(tmp_path / "out")
    assert results.estimates["decisions.accuracy"].n == patients
    assert any("descriptive" in message for message in results.messages)


def test_flags_replace_the_plans_tables(small_trial: Write, tmp_path: Path, crcjax) -> None:
    plan = small_trial()
    (tmp_path / "c.csv").rename(tmp_path / "moved.csv")
    assert crcjax("validate", "--plan", plan, "--out", tmp_path / "out").returncode == 2
    done = crcjax("validate", "--plan", plan, "--cohort", tmp_path / "moved.csv", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert _results(tmp_path / "out")["inputs"]["cohort"]["file"] == "moved.csv"
    refused = crcjax("validate", "--plan", plan, "--truth", tmp_path, "--out", tmp_path / "out")
    assert (refused.returncode, "--truth and --label are for a report without --plan" in refused.stderr) == (2, True)
    refused = crcjax("validate", "--predictions", tmp_path / "p.csv", "--out", tmp_path / "out")
    assert (refused.returncode, "give --plan, or both --predictions and --cohort" in refused.stderr) == (2, True)


def test_a_folder_that_cannot_be_written_is_named(small_trial: Write) -> None:
    with pytest.raises(OutputError, match="/proc/none: cannot be written"):
        EPOCValidator(small_trial()).write("/proc/none")
