import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from crcjax.validation.statistics import (
    Resamples,
    aggregate_cases,
    auroc,
    balanced_accuracy,
    brier,
    calibrated_ece,
    confusion_matrix,
    evaluate,
    expected_calibration_error,
    f1,
    macro_auroc,
    macro_f1,
    percentile_interval,
    wilson,
)

GOLDEN = np.array([[58, 4, 11], [5, 19, 4], [9, 3, 34]])


def _golden_cases() -> tuple[np.ndarray, np.ndarray]:
    pairs = [(i, j) for i in range(3) for j in range(3) for _ in range(GOLDEN[i, j])]
    label, called = np.array(pairs).T
    return label, called


def test_point_values_equal_the_published_golden_matrix() -> None:
    label, called = _golden_cases()
    confusion = confusion_matrix(label, called, 3)
    assert (confusion == GOLDEN).all()
    assert balanced_accuracy(confusion) == pytest.approx(0.7374075, abs=1e-6)
    assert macro_f1(confusion) == pytest.approx(0.7398311, abs=1e-6)
    assert f1(confusion)[1] == pytest.approx(0.703704, abs=1e-6)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(111, 147, 0.6796734, 0.8175373), (81, 98, 0.739649, 0.888779), (0, 28, 0, 0.120643), (28, 28, 0.879357, 1)],
)
def test_wilson_intervals_equal_golden_values(successes: int, n: int, low: float, high: float) -> None:
    found = wilson(successes, n)
    assert (found.ci_low, found.ci_high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_auroc_counts_ties_half() -> None:
    positive = np.array([int(c) for c in "0011010011010100"], bool)
    score = np.array(
        [
            float(v)
            for v in [
                ".1",
                ".35",
                ".24",
                ".8",
                ".2",
                ".85",
                ".13",
                ".85",
                ".74",
                ".58",
                ".71",
                ".25",
                ".35",
                ".58",
                ".05",
                ".4",
            ]
        ]
    )
    assert auroc(positive, score) == pytest.approx(0.7380952, abs=1e-6)
    assert np.isnan(auroc(np.ones(3, bool), np.arange(3)))


def test_macro_auroc_equals_sklearns() -> None:
    rng = np.random.default_rng(0)
    label, probs = rng.integers(0, 3, 80), rng.dirichlet(np.ones(3), 80).round(2)
    probs /= probs.sum(axis=1, keepdims=True)
    assert macro_auroc(label, probs) == pytest.approx(roc_auc_score(label, probs, multi_class="ovr"), abs=1e-12)


def test_resampled_statistics_equal_the_plain_loop() -> None:
    rng = np.random.default_rng(1)
    label, probs = rng.integers(0, 3, 40), rng.dirichlet(np.ones(3), 40)
    called = probs.argmax(axis=1)
    resamples = Resamples.sample(40, seed=3, count=20)
    confusions, aurocs = resamples.confusions(label, called, 3), resamples.macro_aurocs(label, probs)
    for weights, confusion, area in zip(resamples.weights, confusions, aurocs, strict=True):
        drawn = np.repeat(np.arange(40), weights)
        assert (confusion == confusion_matrix(label[drawn], called[drawn], 3)).all()
        assert area == pytest.approx(macro_auroc(label[drawn], probs[drawn]), abs=1e-12)


def test_the_bootstrap_interval_is_near_the_delta_methods() -> None:
    label, called = _golden_cases()
    confusions = Resamples.sample(147, seed=0).confusions(label, called, 3)
    found = percentile_interval(0.7398311, macro_f1(confusions), 147)
    assert found.ci_low == pytest.approx(0.664, abs=0.012)
    assert found.ci_high == pytest.approx(0.815, abs=0.012)


def test_doubled_slides_of_a_case_change_neither_value_nor_interval() -> None:
    rng = np.random.default_rng(2)
    label, probs = rng.integers(0, 3, 30), rng.dirichlet(np.ones(3), 30)
    ids = [f"c{i}" for i in range(30)]
    cases, once = aggregate_cases(ids, probs)
    _, twice = aggregate_cases([*ids, *ids], np.concatenate([probs, probs]))
    assert cases == ids
    np.testing.assert_allclose(once, twice, atol=1e-12)
    assert (
        evaluate(label, once, ("a", "b", "c"), 0)["accuracy"] == evaluate(label, twice, ("a", "b", "c"), 0)["accuracy"]
    )


def test_cases_are_the_normalised_mean_of_log_probabilities() -> None:
    _, probs = aggregate_cases(["A", "A"], np.array([[0.8, 0.2], [0.5, 0.5]]))
    np.testing.assert_allclose(probs, [[2 / 3, 1 / 3]], atol=1e-12)


def test_ece_equals_the_definition_and_its_null_the_published_size() -> None:
    confidence, right = np.array([0.95, 0.9, 0.6, 0.6]), np.array([True, False, True, False])
    assert expected_calibration_error(confidence, right, 10) == pytest.approx((2 * 0.1 + 0.05 + 0.9) / 4)
    probs = np.random.default_rng(4).dirichlet([1.2] * 3, 1000)
    assert calibrated_ece(probs, 0, 200).mean() == pytest.approx(0.032, abs=0.008)


def test_brier_is_the_sum_over_classes() -> None:
    assert brier(np.array([0]), np.array([[0.5, 0.25, 0.25]])) == pytest.approx(0.375)


def test_perfect_constant_and_absent_classes_give_bounds_or_a_warning() -> None:
    label = np.repeat([0, 1, 2], 5)
    perfect = evaluate(label, np.eye(3)[label] * 0.97 + 0.01, ("a", "b", "c"), 0)
    assert perfect["balanced_accuracy"].value == perfect["macro AUROC"].ci_low == 1
    constant = evaluate(label, np.full((15, 3), 1 / 3), ("a", "b", "c"), 0)
    assert constant["macro AUROC"].value == 0.5
    absent = evaluate(np.repeat([0, 1], 5), np.full((10, 3), 1 / 3), ("a", "b", "c"), 0)["balanced_accuracy"]
    assert np.isnan(absent.value)
    assert absent.warnings
