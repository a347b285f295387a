"""Tables that are wrong, or that contradict each other or the plan, are refused in one line; scans are combined as planned."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.study.load_trial import load_trial
from crcjax.validation.study.read_plan import read_plan
from crcjax.validation.study.trial import Cases, Trial

Write = Callable[..., Path]


def _trial(path: Path) -> Trial:
    return load_trial(read_plan(path).plan)


def _cases(path: Path) -> Cases:
    trial = _trial(path)
    return trial.cases(trial.primary)


def _without(*names: str) -> Callable[[dict], dict]:
    return lambda row: {name: value for name, value in row.items() if name not in names}


def _at(slide: str, **change: str) -> Callable[[dict], dict]:
    return lambda row: row | change if row["slide_id"] == slide else row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": _without("case_id")}, r"p\.csv: has no column case_id; its columns are slide_id, p_a"),
        ({"predictions": _without("p_c")}, r"p\.csv: has no column p_c; its columns are"),
        ({"cohort": _without("case_id")}, r"c\.csv: has no column 'case_id'"),
        ({"predictions": _at("s1", p_a="0.9")}, r"p\.csv, line 3: .* are no probabilities that sum to 1; correct it"),
        ({"cohort": _at("s1", subtype="B")}, r"c\.csv, line 3: subtype 'B' is none of a, b, c"),
        ({"predictions": _at("s1", slide_id="s0")}, r"p\.csv, line 3: slide s0 is in two rows; keep one"),
        ({"cohort": _at("s1", slide_id="s0")}, r"c\.csv, line 3: slide_id 's0' is on line 2 too; rename one"),
        ({"predictions": _at("s1", case_id="c9")}, r"p\.csv: slide s1 has the case_id 'c9', and 'c1' in .*c\.csv"),
        ({"predictions": _at("s1", target="a")}, r"p\.csv: slide s1 has the target 'a', and 'b' in .*c\.csv; correct"),
        (
            {"predictions": lambda row: row | {"slide_id": "x" + row["slide_id"]}},
            r"c\.csv: has none of the 60 slides of",
        ),
        (
            {"plan": '[subgroups]\ncolumns = ["sex"]\n'},
            r"c\.csv: has no column 'sex', which the plan names in subgroups",
        ),
        (
            {"plan": '[reference]\nassay = "kit"\n'},
            r"c\.csv: has no column 'kit', which the plan names in reference\.assay",
        ),
        ({"plan": '[columns.cohort]\nsite = "centre"\n'}, r"c\.csv: has no column 'centre', which is named for site"),
        ({"data": 'readers = "r.csv"\n'}, r"r\.csv: cannot be read \(No such file or directory\)"),
    ],
)
def test_wrong_tables_are_one_line(small_trial: Write, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _trial(small_trial(**change))


def test_readings_are_checked_line_by_line(small_trial: Write, tmp_path: Path) -> None:
    plan = small_trial(data='readers = "r.csv"\n')
    for text, message in (
        ("case_id,reader\nc1,r\n", r"r\.csv: has no column 'call'"),
        ("case_id,reader,call\nc1,r,x\n", r"r\.csv, line 2: call must be one of a, b, c, got 'x'"),
        (
            "case_id,reader,call\nc1,r,a\nc1,r,b\n",
            r"r\.csv, line 3: r read case c1 twice; keep one, or add a column repeat",
        ),
    ):
        (tmp_path / "r.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            _trial(plan)
    (tmp_path / "r.csv").write_text("case_id,reader,call\nc1,r,a\nc2,r,\nc1,q,b\n")
    readings = _trial(plan).readings
    assert readings is not None
    assert readings.calls.tolist() == [[[0], [1]], [[-1], [-1]]]


def test_a_cohort_of_one_row_per_case_is_joined_by_case(small_trial: Write, tmp_path: Path) -> None:
    cases = _cases(small_trial(cohort=_without("slide_id")))
    assert cases.case_ids == _cases(small_trial()).case_ids
    doubled = small_trial(cohort=_without("slide_id"), predictions=_at("s1", case_id="c0"))
    with pytest.raises(
        InputError, match=r"has no column slide_id, and case c0 has several scans in .*p\.csv; add slide_id"
    ):
        _trial(doubled)


def test_columns_of_other_names_and_targets_in_the_predictions_are_read(small_trial: Write) -> None:
    def renamed(row: dict) -> dict:
        return {"patient" if name == "case_id" else name: value for name, value in row.items()}

    names = '[columns.predictions]\ncase_id = "patient"\n[columns.cohort]\ncase_id = "patient"\n'
    plan = small_trial(plan=names, predictions=renamed, cohort=renamed)
    np.testing.assert_array_equal(_cases(plan).label, _cases(small_trial()).label)
    labels = dict(zip((f"s{n}" for n in range(60)), 20 * "abc", strict=True))
    plan = small_trial(cohort=_without("subtype"), predictions=lambda row: row | {"target": labels[row["slide_id"]]})
    np.testing.assert_array_equal(_cases(plan).label, _cases(small_trial()).label)


@pytest.mark.parametrize("aggregation", ["mean_log_probability", "mean_probability", "first_scan"])
def test_scans_of_a_patient_are_combined_as_the_plan_says(small_trial: Write, aggregation: str) -> None:
    def pairs(row: dict) -> dict:
        return row | {
            "case_id": f"c{int(row['slide_id'][1:]) // 2 * 2}",
            **({"subtype": "a"} if "subtype" in row else {}),
        }

    plan = small_trial(plan=f'[patients]\naggregation = "{aggregation}"\n', predictions=pairs, cohort=pairs)
    cases = _cases(plan)
    first, second = (np.array(scan.row.probs) for scan in cases.patients[3].scans)
    combined = {
        "mean_log_probability": np.sqrt(first * second) / np.sqrt(first * second).sum(),
        "mean_probability": (first + second) / 2,
        "first_scan": first,
    }[aggregation]
    assert len(cases) == 30
    np.testing.assert_allclose(cases.probs[3], combined)


def test_the_tables_own_call_decides_for_a_patient_with_one_scan(small_trial: Write) -> None:
    cases = _cases(small_trial(predictions=lambda row: row | {"call": "c"}))
    assert set(cases.call.tolist()) == {2}


def test_training_and_validation_cases_are_left_out_but_not_cross_validated_ones(small_trial: Write) -> None:
    trained = _at("s1", split="train")
    assert len(_cases(small_trial(cohort=trained))) == len(_cases(small_trial(predictions=trained))) == 59
    folded = small_trial(cohort=trained, predictions=lambda row: row | {"fold": "1"})
    assert len(_cases(folded)) == 60


def test_a_population_keeps_the_scans_with_the_named_values(small_trial: Write) -> None:
    plan = small_trial(plan='[[populations]]\nid = "north"\nwhere = { site = ["north"], age = ["51", "52"] }\n')
    cases = _cases(plan)
    assert set(cases.values("site").tolist()) == {"north"}
    assert set(cases.numbers("age").tolist()) == {51.0, 52.0}
    with pytest.raises(InputError, match=r"column site must hold numbers, got 'north' for case c1"):
        cases.numbers("site")
