"""The results of a study as one JSON document; reports and documents look every number up in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import crcjax
from crcjax.validation.estimate import Estimate, TestResult
from crcjax.validation.study.flow import Flow
from crcjax.validation.study.gates import GateResult, HypothesisResult, hypothesis_sentence
from crcjax.validation.study.plan_lock import PlanState, sha256_of
from crcjax.validation.study.read_plan import PlanFile
from crcjax.validation.study.section import Section

FORMAT = 1


@dataclass(frozen=True)
class StudyResults:
    """Everything that the analysis of a plan gives.

    Attributes:
      plan, state: the plan and what is known of its lock.
      flow: who was analysed.
      sections: in the order of the report.
      gates, hypotheses: in the plan's order.
      messages: what a reader must know first, such as an empty class.
      synthetic: whether the slides are painted or simulated.
      predicted_by: the ids of bundles, models, pipelines and calibrations in the table of predictions.
    """

    plan: PlanFile
    state: PlanState
    flow: Flow
    sections: tuple[Section, ...]
    gates: tuple[GateResult, ...]
    hypotheses: tuple[HypothesisResult, ...]
    messages: tuple[str, ...]
    synthetic: bool
    predicted_by: Mapping[str, tuple[str, ...]]

    @property
    def estimates(self) -> dict[str, Estimate]:
        """All estimates by id."""
        return {id: estimate for section in self.sections for id, (_, estimate) in section.estimates.items()}

    @property
    def tests(self) -> dict[str, TestResult]:
        """All tests by id."""
        return {id: test for section in self.sections for id, (_, test) in section.tests.items()}


def to_json(results: StudyResults) -> dict[str, Any]:
    """The content of results.json. JSON has no NaN: a value that the data do not determine is null."""
    plan = results.plan.plan
    return _without_nan(
        {
            "format": FORMAT,
            "crcjax": crcjax.__version__,
            "research_use_only": True,
            "synthetic": results.synthetic,
            "title": plan.title,
            "classes": list(plan.classes),
            "plan": {
                "version": plan.version,
                "sha256": results.plan.sha256,
                "is_locked": results.state.is_current,
                "locked": [{"time": v.time, "sha256": v.sha256, "files": v.files} for v in results.state.versions],
                "changes": [{"state": name, "lines": list(lines)} for name, lines in results.state.changes],
                "log_fault": results.state.fault,
            },
            "inputs": inputs(results.plan),
            "predicted_by": {name: list(ids) for name, ids in results.predicted_by.items()},
            "seed": plan.seed,
            "messages": list(results.messages),
            "flow": [asdict(step) for step in results.flow.steps],
            "gates": [
                {"id": g.gate.id, "title": g.gate.title, "role": g.gate.role, "estimate": g.gate.estimate}
                | {"limit": g.gate.limit, "above": g.gate.above, "below": g.gate.below}
                | {"observed": g.observed, "verdict": g.verdict, "sentence": g.sentence}
                for g in results.gates
            ],
            "hypotheses": [
                {"estimate": h.hypothesis.estimate, "expected": h.hypothesis.expected, "source": h.hypothesis.source}
                | {"relation": h.relation, "sentence": hypothesis_sentence(h)}
                for h in results.hypotheses
            ],
            "sections": [
                {"id": section.id, "number": section.number, "title": section.title, "missing": section.missing}
                for section in results.sections
            ],
            "estimates": [_estimate(id, estimate) for id, estimate in results.estimates.items()],
            "tests": [{"id": id} | asdict(test) for id, test in results.tests.items()],
        }
    )


def inputs(plan: PlanFile) -> dict[str, dict[str, str]]:
    """The file name and SHA-256 of every table that the plan names."""
    return {name: {"file": path.name, "sha256": sha256_of(path)} for name, path in plan.plan.data if path is not None}


def _estimate(id: str, estimate: Estimate) -> dict[str, Any]:
    fields = ("value", "ci_low", "ci_high", "level", "method", "n", "n_clusters", "n_excluded", "warnings")
    return {"id": id} | {name: getattr(estimate, name) for name in fields}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    # Scipy and NumPy scalars are floats too, and not what the json module writes as numbers.
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
