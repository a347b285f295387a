import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError, OutputError
from crcjax.slides.synthetic.truth import Truth
from crcjax.validation.attention_truth import attention_auroc
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.report import LISTED_CASES, validate

CLASSES = ("canonical", "immune", "stromal")


def _write(folder: Path, rows: list[dict], name: str) -> Path:
    path = folder / name
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return path


def _prediction(slide: str, probs: list[float], **other: str) -> dict:
    row = {"slide_id": slide, "case_id": slide, "subtype": CLASSES[int(np.argmax(probs))]}
    row |= {f"p_{name}": str(value) for name, value in zip(CLASSES, probs, strict=True)}
    return row | {"status": "ok", "reason": "", "model": "abc", "synthetic": "yes"} | other


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    predictions, cohort = [], []
    for i in range(34):
        label = i % 3
        probs = rng.dirichlet(np.eye(3)[label] * 3 + 0.5).round(4)
        probs[2] = round(1 - probs[0] - probs[1], 4)
        predictions.append(_prediction(f"s{i}", probs.tolist()))
        cohort.append(
            {"slide_id": f"s{i}", "case_id": f"c{i}", "subtype": CLASSES[label], "split": "test" if i < 30 else "train"}
        )
    refused = _prediction("bad", [0, 0, 1], status="corrupt", reason="the file is empty")
    predictions.append(refused | {f"p_{name}": "" for name in CLASSES})
    cohort.append({"slide_id": "bad", "case_id": "bad", "subtype": "immune", "split": "test"})
    cohort.append({"slide_id": "left out", "case_id": "left out", "subtype": "immune", "split": "test"})
    return _write(tmp_path, predictions, "predictions.csv"), _write(tmp_path, cohort, "cohort.csv")


def test_the_report_is_one_self_contained_page_that_says_synthetic(tables, tmp_path: Path) -> None:
    result = validate(*tables, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("SYNTHETIC SLIDES") >= 2
    for word in ("FDA", "clinically validated", "compliant", "approved"):
        assert word not in page
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert saved["statistics"]["balanced_accuracy"]["value"] == result["statistics"]["balanced_accuracy"]["value"]
    assert f"{saved['statistics']['macro AUROC']['value']:.3f}" in page


def test_training_cases_and_failed_slides_are_counted_and_not_evaluated(tables, tmp_path: Path) -> None:
    result = validate(*tables, tmp_path / "out")
    flow = result["flow"]
    assert flow["slides evaluated"] == flow["cases evaluated"] == 30
    assert flow["slides of training and validation cases, not evaluated"] == 4
    assert flow["slides without a prediction"] == flow["cases without any prediction (no-calls)"] == 1
    assert flow["cases of the cohort that were not given to crcjax predict"] == 1
    with_no_calls = result["statistics"]["accuracy, no-calls counted wrong"]
    assert with_no_calls["n"] == 31
    assert with_no_calls["value"] == pytest.approx(result["statistics"]["accuracy"]["value"] * 30 / 31)
    assert "the file is empty" in (tmp_path / "out" / "report.html").read_text()


def test_slides_that_tiling_refused_are_no_calls_and_qc_results_are_in_the_flow_and_on_the_page(
    tables, tmp_path: Path
) -> None:
    def with_qc(row: dict) -> dict:
        qc = {
            "s0": {"qc_status": "reject", "qc_coverage": "0.2", "qc_reasons": "80% of the tissue is blurred"},
            "s1": {"qc_status": "review", "qc_coverage": "0.7", "qc_reasons": "only 70% of the tissue was kept"},
            "s33": {"qc_status": "reject", "qc_coverage": "0.1", "qc_reasons": "of a training case"},
            "bad": {"qc_status": "refused", "qc_coverage": "0", "qc_reasons": "no stained tissue was found"},
        }.get(row["slide_id"], {"qc_status": "accept", "qc_coverage": "1", "qc_reasons": ""})
        return row | qc

    result = validate(_rewritten(tables[0], tmp_path, "qc.csv", with_qc), tables[1], tmp_path / "out")
    flow = result["flow"]
    assert flow["slides that tiling refused"] == flow["cases without any prediction (no-calls)"] == 1
    assert flow["evaluated slides with the QC status reject"] == flow["evaluated slides with the QC status review"] == 1
    assert result["no-calls by subtype"] == {"canonical": 0, "immune": 1, "stromal": 0}
    assert result["statistics"]["no-call rate"]["value"] == pytest.approx(1 / 31)
    page = (tmp_path / "out" / "report.html").read_text()
    section = page[page.index("did not accept") : page.index("Agreement with")]
    slides = re.findall(r"<tr><td>(\w+)</td><td>(\w+)</td><td>(\w+)</td>\s*<td class=\"n\">(\d+ %)</td>", section)
    assert slides == [
        ("bad", "immune", "refused", "0 %"),
        ("s0", "canonical", "reject", "20 %"),
        ("s1", "immune", "review", "70 %"),
    ]
    assert "no stained tissue was found</td><td>no-call" in section
    assert "80% of the tissue is blurred" in section
    assert "No-calls by reference subtype:\nimmune 1." in page


def test_cases_that_the_run_was_trained_on_are_not_evaluated_whatever_the_cohort_says(tables, tmp_path: Path) -> None:
    with open(tables[0]) as file:
        rows = [row | {"split": "train" if row["slide_id"] == "s0" else ""} for row in csv.DictReader(file)]
    flow = validate(_write(tmp_path, rows, "seen.csv"), tables[1], tmp_path / "out")["flow"]
    assert flow["slides evaluated"] == 29
    assert flow["slides of training and validation cases, not evaluated"] == 5


def test_the_same_tables_give_the_same_report(tables, tmp_path: Path) -> None:
    for name in ("one", "two"):
        validate(*tables, tmp_path / name)
    for file in ("metrics.json", "report.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_immune": "0.9"}, "line 2: .* are no probabilities that sum to 1"),
        ({"p_immune": "nan"}, "line 2: .* are no probabilities"),
        ({"slide_id": "s1"}, "line 3: slide s1 is in two rows"),
    ],
)
def test_wrong_predictions_are_refused_by_the_line(tables, tmp_path: Path, change: dict, message: str) -> None:
    with open(tables[0]) as file:
        rows = list(csv.DictReader(file))
    rows[0] |= change
    with pytest.raises(InputError, match=message):
        validate(_write(tmp_path, rows, "wrong.csv"), tables[1], tmp_path / "out")


def test_tables_that_do_not_belong_together_and_unwritable_folders_are_errors(tables, tmp_path: Path) -> None:
    other = _write(tmp_path, [{"slide_id": "x", "case_id": "x", "subtype": "immune"}], "other.csv")
    with pytest.raises(
        InputError,
        match=r"other\.csv: has none of the 35 slides of .*predictions\.csv \(first: s0\); check that the slide ids agree",
    ):
        validate(tables[0], other, tmp_path / "out")
    with pytest.raises(InputError, match=r"has no column p_CLASS of each class"):
        validate(other, tables[1], tmp_path / "out")
    with pytest.raises(OutputError, match="/proc/none: cannot be written"):
        validate(*tables, Path("/proc/none"))


def test_attention_on_the_carriers_scores_one_and_off_them_zero(tmp_path: Path) -> None:
    kinds = np.full((40, 40), 3, np.uint8)
    kinds[:20] = 5  # lymphoid tissue carries the immune subtype
    truth = Truth("immune", kinds, ("",) * 9, 16.0, (0.0,) * 3, (0.0,) * 3, (255, 255, 255), {}, 0, "")
    origin = np.array([[x * 256, y * 256] for y in range(5) for x in range(5)], np.int32)
    on_carriers = origin[:, 1] * 0.5 + 64 <= 20 * 16
    for attention, expected in ((on_carriers, 1.0), (~on_carriers, 0.0)):
        np.savez(tmp_path / "a.npz", origin=origin, region_px=256, mpp=0.5, attention=attention.astype(np.float32))
        assert attention_auroc(truth, tmp_path / "a.npz") == expected
    with pytest.raises(InputError, match="holds no attention of a slide"):
        attention_auroc(truth, tmp_path / "none.npz")


def _rewritten(path: Path, folder: Path, name: str, change: Callable[[dict], dict]) -> Path:
    with open(path) as file:
        return _write(folder, [change(row) for row in csv.DictReader(file)], name)


def test_without_a_column_subtype_the_predicted_class_is_the_most_probable(tables, tmp_path: Path) -> None:
    def without(row: dict) -> dict:
        return {name: value for name, value in row.items() if name != "subtype"}

    wanted = validate(*tables, tmp_path / "one")
    bare = _rewritten(tables[0], tmp_path, "bare.csv", without)
    result = validate(bare, tables[1], tmp_path / "two")
    assert result["statistics"] == wanted["statistics"]
    assert [row.call for row in load_predictions(bare).rows] == [row.call for row in load_predictions(tables[0]).rows]
    with pytest.raises(InputError, match=r"cohort.csv: no slide has a reference label; add the column subtype"):
        validate(tables[0], _rewritten(tables[1], tmp_path, "other-cohort.csv", without), tmp_path / "out")


def test_a_slide_of_another_case_than_in_the_cohort_is_named(tables, tmp_path: Path) -> None:
    other = _rewritten(tables[0], tmp_path, "other.csv", lambda row: row | {"case_id": f"x-{row['slide_id']}"})
    with pytest.raises(InputError, match=r"35 slides have another case_id than in .* slide s0 has 'x-s0' and 'c0'"):
        validate(other, tables[1], tmp_path / "out")


def test_slides_without_a_prediction_are_counted_once_and_the_page_lists_a_hundred_cases(tmp_path: Path) -> None:
    predictions = [_prediction(f"s{i:03}", [0.2, 0.7, 0.1]) for i in range(300)]
    cohort = [{"slide_id": f"s{i:03}", "case_id": f"s{i:03}", "subtype": CLASSES[i % 3]} for i in range(300)]
    for i, row in enumerate(predictions[-20:]):
        row |= {"status": "corrupt", "reason": "the file is empty"} | dict.fromkeys(("p_immune", "subtype"), "")
        cohort[280 + i]["subtype"] = "immune" if i < 5 else ""
    tables = _write(tmp_path, predictions, "predictions.csv"), _write(tmp_path, cohort, "cohort.csv")
    result = validate(*tables, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert result["flow"]["slides without a prediction"] == 5
    assert '<td>corrupt: the file is empty</td><td class="n">5</td>' in page
    assert page.count('<tr class="wrong"><td>') == LISTED_CASES
    assert "100 of 280 cases" in page
    with open(tmp_path / "out" / "cases.csv") as file:
        assert len(list(csv.DictReader(file))) == 280


def test_classes_of_any_name_and_absent_ones_give_a_report_without_warnings(tmp_path: Path) -> None:
    """Warnings are errors in the tests; matplotlib warns of a legend without curves."""
    rows = [
        {"slide_id": f"s{i}", "case_id": f"s{i}", "status": "ok", "reason": "", "model": "m"}
        | {"p_CMS1": 0.6, "p_CMS2": 0.3, "p_CMS3": 0.1}
        for i in range(6)
    ]
    cohort = [{"slide_id": f"s{i}", "case_id": f"s{i}", "subtype": "CMS1"} for i in range(6)]
    tables = _write(tmp_path, rows, "predictions.csv"), _write(tmp_path, cohort, "cohort.csv")
    result = validate(*tables, tmp_path / "out", truth=tmp_path)
    assert set(result["attention"]) == {"CMS1", "CMS2", "CMS3", "all subtypes"}
    assert result["statistics"]["accuracy"]["value"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<td class="n">not determined</td>' in page
    assert "not determined to" not in page
