"""Estimates of decisions: golden values, errors against simulation, and degenerate studies."""

import numpy as np
import pytest
from scipy import stats

from crcjax.validation import confusion as formulas
from crcjax.validation import decisions
from crcjax.validation.estimate import Estimate

GOLDEN = np.array([[58, 4, 11], [5, 19, 4], [9, 3, 34]])
Z = stats.norm.ppf(0.975)


def cases(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reference and predicted classes of the cases that a table counts."""
    pairs = np.array([cell for cell, count in np.ndenumerate(table) for _ in range(count)]).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def error(estimate: Estimate) -> float:
    return (estimate.ci_high - estimate.ci_low) / 2 / Z


def test_accuracy_has_the_published_interval() -> None:
    estimate = decisions.accuracy(*cases(GOLDEN))
    assert (estimate.value, estimate.n) == (pytest.approx(0.7551020, abs=1e-6), 147)
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((0.6796734, 0.8175373), abs=1e-6)
    exact = decisions.accuracy(*cases(GOLDEN), exact=True)
    limits = stats.binomtest(111, 147).proportion_ci()
    assert (exact.ci_low, exact.ci_high) == pytest.approx((limits.low, limits.high))


def test_the_rates_of_a_class_have_the_published_values() -> None:
    rates = decisions.class_rates(*cases(GOLDEN), 3)[1]
    assert rates.sensitivity.value == pytest.approx(0.678571, abs=1e-6)
    assert (rates.sensitivity.ci_low, rates.sensitivity.ci_high) == pytest.approx((0.493388, 0.820668), abs=1e-6)
    exact = decisions.class_rates(*cases(GOLDEN), 3, exact=True)[1].specificity
    assert (exact.value, exact.ci_low, exact.ci_high) == pytest.approx((0.941176, 0.882554, 0.976025), abs=1e-6)
    assert (rates.ppv.value, rates.ppv.n) == (pytest.approx(0.730769, abs=1e-6), 26)
    assert (rates.npv.value, rates.npv.n) == (pytest.approx(0.925620, abs=1e-6), 121)
    assert rates.f1.value == pytest.approx(0.703704, abs=1e-6)
    assert rates.prevalence.value == pytest.approx(28 / 147)
    assert not rates.sensitivity.warnings


def test_balanced_accuracy_and_macro_f1_have_the_published_errors() -> None:
    balanced = decisions.balanced_accuracy(*cases(GOLDEN), 3)
    assert (balanced.value, error(balanced)) == pytest.approx((0.7374075, 0.0397461), abs=1e-6)
    macro = decisions.macro_f1(*cases(GOLDEN), 3)
    assert (macro.value, error(macro)) == pytest.approx((0.7398311, 0.0386020), abs=1e-6)
    # The published limits take 1.96 for the normal quantile.
    limits = [macro.value + sign * 1.96 * error(macro) for sign in (-1, 1)]
    assert limits == pytest.approx([0.6641711, 0.8154911], abs=1e-6)
    assert (macro.ci_low, macro.ci_high) == pytest.approx((0.6641711, 0.8154911), abs=2e-6)


def test_delta_errors_are_those_of_simulated_studies() -> None:
    tables = np.random.default_rng(0).multinomial(147, GOLDEN.ravel() / 147, size=20_000).reshape(-1, 3, 3)
    arguments = (*cases(GOLDEN), 3)
    for estimate, values in (
        (decisions.macro_f1(*arguments), formulas.macro_f1_scores(tables)),
        (decisions.class_f1(*arguments, 1), formulas.f1_scores(tables)[:, 1]),
        (decisions.balanced_accuracy(*arguments), formulas.balanced_accuracies(tables)),
        (decisions.matthews_correlation(*arguments), formulas.matthews_correlations(tables)),
    ):
        assert error(estimate) == pytest.approx(values.std(), rel=0.03)


def test_matthews_correlation_has_the_published_value() -> None:
    assert decisions.matthews_correlation(*cases(GOLDEN), 3).value == pytest.approx(0.6045350, abs=1e-6)


def test_the_no_information_rate_is_tested_by_the_binomial_distribution() -> None:
    result = decisions.no_information_rate(*cases(GOLDEN))
    assert result.rate.value == pytest.approx(73 / 147)
    assert result.test.statistic == pytest.approx(38 / 147)
    assert result.test.p_value == pytest.approx(stats.binom.sf(110, 147, 73 / 147), rel=1e-9)
    label, predicted = cases(GOLDEN)
    four = decisions.no_information_rate(np.tile(label, 4), np.tile(predicted, 4), np.tile(np.arange(147), 4))
    once = decisions.no_information_rate(label, predicted, np.arange(147))
    assert four.test.p_value == pytest.approx(once.test.p_value)
    # The score test of 147 independent cases, with the error that the accuracy has under the hypothesis.
    z = (38 / 147) / np.sqrt(73 / 147 * 74 / 147 / 147)
    assert once.test.p_value == pytest.approx(stats.norm.sf(z))


def test_the_confusion_table_has_shares_of_rows_and_columns() -> None:
    table = decisions.confusion_table(*cases(GOLDEN), 3)
    assert (table.counts == GOLDEN).all()
    assert table.row_shares[1][0].value == pytest.approx(5 / 28)
    assert table.column_shares[1][0].value == pytest.approx(4 / 26)
    assert table.row_shares[1][0].ci_low < 5 / 28 < table.row_shares[1][0].ci_high
    assert table.column_shares[1][0].n == 26


def test_a_rare_class_is_descriptive_only_by_its_number_of_patients() -> None:
    label = np.repeat([0, 1], [40, 12])
    assert not decisions.class_rates(label, label, 2)[1].sensitivity.warnings
    patient = np.append(np.arange(40), 40 + np.arange(12) // 2)
    assert decisions.class_rates(label, label, 2, patient)[1].sensitivity.warnings == (
        "descriptive only: class 1 has 6 cases",
    )
    assert "descriptive only: class 1 has 1 case" in decisions.class_f1(label[:41], label[:41], 2, 1).warnings
    assert decisions.balanced_accuracy(label, label, 2, patient).warnings == ("descriptive only: class 1 has 6 cases",)


def test_a_perfect_study_still_has_an_interval_except_for_the_correlation() -> None:
    label = np.repeat([0, 1, 2], [20, 15, 15])
    balanced = decisions.balanced_accuracy(label, label, 3)
    # The mean of Wilson's lower limits n / (n + z²).
    assert balanced.ci_low == pytest.approx(np.mean([n / (n + Z**2) for n in (20, 15, 15)]))
    assert (balanced.value, balanced.ci_high) == (1, 1)
    one = decisions.class_f1(label, label, 3, 0)
    lowest = 20 / (20 + Z**2)
    assert (one.value, one.ci_low, one.ci_high) == pytest.approx((1, 2 * lowest / (1 + lowest), 1))
    macro = decisions.macro_f1(label, label, 3)
    limits = [2 * low / (1 + low) for low in (n / (n + Z**2) for n in (20, 15, 15))]
    assert (macro.ci_low, macro.ci_high) == pytest.approx((np.mean(limits), 1))
    matthews = decisions.matthews_correlation(label, label, 3)
    assert matthews.value == pytest.approx(1)
    assert np.isnan(matthews.ci_low)
    assert matthews.warnings
    wrong = decisions.macro_f1(label, (label + 1) % 3, 3)
    assert (wrong.value, wrong.ci_low) == (0, 0)
    assert 0 < wrong.ci_high < 0.2


def test_an_absent_class_gives_nan_and_a_warning() -> None:
    label, predicted = np.repeat([0, 1], 15), np.tile([0, 1, 0], 10)
    rates = decisions.class_rates(label, predicted, 3)[2]
    for estimate in (
        rates.sensitivity,
        rates.ppv,
        rates.f1,
        decisions.balanced_accuracy(label, predicted, 3),
        decisions.macro_f1(label, predicted, 3),
        decisions.matthews_correlation(label, np.zeros(30, int), 3),
        decisions.accuracy(np.zeros(0, int), np.zeros(0, int)),
        decisions.no_information_rate(np.zeros(0, int), np.zeros(0, int)).rate,
        decisions.class_rates(np.zeros(4, int), np.zeros(4, int), 2)[0].specificity,
    ):
        assert np.isnan([estimate.value, estimate.ci_low, estimate.ci_high]).all(), estimate
        assert estimate.warnings
    # It is predicted but has no case: the score is 0 and the mean carries a warning.
    called = np.where(np.arange(30) == 3, 2, predicted)
    macro = decisions.macro_f1(label, called, 3)
    assert macro.value == pytest.approx(
        decisions.class_f1(label, called, 3, 0).value / 3 + decisions.class_f1(label, called, 3, 1).value / 3
    )
    assert "class 2 has no case" in macro.warnings


def test_a_study_of_one_patient_has_no_interval() -> None:
    label, predicted, patient = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), np.zeros(4, int)
    for estimate in (
        decisions.balanced_accuracy(label, predicted, 2, patient),
        decisions.matthews_correlation(label, predicted, 2, patient),
    ):
        assert np.isfinite(estimate.value)
        assert np.isnan(estimate.ci_low) or estimate.ci_high - estimate.ci_low > 0.5
