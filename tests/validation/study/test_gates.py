import numpy as np
import pytest

from crcjax.validation.estimate import Estimate, TestResult
from crcjax.validation.proportions import wilson
from crcjax.validation.study.gates import ERROR, compare_hypotheses, decide_gates, superiority_p
from crcjax.validation.study.plan import Gate, Hypothesis, Multiplicity, Plan


def _plan(gates: list[Gate], method: str = "none", hypotheses: tuple = ()) -> Plan:
    return Plan(
        title="t",
        version="1",
        classes=["a", "b"],
        seed=0,
        data={"predictions": "p", "cohort": "c"},
        gates=gates,
        multiplicity=Multiplicity(method=method),
        hypotheses=list(hypotheses),
    )


def _gate(number: int, role: str = "primary", **bound: object) -> Gate:
    return Gate(id=f"g{number}", title=f"gate {number}", estimate=f"e{number}", role=role, **bound)


def _estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, low, high, "m", 100)


def test_a_gate_compares_the_number_that_it_names() -> None:
    estimates = {
        "e1": _estimate(0.8, 0.71, 0.88),
        "e2": _estimate(0.1, 0.05, 0.19),
        "e3": _estimate(np.nan, np.nan, np.nan),
    }
    gates = [
        _gate(1, "secondary", above=0.70),
        _gate(1, "secondary", above=0.75),
        _gate(1, "secondary", limit="value", above=0.75),
        _gate(2, "secondary", limit="ci_high", below=0.2),
        _gate(3, "secondary", above=0.5),
        _gate(4, "secondary", limit="p_value", above=0.05),
    ]
    results = decide_gates(_plan(gates), estimates, {"e4": TestResult(1.0, 0.04, "m")})
    verdicts = ["passed", "failed", "passed", "passed", "not determined", "failed"]
    assert [result.verdict for result in results] == verdicts
    assert results[0].sentence == "0.800 (0.710 to 0.880); the lower limit must be above 0.7"


def test_a_misspelled_estimate_is_named_with_the_nearest() -> None:
    (result,) = decide_gates(_plan([_gate(1, above=0.5)]), {"e11": _estimate(0.8, 0.7, 0.9)}, {})
    assert (result.verdict, result.sentence) == ("not determined", "There is no e1 in the results; did you mean e11?")


def test_a_fixed_sequence_stops_at_the_first_gate_that_does_not_pass() -> None:
    estimates = {f"e{n}": _estimate(0.8, low, 0.9) for n, low in enumerate((0.6, 0.4, 0.6, 0.6), 1)}
    gates = [_gate(n, "secondary" if n == 4 else "primary", above=0.5) for n in range(1, 5)]
    verdicts = [result.verdict for result in decide_gates(_plan(gates, "fixed_sequence"), estimates, {})]
    assert verdicts == ["passed", "failed", "not tested", "passed"]


@pytest.mark.parametrize("seed", range(20))
def test_holm_decides_as_the_adjusted_p_values_do(seed: int) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(seed)
    estimates = {f"e{n}": wilson(int(rng.integers(60, 75)), 100) for n in range(1, 5)}
    gates = [_gate(n, above=0.55) for n in range(1, 5)]
    results = decide_gates(_plan(gates, "holm"), estimates, {})
    p_values = [superiority_p(estimate, 0.55, True) for estimate in estimates.values()]
    rejected = multitest.multipletests(p_values, alpha=ERROR, method="holm")[0]
    assert [result.verdict == "passed" for result in results] == rejected.tolist()


def test_the_p_value_is_the_error_where_the_limit_touches_the_bound() -> None:
    estimate = _estimate(0.8, 0.71, 0.88)
    assert superiority_p(estimate, 0.71, True) == pytest.approx(ERROR)
    assert superiority_p(estimate, 0.88, False) == pytest.approx(ERROR)
    assert superiority_p(estimate, 0.6, True) < superiority_p(estimate, 0.7, True) < ERROR
    assert superiority_p(_estimate(-0.1, -0.2, 0.0), -0.2, True) == pytest.approx(ERROR), "differences are not shares"
    assert np.isnan(superiority_p(_estimate(0.8, np.nan, np.nan), 0.7, True))


def test_hypotheses_are_placed_against_the_interval() -> None:
    plan = _plan([], hypotheses=[Hypothesis(estimate="e1", expected=x, source="s") for x in (0.5, 0.8, 0.95)])
    relations = [result.relation for result in compare_hypotheses(plan, {"e1": _estimate(0.8, 0.7, 0.9)})]
    assert relations == ["below", "within", "above"]
    assert {result.relation for result in compare_hypotheses(plan, {})} == {"not determined"}
