"""Conformal sets by class and by site, and what they achieve."""

import math

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.conformal import (
    PENALTY,
    conformal_performance,
    coverage_range,
    fit_conformal,
    nonconformity,
    require_separate,
)


def _sample(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities of a model that is overconfident for class 0, and random shares."""
    rng = np.random.default_rng(seed)
    label = rng.integers(3, size=n)
    logits = 1.5 * rng.normal(size=(n, 3)) + np.eye(3)[label] + [1, 0, 0]
    return label, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rng.random(n)


@pytest.mark.parametrize(("n", "low", "high"), [(100, 0.848, 0.945), (28, 0.841, 0.987), (1000, 0.884, 0.915)])
def test_the_coverage_varies_with_the_calibration_set_as_published(n: int, low: float, high: float) -> None:
    assert coverage_range(n, 0.1) == pytest.approx((low, high), abs=5e-4)
    assert coverage_range(8, 0.1) == (1.0, 1.0)


@pytest.mark.parametrize("method", ["lac", "aps", "raps"])
def test_coverage_is_at_least_as_stated_overall_by_class_and_by_site(method: str) -> None:
    label, probs, uniform = _sample(0, 3000)
    test_label, test_probs, test_uniform = _sample(1, 6000)
    site, test_site = np.array(["a", "b"])[np.arange(3000) % 2], np.array(["a", "b"])[np.arange(6000) % 2]
    # At site b the model is much less sure.
    probs[1::2], test_probs[1::2] = (
        p[1::2] ** 0.3 / (p[1::2] ** 0.3).sum(axis=1, keepdims=True) for p in (probs, test_probs)
    )
    plain = fit_conformal(label, probs, 0.1, uniform, method=method)
    by_both = fit_conformal(label, probs, 0.1, uniform, method=method, by_class=True, group=site.tolist())
    shown = conformal_performance(plain.sets(test_probs, test_uniform), test_label, group=test_site.tolist())
    assert shown.coverage.value == pytest.approx(0.9, abs=0.02)
    exact = conformal_performance(
        by_both.sets(test_probs, test_uniform, test_site.tolist()), test_label, group=test_site.tolist()
    )
    for estimate in (*exact.by_class, *exact.by_group.values()):
        assert estimate.value == pytest.approx(0.9, abs=0.035)
    worst = min(estimate.value for estimate in (*shown.by_class, *shown.by_group.values()))
    assert worst < 0.87
    assert by_both.thresholds.shape == (3, 3)
    assert by_both.cases.sum() == 6000


def test_raps_adds_its_penalty_beyond_the_second_class() -> None:
    probs, uniform = np.array([[0.5, 0.3, 0.2]]), np.array([0.5])
    plain = nonconformity(probs, "aps", uniform)
    assert nonconformity(probs, "raps", uniform) == pytest.approx(plain + np.array([0, 0, PENALTY]))


def test_a_site_without_a_threshold_of_its_own_has_that_of_all() -> None:
    label, probs, uniform = _sample(2, 60)
    rule = fit_conformal(label, probs, 0.1, uniform, group=["a"] * 50 + ["b"] * 10)
    together = fit_conformal(label, probs, 0.1, uniform)
    np.testing.assert_array_equal(rule.sets(probs, uniform, ["c"] * 60), together.sets(probs, uniform))
    np.testing.assert_array_equal(rule.sets(probs, uniform), together.sets(probs, uniform))
    assert rule.groups == ("a", "b", "")
    assert not rule.warnings


def test_too_few_cases_of_a_class_give_full_sets_and_a_warning() -> None:
    label = np.append(np.zeros(30, int), np.ones(5, int))
    probs = np.column_stack([np.linspace(0.1, 0.9, 35), 1 - np.linspace(0.1, 0.9, 35)])
    rule = fit_conformal(label, probs, 0.1, np.zeros(35), by_class=True, group=["x"] * 35)
    assert math.isinf(rule.thresholds[1, 0])
    assert rule.sets(probs, np.zeros(35), ["x"] * 35)[:, 1].all()
    assert rule.warnings == (
        "class 1 of group x has 5 cases; its sets are full",
        "class 1 has 5 cases; its sets are full",
    )
    few = fit_conformal(label[:4], probs[:4], 0.1, np.zeros(4), group=["x"] * 4)
    assert few.warnings == ("group x has 4 cases; its sets are full", "the calibration has 4 cases; its sets are full")


def test_performance_counts_sizes_and_covered_labels() -> None:
    sets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]], bool)
    shown = conformal_performance(sets, np.array([0, 1, 1, 0]), group=["n", "s", "s", "n"])
    assert (shown.coverage.value, shown.mean_size.value) == (0.5, 1.25)
    assert (shown.single.value, shown.empty.value) == (0.25, 0.25)
    assert [e.value for e in shown.by_class[:2]] == [0.5, 0.5]
    assert np.isnan(shown.by_class[2].value)
    assert {name: e.value for name, e in shown.by_group.items()} == {"n": 0.5, "s": 0.5}
    assert {size: e.value for size, e in shown.by_size.items()} == {0: 0, 1: 1, 2: 0.5}
    four = conformal_performance(np.tile(sets, (4, 1)), np.tile([0, 1, 1, 0], 4), np.tile(np.arange(4), 4))
    assert (four.coverage.ci_low, four.mean_size.ci_high) == pytest.approx(
        (shown.coverage.ci_low, shown.mean_size.ci_high)
    )
    nothing = conformal_performance(np.zeros((0, 3), bool), np.zeros(0, int))
    assert np.isnan([nothing.coverage.value, nothing.mean_size.value, nothing.empty.value]).all()


def test_a_patient_of_both_sets_and_a_wrong_error_are_refused() -> None:
    require_separate(["a", "b"], ["c"])
    with pytest.raises(InputError, match=r"got 1 patients in both \(first: b\)"):
        require_separate(["a", "b"], ["b", "c"])
    label, probs, uniform = _sample(3, 10)
    with pytest.raises(InputError, match="error must lie between 0 and 1"):
        fit_conformal(label, probs, 1.0, uniform)
