"""Subgroups: Newcombe's intervals, tests of heterogeneity, and the guard of rare ones."""

import numpy as np
import pytest
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.estimate import TestResult
from crcjax.validation.proportions import wilson
from crcjax.validation.ranking import auroc_estimate
from crcjax.validation.recalibration import recalibrate_class
from crcjax.validation.subgroups import difference_of_independent, holm, subgroup_rates, subgroup_statistic


def _rows(**counts: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Successes and names of subgroups of so many successes and patients."""
    success = np.concatenate([np.arange(n) < successes for successes, n in counts.values()])
    return success, np.repeat(list(counts), [n for _, n in counts.values()])


def test_the_difference_of_two_proportions_has_newcombes_interval() -> None:
    # Newcombe 1998, table II (a): 56/70 against 48/80, method 10.
    difference = difference_of_independent(wilson(56, 70), wilson(48, 80))
    golden = (0.2, 0.0524, 0.3339)
    assert (difference.value, difference.ci_low, difference.ci_high) == pytest.approx(golden, abs=5e-5)


def test_rates_by_subgroup_have_their_complement_and_the_chi_squared_test() -> None:
    success, group = _rows(women=(40, 60), men=(70, 80), unsaid=(9, 10))
    group = np.where(group == "unsaid", "", group)
    result = subgroup_rates(success, group, seed=0)
    assert list(result.groups) == ["men", "women", "missing"]
    women, men = result.groups["women"], result.groups["men"]
    assert (women.n, women.estimate.value, result.lowest, result.highest) == (60, 40 / 60, "women", "men")
    # The complement leaves out those whose subgroup is not known.
    assert women.difference.value == pytest.approx(40 / 60 - 70 / 80)
    assert men.difference.value == pytest.approx(-women.difference.value)
    expected = stats.chi2_contingency([[70, 10], [40, 20]], correction=False)
    assert (result.heterogeneity.statistic, result.heterogeneity.p_value) == pytest.approx(
        (expected.statistic, expected.pvalue)
    )
    assert result.gap.value == pytest.approx(70 / 80 - 40 / 60)
    assert any("chosen by their values" in warning for warning in result.gap.warnings)


def test_small_counts_are_tested_by_permutation() -> None:
    success, group = _rows(a=(11, 12), b=(14, 14), c=(10, 13))
    result = subgroup_rates(success, group, seed=3)
    assert "permutations" in result.heterogeneity.method
    rng, table = np.random.default_rng(0), np.array([[11, 14, 10], [1, 0, 3]])
    sampled = stats.random_table(table.sum(axis=1), table.sum(axis=0)).rvs(20_000, random_state=rng)
    expected = table.sum(axis=1)[:, None] * table.sum(axis=0) / table.sum()
    chi = ((sampled - expected) ** 2 / expected).sum(axis=(1, 2))
    assert result.heterogeneity.p_value == pytest.approx(
        (chi >= result.heterogeneity.statistic - 1e-9).mean(), abs=0.02
    )
    assert subgroup_rates(success, group, seed=3).heterogeneity == result.heterogeneity


def test_a_subgroup_with_fewer_than_ten_patients_is_counted_and_not_estimated() -> None:
    success, group = _rows(large=(30, 40), other=(20, 40), rare=(9, 9))
    result = subgroup_rates(success, group, seed=0)
    rare = result.groups["rare"]
    assert rare.n == 9
    assert np.isnan([rare.estimate.value, rare.estimate.ci_low, rare.difference.value]).all()
    assert any("suppressed: fewer than 10 patients" in warning for warning in rare.estimate.warnings)
    assert result.heterogeneity.df == 1
    assert (result.lowest, result.highest) == ("other", "large")


def test_one_subgroup_or_alike_patients_are_not_tested() -> None:
    for counts in ({"a": (10, 20)}, {"a": (20, 20), "b": (15, 15)}):
        result = subgroup_rates(*_rows(**counts), seed=0)
        assert np.isnan(result.heterogeneity.p_value)
        assert result.heterogeneity.warnings
    alone = subgroup_rates(*_rows(a=(10, 20)), seed=0)
    assert (alone.lowest, alone.highest) == (None, None)
    assert np.isnan(alone.gap.value)
    with pytest.raises(InputError, match="must not be called 'missing'"):
        subgroup_rates(*_rows(missing=(5, 20)), seed=0)


def test_a_planted_difference_of_aurocs_is_found_and_equal_subgroups_are_not_told_apart() -> None:
    rng = np.random.default_rng(0)
    positive, group = rng.random(1200) < 0.4, np.where(np.arange(1200) % 2, "scanner A", "scanner B")
    shift = np.where(group == "scanner A", 2.0, 0.5)
    score = rng.normal(size=1200) + positive * shift

    def auroc(rows: np.ndarray):
        return auroc_estimate(positive[rows], score[rows])

    result = subgroup_statistic(auroc, group, scale="logit")
    assert result.heterogeneity.p_value < 1e-6
    assert result.lowest == "scanner B"
    assert result.groups["scanner A"].difference.ci_low > 0
    shuffled = subgroup_statistic(auroc, rng.permutation(group), scale="logit")
    assert shuffled.heterogeneity.p_value > 0.01


def test_the_test_of_heterogeneity_is_uniform_where_subgroups_are_equal() -> None:
    rng = np.random.default_rng(1)
    group = np.repeat(["a", "b", "c"], 100)
    p_values = [subgroup_rates(rng.random(300) < 0.7, group, seed=0).heterogeneity.p_value for _ in range(400)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_slopes_of_calibration_by_subgroup_find_the_overconfident_one() -> None:
    rng = np.random.default_rng(2)
    logits, group = rng.normal(size=2000), np.where(np.arange(2000) % 2, "primary", "metastasis")
    event = rng.random(2000) < 1 / (1 + np.exp(-logits))
    prob = 1 / (1 + np.exp(-np.where(group == "metastasis", 2.0, 1.0) * logits))
    result = subgroup_statistic(lambda rows: recalibrate_class(event[rows], prob[rows]).slopes[0], group)
    assert result.groups["metastasis"].estimate.value == pytest.approx(0.5, abs=0.12)
    assert result.heterogeneity.p_value < 1e-4


def test_subgroups_without_an_interval_are_left_out_of_the_test() -> None:
    positive = np.tile([True, False], 30)
    group = np.repeat(["a", "b", "c"], 20)
    score = np.where(group == "c", positive, np.random.default_rng(0).normal(size=60) + 0.3 * positive)
    result = subgroup_statistic(lambda rows: auroc_estimate(positive[rows], score[rows]), group, scale="logit")
    assert result.heterogeneity.df == 1
    assert any("1 subgroups without an interval" in warning for warning in result.heterogeneity.warnings)


def test_holms_correction_is_that_of_the_step_down_procedure() -> None:
    tests = {name: TestResult(0.0, p, "t") for name, p in (("a", 0.01), ("b", 0.04), ("c", 0.03), ("d", np.nan))}
    corrected = holm(tests)
    assert {name: corrected[name].p_value for name in "abc"} == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert np.isnan(corrected["d"].p_value)
    assert corrected["a"].method == "t, Holm of 3"
