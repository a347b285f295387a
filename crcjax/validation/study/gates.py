"""Gates: whether the estimates meet the plan's criteria, with the plan's rule for several primary ones."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from crcjax.pages.render import number
from crcjax.validation.estimate import LEVEL, Estimate, TestResult
from crcjax.validation.study.plan import Gate, Hypothesis, Plan
from crcjax.validation.study.section import interval, value_and_interval

Verdict = Literal["passed", "failed", "not determined", "not tested"]
_PRIMARY = ("primary", "co_primary")
# The one-sided error of a limit of the two-sided intervals.
ERROR = (1 - LEVEL) / 2
_Z = float(stats.norm.isf(ERROR))


@dataclass(frozen=True)
class GateResult:
    """A gate, the number that decides it, and the verdict with its reason."""

    gate: Gate
    observed: float
    verdict: Verdict
    sentence: str


@dataclass(frozen=True)
class HypothesisResult:
    """An expected figure beside the study's estimate: `within`, `above` or `below` the interval, or `not determined`."""

    hypothesis: Hypothesis
    estimate: Estimate | None
    relation: str


def decide_gates(plan: Plan, estimates: Mapping[str, Estimate], tests: Mapping[str, TestResult]) -> list[GateResult]:
    """Decides every gate of a plan, in its order."""
    results = [_decide(gate, estimates, tests) for gate in plan.gates]
    places = [place for place, gate in enumerate(plan.gates) if gate.role in _PRIMARY]
    if plan.multiplicity.method == "fixed_sequence":
        _stop_after_failure(results, places)
    elif plan.multiplicity.method == "holm":
        _adjust_by_holm(results, places, estimates)
    return results


def compare_hypotheses(plan: Plan, estimates: Mapping[str, Estimate]) -> list[HypothesisResult]:
    """Compares each expected figure with the interval of the study's estimate."""
    results = []
    for hypothesis in plan.hypotheses:
        estimate = estimates.get(hypothesis.estimate)
        relation = "not determined"
        if estimate is not None and np.isfinite([estimate.ci_low, estimate.ci_high]).all():
            expected = hypothesis.expected
            relation = "below" if expected < estimate.ci_low else "above" if expected > estimate.ci_high else "within"
        results.append(HypothesisResult(hypothesis, estimate, relation))
    return results


def superiority_p(estimate: Estimate, bound: float, above: bool) -> float:
    """The one-sided p-value that the quantity is not beyond a bound, by the limit on that side of the interval.

    Quantities between 0 and 1 are taken as normal on the logit scale, others as they are. NaN without an interval.
    """
    values = np.array([estimate.value, estimate.ci_low if above else estimate.ci_high, bound])
    if np.isfinite(values).all() and (values > 0).all() and (values < 1).all():
        values = np.log(values / (1 - values))
    error = abs(values[0] - values[1]) / _Z
    if not np.isfinite(values).all() or error == 0:
        return float("nan")
    return float(stats.norm.sf((values[0] - values[2]) / error * (1 if above else -1)))


def _decide(gate: Gate, estimates: Mapping[str, Estimate], tests: Mapping[str, TestResult]) -> GateResult:
    source = tests.get(gate.estimate) if gate.limit == "p_value" else estimates.get(gate.estimate)
    if source is None:
        known = list(tests if gate.limit == "p_value" else estimates)
        near = difflib.get_close_matches(gate.estimate, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return GateResult(gate, np.nan, "not determined", f"There is no {gate.estimate} in the results{hint}")
    observed = float(getattr(source, gate.limit))
    bound = gate.above if gate.above is not None else gate.below
    assert bound is not None
    comparison = "above" if gate.above is not None else "below"
    shown = value_and_interval(source) if isinstance(source, Estimate) else f"p = {number(observed)}"
    wanted = f"{_LIMITS[gate.limit]} must be {comparison} {bound:g}"
    if not np.isfinite(observed):
        return GateResult(gate, observed, "not determined", f"{shown}; {wanted}, and the data do not determine it")
    is_met = observed > bound if comparison == "above" else observed < bound
    return GateResult(gate, observed, "passed" if is_met else "failed", f"{shown}; {wanted}")


_LIMITS = {"ci_low": "the lower limit", "ci_high": "the upper limit", "value": "the value", "p_value": "the p-value"}


def _stop_after_failure(results: list[GateResult], places: Sequence[int]) -> None:
    stopped_by = ""
    for place in places:
        if stopped_by:
            sentence = f"{results[place].sentence}; the fixed sequence stopped at {stopped_by}"
            results[place] = replace(results[place], verdict="not tested", sentence=sentence)
        elif results[place].verdict != "passed":
            stopped_by = results[place].gate.title


def _adjust_by_holm(results: list[GateResult], places: Sequence[int], estimates: Mapping[str, Estimate]) -> None:
    """Holm's step-down procedure over the one-sided p-values of the primary gates."""
    p_values = {}
    for place in places:
        gate = results[place].gate
        estimate = estimates.get(gate.estimate)
        bound = gate.above if gate.above is not None else gate.below
        if estimate is not None and bound is not None and results[place].verdict != "not determined":
            p_values[place] = superiority_p(estimate, bound, gate.above is not None)
    rejecting = True
    for rank, place in enumerate(sorted(p_values, key=lambda place: p_values[place])):
        level = ERROR / (len(places) - rank)
        rejecting = rejecting and p_values[place] <= level
        sentence = f"{results[place].sentence}; one-sided p = {p_values[place]:.2g}, Holm's level {level:.2g}"
        results[place] = replace(results[place], verdict="passed" if rejecting else "failed", sentence=sentence)


def hypothesis_sentence(result: HypothesisResult) -> str:
    """A hypothesis beside the estimate, in words."""
    if result.estimate is None or result.relation == "not determined":
        return "The study does not determine it."
    places = {"within": "lies within", "below": "lies below", "above": "lies above"}
    return f"The expected figure {places[result.relation]} the interval {interval(result.estimate)}."
