"""crcjax power: its numbers are those of the functions, as text, JSON and a curve."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crcjax.cli import app
from crcjax.errors import InputError


def _power(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["power", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_proportion_is_planned_by_width_and_by_lower_limit() -> None:
    text = _power("proportion", "--expected", 0.75, "--half-width", 0.1, "--share", 0.19)
    assert text.startswith("69 cases: half-width of Wilson's interval 0.0")
    assert "to collect: 364 patients, 364 slides" in text
    plan = json.loads(_power("proportion", "--expected", 0.95, "--above", 0.9, "--power", 0.9, "--json"))
    assert (plan["n"], plan["of"], plan["patients"]) == (315, "cases", 315)
    assert plan["reached"] >= 0.9
    assert dict(map(tuple, plan["curve"]))[315] == plan["reached"]


@pytest.mark.parametrize(
    ("arguments", "n", "of"),
    [
        (("auroc", "--expected", 0.85, "--share", 0.19, "--half-width", 0.05), 507, "cases"),
        (("hazard-ratio", "--ratio", 0.37, "--share", 0.275), 40, "events"),
        (("non-inferiority", "--margin", 0.05, "--discordant", 0.15), 471, "cases"),
        (("sites", "--expected", 0.8, "--above", 0.7, "--cases-per-site", 40), None, "sites"),
        (("auroc", "--expected", 0.85, "--share", 0.19, "--above", 0.7), None, "cases"),
    ],
)
def test_every_claim_has_a_number_and_a_curve_through_it(arguments, n, of) -> None:
    plan = json.loads(_power(*arguments, "--json"))
    assert plan["of"] == of
    assert n is None or plan["n"] == n
    numbers = [number for number, _ in plan["curve"]]
    assert numbers == sorted(numbers)
    assert [plan["n"], plan["reached"]] in plan["curve"]


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "power.svg"
    _power("hazard-ratio", "--ratio", 0.56, "--share", 0.275, "--svg", picture)
    assert ET.parse(picture).getroot().tag.endswith("svg")


def test_a_claim_must_be_a_width_or_a_limit() -> None:
    for claim in ((), ("--half-width", "0.1", "--above", "0.7")):
        with pytest.raises(InputError, match="give one of --half-width and --above"):
            _power("proportion", "--expected", "0.8", *claim)
