"""What holds for every statistic of a table of predictions: copies, names, order, and studies that are hardly one."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

from crcjax.validation import calibration_error, decisions, probability_scores, ranking
from crcjax.validation.agreement import kappa_of_units
from crcjax.validation.conformal import conformal_performance
from crcjax.validation.estimate import Estimate, TestResult
from crcjax.validation.paired import paired_difference_of_units
from crcjax.validation.precision_recall import average_precision
from crcjax.validation.predictive_values import predictive_values
from crcjax.validation.prior_shift import estimate_prevalence
from crcjax.validation.recalibration import recalibrate, recalibrate_class, temperature
from crcjax.validation.resampled_statistics import compare_tables, table_statistics
from crcjax.validation.risk_coverage import rates_by_group, selective_accuracies, selective_risk

Arrays = np.ndarray
SEED, REPLICATES = 0, 200
PREVALENCE = np.array([0.5, 0.2, 0.3])

# Every function of (label, probabilities, patient) that takes several slides of a patient.
STATISTICS: dict[str, Callable[[Arrays, Arrays, Arrays], object]] = {
    "accuracy": lambda y, p, c: decisions.accuracy(y, p.argmax(axis=1), c),
    "exact accuracy": lambda y, p, c: decisions.accuracy(y, p.argmax(axis=1), c, exact=True),
    "no-information rate": lambda y, p, c: decisions.no_information_rate(y, p.argmax(axis=1), c),
    "class rates": lambda y, p, c: decisions.class_rates(y, p.argmax(axis=1), 3, c),
    "balanced accuracy": lambda y, p, c: decisions.balanced_accuracy(y, p.argmax(axis=1), 3, c),
    "macro F1": lambda y, p, c: decisions.macro_f1(y, p.argmax(axis=1), 3, c),
    "Matthews": lambda y, p, c: decisions.matthews_correlation(y, p.argmax(axis=1), 3, c),
    "predictive values": lambda y, p, c: predictive_values(y, p.argmax(axis=1), PREVALENCE, c),
    "AUROC": lambda y, p, c: ranking.auroc_estimate(y == 0, p[:, 0], c),
    "macro AUROC": ranking.macro_auroc_estimate,
    "weighted AUROC": lambda y, p, c: ranking.macro_auroc_estimate(y, p, c, weighted=True),
    "Hand-Till": ranking.hand_till,
    "two AUROCs": lambda y, p, c: ranking.compare_aurocs(y == 0, p[:, 0], p[:, 1], c),
    "average precision": lambda y, p, c: average_precision(y == 0, p[:, 0], SEED, c, replicates=REPLICATES),
    "bootstrap table": lambda y, p, c: table_statistics(y, p, SEED, c, replicates=REPLICATES),
    "BCa table": lambda y, p, c: table_statistics(y, p, SEED, c, replicates=REPLICATES, interval="bca"),
    "ECE": lambda y, p, c: calibration_error.top_label_error(y, p, SEED, c, samples=REPLICATES),
    "classwise ECE": lambda y, p, c: calibration_error.classwise_error(
        y, p, SEED, c, binning="mass", samples=REPLICATES
    ),
    "Brier score": probability_scores.brier_score,
    "log loss": probability_scores.log_loss,
    "Brier skill": probability_scores.brier_skill,
    "Brier parts": lambda y, p, c: probability_scores.brier_decomposition(
        y == 0, p[:, 0], SEED, c, replicates=REPLICATES
    ),
    "Spiegelhalter": lambda y, p, c: probability_scores.spiegelhalter_test(y == 0, p[:, 0], c),
    "failure AUROC": lambda y, p, c: (
        selective_risk(1 - p.max(axis=1), p.argmax(axis=1) != y, SEED, c, replicates=REPLICATES).failure_auroc
    ),
    "selective accuracy": lambda y, p, c: selective_accuracies(
        1 - p.max(axis=1), p.argmax(axis=1) != y, SEED, c, replicates=REPLICATES
    ),
    "deferral": lambda y, p, c: rates_by_group(p.max(axis=1) < 0.5, y.tolist(), c),
    "kappa": lambda y, p, c: kappa_of_units(y, p.argmax(axis=1), 3, c),
    "paired difference": lambda y, p, c: paired_difference_of_units(p.argmax(axis=1) == y, p[:, 0] > 0.3, c),
    "two tables": lambda y, p, c: compare_tables(y, p, p[:, ::-1].copy(), SEED, c, replicates=REPLICATES),
    "recalibration": recalibrate,
    "recalibration of a class": lambda y, p, c: recalibrate_class(y == 0, p[:, 0], c),
    "temperature": lambda y, p, c: temperature(y, p, SEED, c, replicates=50),
    "prevalence": lambda y, p, c: estimate_prevalence(p, PREVALENCE, SEED, c, replicates=20),
    "conformal": lambda y, p, c: conformal_performance(p > 0.3, y, c, (y % 2).tolist()),
}


def results(value: object) -> Iterator[Estimate | TestResult]:
    """The estimates and tests that a value is made of."""
    if isinstance(value, Estimate | TestResult):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from results(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from results(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from results(getattr(value, field.name))


def numbers(value: object) -> np.ndarray:
    names = {Estimate: ("value", "ci_low", "ci_high"), TestResult: ("statistic", "p_value")}
    return np.array([[getattr(r, name) for name in names[type(r)]] for r in results(value) for _ in [0]], object)


def study(seed: int, patients: int = 45) -> tuple[Arrays, Arrays, Arrays]:
    rng = np.random.default_rng(seed)
    cluster = np.sort(rng.integers(patients, size=2 * patients))
    label = rng.integers(3, size=patients)[cluster]
    logits = rng.normal(size=(len(cluster), 3)) + np.eye(3)[label]
    return label, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), cluster


def flat(value: object) -> np.ndarray:
    return np.array([x for row in numbers(value) for x in row], float)


@pytest.mark.parametrize("name", STATISTICS)
def test_copies_of_every_slide_change_no_value_and_narrow_no_interval(name: str) -> None:
    label, probs, cluster = study(1)
    once = list(results(STATISTICS[name](label, probs, cluster)))
    copied = list(results(STATISTICS[name](np.tile(label, 3), np.tile(probs, (3, 1)), np.tile(cluster, 3))))
    assert once
    for before, after in zip(once, copied, strict=True):
        if isinstance(before, TestResult):
            assert after.p_value == pytest.approx(before.p_value, rel=1e-6, nan_ok=True)
        else:
            assert after.value == pytest.approx(before.value, rel=1e-9, nan_ok=True)
            width, copied_width = before.ci_high - before.ci_low, after.ci_high - after.ci_low
            assert copied_width >= width - 1e-9 or np.isnan(width)


@pytest.mark.parametrize("name", STATISTICS)
def test_the_names_of_patients_and_the_order_of_rows_change_nothing(name: str) -> None:
    label, probs, cluster = study(2)
    order = np.random.default_rng(0).permutation(len(label))
    names = np.random.default_rng(1).permutation(1000)
    before = flat(STATISTICS[name](label, probs, cluster))
    after = flat(STATISTICS[name](label[order], probs[order], names[cluster][order]))
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-12)


def _degenerate() -> dict[str, tuple[Arrays, Arrays, Arrays]]:
    label, probs, cluster = study(3)
    certain, uniform = np.eye(3)[label], np.full(probs.shape, 1 / 3)
    return {
        "no case": (label[:0], probs[:0], cluster[:0]),
        "one case": (label[:1], probs[:1], cluster[:1]),
        "two cases": (label[:2], probs[:2], np.array([0, 1])),
        "one patient": (label, probs, np.zeros(len(label), int)),
        "one class": (np.zeros(len(label), int), probs, cluster),
        "an absent class": (np.minimum(label, 1), probs, cluster),
        "a class of one case": (
            np.append(np.minimum(label, 1), 2),
            np.vstack([probs, probs[:1]]),
            np.append(cluster, 99),
        ),
        "all correct": (label, 0.7 * certain + 0.1, cluster),
        "certain and correct": (label, certain, cluster),
        "certain and wrong": (label, np.roll(certain, 1, axis=1), cluster),
        "all probabilities equal": (label, uniform, cluster),
    }


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("case", _degenerate())
def test_a_study_that_is_hardly_one_gives_numbers_or_nan_with_a_warning(name: str, case: str) -> None:
    for result in results(STATISTICS[name](*_degenerate()[case])):
        if isinstance(result, TestResult):
            assert np.isfinite(result.p_value) or result.warnings
            continue
        assert not np.isinf([result.value, result.ci_low, result.ci_high]).any()
        if np.isnan([result.value, result.ci_low, result.ci_high]).any():
            assert result.warnings
        else:
            assert result.ci_low <= result.ci_high
