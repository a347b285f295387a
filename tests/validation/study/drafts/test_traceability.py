"""Nothing is an orphan: every command, exit status, limit of a gate and hazard has a requirement, and every requirement a test."""

import ast
from pathlib import Path
from typing import get_args

import pytest
import typer

from crcjax import errors, main
from crcjax.cli import app
from crcjax.errors import InputError
from crcjax.validation.study.drafts.evidence import Evidence
from crcjax.validation.study.drafts.traceability import (
    NOT_RUN,
    Traceability,
    load_traceability,
    matrix_rows,
    read_test_report,
)
from crcjax.validation.study.plan import Data, Gate, Plan

ROOT = Path(__file__).parents[4]
PLAN = Plan(
    title="", version="", classes=["a", "b"], seed=0, data=Data(predictions=Path("p.csv"), cohort=Path("c.csv"))
)


@pytest.fixture(scope="module")
def traceability() -> Traceability:
    return load_traceability()


def _commands(group, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, command in group.commands.items():
        is_group = hasattr(command, "commands")
        names |= _commands(command, f"{prefix}{name} ") if is_group else {f"{prefix}{name}"}
    return names


def test_every_command_exit_status_and_limit_of_a_gate_has_a_requirement(traceability) -> None:
    of_requirements = [command for each in traceability.requirements for command in each.commands]
    assert sorted(of_requirements) == sorted(_commands(typer.main.get_command(app)))
    statuses = {0, 1, main.INTERRUPTED_STATUS, *errors._STATUS.values()}
    assert {status for each in traceability.requirements for status in each.exit_statuses} == statuses
    limits = {limit for each in traceability.requirements for limit in each.gate_limits}
    assert limits == set(get_args(Gate.model_fields["limit"].annotation))


def test_every_hazard_is_controlled_and_every_name_is_known_once(traceability) -> None:
    for entries in (traceability.hazards, traceability.requirements):
        ids = [each.id for each in entries]
        assert len(ids) == len(set(ids))
    hazards = {hazard.id for hazard in traceability.hazards}
    assert {id for each in traceability.requirements for id in each.hazards} == hazards


def test_every_test_that_is_named_exists(traceability) -> None:
    for test in {test for each in traceability.requirements for test in each.tests}:
        file, _, function = test.partition("::")
        names = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
        assert function in names, test


def test_outcomes_are_those_of_the_report_of_the_tests(traceability, tmp_path: Path) -> None:
    first, second, third = [test for each in traceability.requirements for test in each.tests][:3]
    cases = [(first, "", ""), (second, "[a]", ""), (second, "[b]", "<failure/>"), (third, "", "<skipped/>")]
    xml = "".join(
        f'<testcase classname="{test.partition(".py")[0].replace("/", ".")}" name="{test.partition("::")[2]}{case}">'
        f"{outcome}</testcase>"
        for test, case, outcome in cases
    )
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{xml}</testsuite></testsuites>")
    outcomes = read_test_report(report)
    assert outcomes == {first: "passed", second: "failed", third: "skipped"}
    evidence = Evidence({"estimates": [], "sections": []}, PLAN, "plan.toml")
    rows = matrix_rows(traceability, evidence, outcomes)
    assert [row["outcome"] for row in rows[:4]] == ["passed", "failed", "skipped", "not in the report"]
    assert {row["outcome"] for row in matrix_rows(traceability, evidence)} == {NOT_RUN}
    for text in ("no report", "<testsuites/>"):
        report.write_text(text)
        with pytest.raises(InputError, match=r"report\.xml: "):
            read_test_report(report)
