"""The facts that items of drafts are filled with, by name: each with the place where a reader finds it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from crcjax.pages.render import number
from crcjax.validation.study.drafts.evidence import Evidence

# Estimates of one pattern that an item lists; the others are counted.
_MOST = 12


@dataclass(frozen=True)
class Fact:
    """A statement, and where it is found: in the report, the plan or the model card."""

    text: str
    place: str


def facts(evidence: Evidence, name: str) -> list[Fact]:
    """The facts of a name: empty if the sources do not have them.

    `estimate PATTERN` and `test PATTERN` are entries of results.json by id, with `*` for any text; `card HEADING` is a part of
    the model card; other names are keys of RECORDS.
    """
    kind, _, argument = name.partition(" ")
    if kind == "estimate":
        return _entries(evidence, "estimates", argument, _estimate_text)
    if kind == "test":
        return _entries(evidence, "tests", argument, _test_text)
    if kind == "card":
        return _card_part(evidence, argument)
    return [fact for fact in RECORDS[name](evidence) if fact.text]


def _entries(evidence: Evidence, kind: str, pattern: str, text_of: Callable[[dict[str, Any]], str]) -> list[Fact]:
    entries = [entry for entry in evidence.results[kind] if fnmatch.fnmatchcase(entry["id"], pattern)]
    stated = [
        Fact(f"{entry['id']}: {text_of(entry)}", _section_place(evidence, entry["id"])) for entry in entries[:_MOST]
    ]
    if len(entries) > _MOST:
        stated.append(Fact(f"{len(entries) - _MOST} more of {pattern}", "tables/estimates.csv"))
    return stated


def _estimate_text(entry: dict[str, Any]) -> str:
    interval = "" if entry["ci_low"] is None else f" ({number(entry['ci_low'])} to {number(entry['ci_high'])})"
    units = f"n = {entry['n']}" + (f", {entry['n_excluded']} excluded" if entry["n_excluded"] else "")
    warnings = "".join(f"; {warning}" for warning in entry["warnings"])
    return f"{number(entry['value'])}{interval}, {units}, {entry['method']}{warnings}"


def _test_text(entry: dict[str, Any]) -> str:
    return f"statistic {number(entry['statistic'])}, p = {number(entry['p_value'])}, {entry['method']}"


def _section_place(evidence: Evidence, id: str) -> str:
    section = next((each for each in evidence.results["sections"] if id.startswith(f"{each['id']}.")), None)
    return f"report.html, section {section['number']} {section['title']}" if section else "results.json"


def _card_part(evidence: Evidence, heading: str) -> list[Fact]:
    parts = re.split(r"^## (.+)$", evidence.card, flags=re.MULTILINE)
    text = next((text for name, text in zip(parts[1::2], parts[2::2], strict=True) if name == heading), "")
    lines = [line.removeprefix("* ") for line in text.splitlines() if line and not line.startswith("|")]
    return [Fact(line, f"model_card.md, {heading}") for line in lines]


def _study(evidence: Evidence) -> Iterator[Fact]:
    plan = evidence.plan
    yield Fact(f"{plan.title}, version {plan.version}", f"{evidence.plan_name}: title, version")


def _question(evidence: Evidence) -> Iterator[Fact]:
    yield Fact(evidence.plan.question, f"{evidence.plan_name}: question")


def _lock(evidence: Evidence) -> Iterator[Fact]:
    plan = evidence.results["plan"]
    place = "report.html, Plan and provenance"
    if not plan["locked"]:
        yield Fact("The plan was not locked before the results were computed.", place)
        return
    state = "is unchanged since" if plan["is_locked"] and not plan["changes"] else "was changed since, as listed there"
    yield Fact(f"Locked at {plan['locked'][0]['time']}; the plan {state}. SHA-256 in use: {plan['sha256']}.", place)


def _populations(evidence: Evidence) -> Iterator[Fact]:
    for population in evidence.plan.populations:
        where = "; ".join(f"{column}: {values}" for column, values in population.where.items()) or "all rows"
        yield Fact(f"{population.title or population.id} ({where})", f"{evidence.plan_name}: populations")


def _flow(evidence: Evidence) -> Iterator[Fact]:
    for step in evidence.results["flow"]:
        removed = "".join(f"; removed: {count} {reason}" for reason, count in step["removed"].items())
        yield Fact(
            f"{step['label']}: {step['patients']} patients, {step['scans']} scans{removed}",
            "report.html, Flow of patients",
        )


def _classes(evidence: Evidence) -> Iterator[Fact]:
    yield Fact(f"Classes: {', '.join(evidence.plan.classes)}", f"{evidence.plan_name}: classes")


def _reference(evidence: Evidence) -> Iterator[Fact]:
    reference, place = evidence.plan.reference, f"{evidence.plan_name}: reference"
    yield Fact(f"Reference: {reference.name}; agreement with it is concordance with another classifier", place)
    if reference.reliability is not None:
        yield Fact(f"It names the true class in a stated share of {reference.reliability:g}", place)
    for other in reference.others:
        yield Fact(f"Further molecular calls: {other.name}", place)


def _aggregation(evidence: Evidence) -> Iterator[Fact]:
    rule = evidence.plan.patients.aggregation.replace("_", " ")
    yield Fact(f"The scans of a patient are combined by: {rule}", f"{evidence.plan_name}: patients.aggregation")


def _gates(evidence: Evidence) -> Iterator[Fact]:
    for gate in evidence.results["gates"]:
        text = f"{gate['title']} ({gate['role'].replace('_', '-')}): {gate['verdict']}; {gate['sentence']}"
        yield Fact(text, "report.html, Primary endpoint")


def _primary(evidence: Evidence) -> Iterator[Fact]:
    primary = {gate["title"] for gate in evidence.results["gates"] if gate["role"] in ("primary", "co_primary")}
    return (fact for fact in _gates(evidence) if fact.text.partition(" (")[0] in primary)


def _multiplicity(evidence: Evidence) -> Iterator[Fact]:
    method = evidence.plan.multiplicity.method.replace("_", " ")
    yield Fact(f"Primary gates share the error by: {method}", f"{evidence.plan_name}: multiplicity")


def _hypotheses(evidence: Evidence) -> Iterator[Fact]:
    for hypothesis in evidence.results["hypotheses"]:
        text = f"{hypothesis['estimate']}, expected {hypothesis['expected']:g}: {hypothesis['sentence']}"
        yield Fact(text, "report.html, Primary endpoint")


def _software(evidence: Evidence) -> Iterator[Fact]:
    yield Fact(f"crcjax {evidence.results['crcjax']} computed the statistics", "results.json")
    for name, ids in evidence.results["predicted_by"].items():
        if ids:
            words = name.replace("_", " ")
            yield Fact(f"{words} of the predictions: {', '.join(ids)}", "report.html, Plan and provenance")


def _packages(evidence: Evidence) -> Iterator[Fact]:
    if len(evidence.packages) > 1:
        unstated = sum(not package.licence for package in evidence.packages[1:])
        yield Fact(
            f"The installed {evidence.packages[0].name} {evidence.packages[0].version} needs {len(evidence.packages) - 1} "
            f"packages, listed with version and licence; {unstated} state no licence.",
            "soup.csv, sbom.cdx.json",
        )


def _inputs(evidence: Evidence) -> Iterator[Fact]:
    for name, file in evidence.results["inputs"].items():
        text = f"{name.replace('_', ' ')}: {file['file']}, SHA-256 {file['sha256']}"
        yield Fact(text, "report.html, Plan and provenance")


def _seeds(evidence: Evidence) -> Iterator[Fact]:
    plan = evidence.plan
    yield Fact(f"Seed {plan.seed}; {plan.resamples} bootstrap resamples", f"{evidence.plan_name}: seed, resamples")


def _messages(evidence: Evidence) -> Iterator[Fact]:
    return (Fact(message, "report.html, first lines") for message in evidence.results["messages"])


def _subgroup_columns(evidence: Evidence) -> Iterator[Fact]:
    if evidence.plan.subgroups:
        columns = ", ".join(evidence.plan.subgroups.columns)
        yield Fact(f"Subgroups by {columns}; exploratory", f"{evidence.plan_name}: subgroups")


def _outcomes(evidence: Evidence) -> Iterator[Fact]:
    for outcome in evidence.plan.survival:
        text = f"{outcome.title}, from {outcome.time_zero}, in {outcome.unit}, to {outcome.horizon:g}"
        yield Fact(text, f"{evidence.plan_name}: survival")


def _planned_precision(evidence: Evidence) -> Iterator[Fact]:
    for aim in evidence.plan.precision:
        quantity = " ".join(filter(None, (aim.estimate, aim.target)))
        yield Fact(
            f"{quantity}: expected {aim.expected:g}, half-width {aim.half_width:g}", f"{evidence.plan_name}: precision"
        )


def _margin(evidence: Evidence) -> Iterator[Fact]:
    comparison = evidence.plan.comparison
    if comparison and comparison.margin is not None:
        text = f"Margin of non-inferiority to {comparison.name}: {comparison.margin:g}. {comparison.rationale}"
        yield Fact(text, f"{evidence.plan_name}: comparison")


def _synthetic(evidence: Evidence) -> Iterator[Fact]:
    if evidence.results["synthetic"]:
        yield Fact("The slides were painted or simulated by a program.", "results.json: synthetic")


RECORDS: dict[str, Callable[[Evidence], Iterator[Fact]]] = {
    name.removeprefix("_"): record
    for name, record in (
        *(("study", _study), ("question", _question), ("lock", _lock), ("populations", _populations), ("flow", _flow)),
        *(("classes", _classes), ("reference", _reference), ("aggregation", _aggregation), ("gates", _gates)),
        *(("primary", _primary), ("multiplicity", _multiplicity), ("hypotheses", _hypotheses), ("software", _software)),
        *(("inputs", _inputs), ("seeds", _seeds), ("messages", _messages), ("subgroups", _subgroup_columns)),
        *(
            ("outcomes", _outcomes),
            ("packages", _packages),
            ("precision", _planned_precision),
            ("margin", _margin),
            ("synthetic", _synthetic),
        ),
    )
}
