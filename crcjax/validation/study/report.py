"""The report of a study: one page, verdicts first, then the flow, the primary endpoint, and a section for every question."""

from __future__ import annotations

from collections.abc import Sequence

from crcjax.pages.render import Figure, Table, number, render_page
from crcjax.validation.study.gates import GateResult, hypothesis_sentence
from crcjax.validation.study.results import StudyResults, inputs
from crcjax.validation.study.section import value_and_interval

SYNTHETIC = "SYNTHETIC DATA"
# Cases on the page; cases.csv has all.
LISTED_CASES = 60
_CLASS_OF_VERDICT = {"passed": "passed", "failed": "failed", "not determined": "open", "not tested": "open"}


def report_page(results: StudyResults, flow: Figure, cases: Sequence[dict[str, str]]) -> str:
    """The HTML of the report."""
    plan = results.plan.plan
    wrong = [row for row in cases if row["is_correct"] == "no"]
    return render_page(
        "crcjax.validation.study",
        "report.html",
        {
            "results": results,
            "plan": plan,
            "gates": [(gate, _CLASS_OF_VERDICT[gate.verdict]) for gate in results.gates],
            "primary": [gate for gate in results.gates if gate.gate.role in ("primary", "co_primary")],
            "hypotheses": _hypotheses(results),
            "flow": flow,
            "gate_table": _gate_table(results.gates),
            "provenance": _provenance(results),
            "wrong": _case_table(wrong[:LISTED_CASES], plan.classes),
            "wrong_total": len(wrong),
            "cases_total": len(cases),
        },
        title=plan.title,
        stamp=SYNTHETIC if results.synthetic else "",
    )


def _hypotheses(results: StudyResults) -> Table | None:
    if not results.hypotheses:
        return None
    rows = tuple(
        (
            result.hypothesis.estimate,
            number(result.hypothesis.expected),
            "not determined" if result.estimate is None else value_and_interval(result.estimate),
            hypothesis_sentence(result),
            " ".join(filter(None, (result.hypothesis.source + ".", result.hypothesis.comment))),
        )
        for result in results.hypotheses
    )
    columns = ("estimate", "expected", "observed", "comparison", "source")
    return Table("hypotheses", "", columns, rows, ("expected", "observed"))


def _gate_table(gates: Sequence[GateResult]) -> Table:
    rows = tuple(
        (result.gate.title, result.gate.role.replace("_", "-"), result.verdict, result.sentence, result.gate.rationale)
        for result in gates
    )
    return Table("gates", "", ("gate", "role", "verdict", "observed and criterion", "rationale"), rows, ())


def _case_table(rows: Sequence[dict[str, str]], classes: Sequence[str]) -> Table:
    columns = ("case", "site", "reference", "call", *classes, "slides")
    cells = tuple(
        (
            *(row[name] for name in ("case_id", "site", "reference", "call")),
            *(f"{float(row[f'p_{name}']):.3f}" for name in classes),
            row["slides"].replace("|", ", "),
        )
        for row in rows
    )
    return Table("cases", "", columns, cells, tuple(classes))


def _provenance(results: StudyResults) -> Table:
    plan = results.plan.plan
    rows = [("plan", f"{plan.title}, version {plan.version}", results.plan.sha256)]
    rows += [(name.replace("_", " "), file["file"], file["sha256"]) for name, file in inputs(results.plan).items()]
    rows += [(name.replace("_", " "), ", ".join(ids) or "not stated", "") for name, ids in results.predicted_by.items()]
    rows += [("seed of all random numbers", str(plan.seed), ""), ("bootstrap resamples", str(plan.resamples), "")]
    return Table("provenance", "", ("", "value", "SHA-256"), tuple(rows))
