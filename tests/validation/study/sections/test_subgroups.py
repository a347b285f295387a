"""Subgroups, decision curves and planning by a plan: the same numbers as plain formulas, and errors that name the field."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.study.section import Section
from crcjax.validation.study.validator import EPOCValidator

Write = Callable[..., Path]
PLAN = """
[reference]
reliability = 0.9
[subgroups]
columns = ["site", "sex"]
[[decisions]]
class = "b"
decision = "less treatment"
thresholds = [0.2, 0.6]
rationale = "a test"
[[precision]]
estimate = "accuracy"
expected = 0.8
half_width = 0.1
[[precision]]
estimate = "sensitivity"
class = "a"
expected = 0.8
half_width = 0.05
"""


def _with_sex(row: dict) -> dict:
    number = int(row["slide_id"][1:])
    return row | {"sex": "" if number < 4 else "f" if number % 2 else "m"}


@pytest.fixture
def study(small_trial: Write, tmp_path: Path) -> tuple[dict[str, Section], list[dict[str, str]], Path]:
    """The sections by id, the analysed cases, and the folder of the report."""
    validator = EPOCValidator(small_trial(plan=PLAN, cohort=_with_sex))
    sections = {section.id: section for section in validator.run().sections}
    out = tmp_path / "out"
    validator.write(out)
    with open(out / "cases.csv") as file:
        return sections, list(csv.DictReader(file)), out


def test_subgroups_decisions_and_planning_are_computed_as_the_plan_says(study) -> None:
    sections, cases, out = study
    subgroups = {id: estimate for id, (_, estimate) in sections["subgroups"].estimates.items()}
    north = np.array([row["is_correct"] == "yes" for row in cases if row["site"] == "north"])
    south = np.array([row["is_correct"] == "yes" for row in cases if row["site"] == "south"])
    assert subgroups["subgroups.accuracy.site.north"].value == pytest.approx(north.mean())
    difference = subgroups["subgroups.accuracy_difference.site.south"]
    assert difference.value == pytest.approx(south.mean() - north.mean())
    assert difference.ci_low < difference.value < difference.ci_high
    assert subgroups["subgroups.accuracy_gap.site"].value == pytest.approx(abs(south.mean() - north.mean()))
    assert subgroups["subgroups.accuracy.sex.missing"].n == 4
    assert "suppressed: fewer than 10 patients" in subgroups["subgroups.accuracy.sex.missing"].warnings
    of_class = [row for row in cases if row["site"] == "north" and row["reference"] == "b"]
    assert subgroups["subgroups.sensitivity.b.site.north"].n == len(of_class)
    assert {id for id in sections["subgroups"].tests if id.endswith(".site")} == {
        f"subgroups.{metric}.site" for metric in ("accuracy", "macro_auroc", *(f"sensitivity.{c}" for c in "abc"))
    }

    is_b, risk = (np.array([row["reference"] == "b" for row in cases]), np.array([float(row["p_b"]) for row in cases]))
    acted = risk >= 0.4
    net_benefit = ((acted & is_b).sum() - (acted & ~is_b).sum() * 0.4 / 0.6) / len(cases)
    assert sections["usefulness"].estimates["usefulness.net_benefit.b.0.4"][1].value == pytest.approx(net_benefit)
    assert [figure.id for figure in sections["usefulness"].figures] == ["decision_b"]

    observed = np.mean([row["is_correct"] == "yes" for row in cases])
    implied = sections["planning"].estimates["planning.accuracy_for_truth"][1].value
    assert implied == pytest.approx(min(1.0, (observed - 0.05) / (0.9 - 0.05)))
    verdicts = [row[-1] for row in sections["planning"].tables[0].rows]
    assert verdicts[1] == "not reached", "20 patients of a class do not give a half-width of 0.05"
    ids = {estimate["id"] for estimate in json.loads((out / "results.json").read_text())["estimates"]}
    assert {"subgroups.accuracy.site.north", "usefulness.advantage.b.0.4", "planning.precision.sensitivity.a"} <= ids


def test_a_column_of_many_values_is_no_grouping(small_trial: Write) -> None:
    plan = small_trial(plan='[subgroups]\ncolumns = ["age"]\n')
    with pytest.raises(
        InputError, match=r"c\.csv: column age, which the plan names in subgroups, has 30 values; at most 20"
    ):
        EPOCValidator(plan).run()


def test_a_system_without_probabilities_has_subgroups_and_no_decision_curve(small_trial: Write) -> None:
    plan = small_trial(plan=PLAN, cohort=_with_sex, predictions=lambda row: {"case_id": row["case_id"], "call": "a"})
    text = (plan.parent / "c.csv").read_text()
    assert text.startswith("slide_id")
    (plan.parent / "c.csv").write_text("\n".join(line.split(",", 1)[1] for line in text.splitlines()) + "\n")
    sections = {section.id: section for section in EPOCValidator(plan).run().sections}
    assert sections["usefulness"].missing == "The predictions state calls without probabilities."
    assert "subgroups.accuracy.site.north" in sections["subgroups"].estimates
    assert not [id for id in sections["subgroups"].estimates if "auroc" in id]


def test_names_with_dots_and_braces_give_ids_of_their_own(small_trial: Write, tmp_path: Path) -> None:
    def add(row: dict) -> dict:
        odd = int(row["slide_id"][1:]) % 2
        return row | {"stage": ("1.x", "{}")[odd], "stage.1": ("x", "y")[odd]}

    validator = EPOCValidator(small_trial(plan='[subgroups]\ncolumns = ["stage", "stage.1"]\n', cohort=add))
    estimates = validator.run().estimates
    assert {"subgroups.accuracy.stage.1.x", "subgroups.accuracy.stage%2E1.x"} <= set(estimates)
    # By "stage" alone 4 metrics, a difference for 2 groups each, and a gap; by "stage.1" as many.
    of_subgroups = [id for id in estimates if id.startswith("subgroups.")]
    assert len(of_subgroups) == len(set(of_subgroups)) == 2 * (2 * (1 + 1 + 1 + 3) + 1)
    assert "stage.1" in validator.write(tmp_path / "out").read_text()
