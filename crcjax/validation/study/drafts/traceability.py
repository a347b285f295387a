"""From hazards over requirements to tests and results: a table whose orphans fail a test of the repository."""

from __future__ import annotations

import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from crcjax.errors import InputError
from crcjax.validation.study.drafts.evidence import Evidence
from crcjax.validation.study.drafts.records import facts

NOT_RUN = "no report"
_SomeTexts = Annotated[list[str], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hazard(_Part):
    """A failure that software can detect."""

    id: str
    text: str


class Requirement(_Part):
    """What the software must do.

    Attributes:
      id, text: the requirement.
      commands, exit_statuses, gate_limits: the parts of the software that it is about.
      hazards: ids of the hazards that it controls.
      tests: tests that show it, as FILE::FUNCTION.
      estimates: ids of estimates, with `*`, that say how it went in a study.
    """

    id: str
    text: str
    commands: list[str] = []
    exit_statuses: list[int] = []
    gate_limits: list[str] = []
    hazards: _SomeTexts
    tests: _SomeTexts
    estimates: list[str] = []


class Traceability(_Part):
    """All hazards and requirements."""

    hazards: list[Hazard]
    requirements: list[Requirement]

    def controls(self, hazard: Hazard) -> list[str]:
        """The ids of the requirements that control a hazard."""
        return [requirement.id for requirement in self.requirements if hazard.id in requirement.hazards]


def load_traceability() -> Traceability:
    """The hazards and requirements of this version."""
    file = resources.files("crcjax.validation.study.drafts").joinpath("traceability.toml")
    return Traceability.model_validate(tomllib.loads(file.read_text()))


def read_test_report(path: Path) -> dict[str, str]:
    """The outcome of every test of a report of pytest (--junitxml) as FILE::FUNCTION: passed, failed or skipped.

    A test of several parameters passed if all of its cases did. Raises InputError if the file is no such report.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise InputError(
            f"{path}: cannot be read as a report of pytest --junitxml ({error}); write it again"
        ) from error
    worst = ("passed", "skipped", "failed")
    outcomes: dict[str, str] = {}
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[name] = max(outcome, outcomes.get(name, "passed"), key=worst.index)
    if not outcomes:
        raise InputError(f"{path}: has no tests; give the report of pytest --junitxml")
    return outcomes


def matrix_rows(
    traceability: Traceability, evidence: Evidence, outcomes: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """One row for each test of each requirement."""
    rows = []
    for requirement in traceability.requirements:
        stated = [fact.text for name in requirement.estimates for fact in facts(evidence, f"estimate {name}")]
        for test in requirement.tests:
            outcome = NOT_RUN if outcomes is None else outcomes.get(test, "not in the report")
            row = {"requirement": requirement.id, "text": requirement.text, "hazards": " ".join(requirement.hazards)}
            rows.append(row | {"test": test, "outcome": outcome, "results": " | ".join(stated)})
    return rows
