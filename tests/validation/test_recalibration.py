"""Recalibration: scikit-learn's and the likelihood's coefficients, coverage, clusters and temperature."""

import numpy as np
import pytest
from scipy import optimize, special, stats
from sklearn.linear_model import LogisticRegression

from crcjax.validation.calibration import at_temperature, fit_temperature
from crcjax.validation.recalibration import recalibrate, recalibrate_class, temperature

Z = stats.norm.ppf(0.975)


def _sample(seed: int, n: int = 300, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([1.0] * 3, n)
    label = (rng.random(n)[:, None] > probs.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return label, at_temperature(probs, 1 / sharpness)


def test_a_class_has_the_coefficients_of_logistic_regression_and_its_errors() -> None:
    label, probs = _sample(0)
    event, logit = label == 1, special.logit(probs[:, 1])
    result = recalibrate_class(event, probs[:, 1])
    fit = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit[:, None], event)
    assert result.slopes[0].value == pytest.approx(fit.coef_[0, 0], abs=1e-4)
    assert result.intercepts[0].value == pytest.approx(fit.intercept_[0], abs=1e-4)
    # The errors of generalised linear models: the inverse of X' W X.
    design = np.column_stack([np.ones(300), logit])
    prob = special.expit(design @ [result.intercepts[0].value, result.slopes[0].value])
    covariance = np.linalg.inv(design.T @ (design * (prob * (1 - prob))[:, None]))
    for estimate, variance in zip((result.intercepts[0], result.slopes[0]), np.diag(covariance), strict=True):
        assert (estimate.ci_high - estimate.value) / Z == pytest.approx(np.sqrt(variance), rel=1e-6)
    # In the large: the sum of the predictions equals the number of events.
    shift = result.in_the_large[0].value
    assert special.expit(logit + shift).sum() == pytest.approx(event.sum())
    prob = special.expit(logit + shift)
    assert (result.in_the_large[0].ci_high - shift) / Z == pytest.approx(1 / np.sqrt((prob * (1 - prob)).sum()))


def test_several_classes_have_the_coefficients_of_the_largest_likelihood() -> None:
    label, probs = _sample(1, sharpness=1.6)
    result = recalibrate(label, probs)
    logits = np.log(probs[:, 1:] / probs[:, :1])

    def loss(c: np.ndarray) -> float:
        scores = np.column_stack([np.zeros(300), c[:2] + c[2:] * logits])
        return -(scores[np.arange(300), label] - special.logsumexp(scores, axis=1)).sum()

    best = optimize.minimize(loss, [0, 0, 1, 1], tol=1e-10)
    values = [e.value for e in (*result.intercepts, *result.slopes)]
    assert values == pytest.approx(best.x, abs=1e-4)
    assert result.test.statistic == pytest.approx(2 * (loss(np.array([0, 0, 1, 1.0])) - best.fun), abs=1e-6)
    assert (result.test.df, result.test.p_value) == (4, pytest.approx(stats.chi2.sf(result.test.statistic, 4)))
    errors = [(e.ci_high - e.value) / Z for e in (*result.intercepts, *result.slopes)]
    step = 1e-4
    hessian = np.array(
        [
            [
                sum(
                    a * b * loss(best.x + step * (a * np.eye(4)[i] + b * np.eye(4)[j]))
                    for a in (1, -1)
                    for b in (1, -1)
                )
                for j in range(4)
            ]
            for i in range(4)
        ]
    ) / (4 * step**2)
    assert errors == pytest.approx(np.sqrt(np.diag(np.linalg.inv(hessian))), rel=1e-3)
    # Probabilities that are too extreme have slopes below 1.
    assert all(slope.ci_high < 1 for slope in result.slopes)


def test_intervals_cover_and_the_test_keeps_its_level_on_calibrated_data() -> None:
    results = [recalibrate(*_sample(seed)) for seed in range(200)]
    for name, truth in (("in_the_large", 0), ("intercepts", 0), ("slopes", 1)):
        covered = [e.ci_low <= truth <= e.ci_high for r in results for e in getattr(r, name)]
        assert np.mean(covered) == pytest.approx(0.95, abs=0.04)
    assert stats.kstest([r.test.p_value for r in results], "uniform").pvalue > 0.01


def test_copies_of_slides_change_no_clustered_interval() -> None:
    label, probs = _sample(2)
    once = recalibrate(label, probs, np.arange(300))
    three = recalibrate(np.tile(label, 3), np.tile(probs, (3, 1)), np.tile(np.arange(300), 3))
    for name in ("in_the_large", "intercepts", "slopes"):
        for a, b in zip(getattr(once, name), getattr(three, name), strict=True):
            assert (b.value, b.ci_low, b.ci_high) == pytest.approx((a.value, a.ci_low, a.ci_high))
    assert three.test.p_value == pytest.approx(once.test.p_value)
    plain = recalibrate(label, probs)
    assert once.slopes[0].ci_high - once.slopes[0].ci_low == pytest.approx(
        plain.slopes[0].ci_high - plain.slopes[0].ci_low, rel=0.2
    )
    assert once.test.statistic == pytest.approx(plain.test.statistic, rel=0.3)


def test_what_has_no_recalibration_is_nan_with_a_warning() -> None:
    label, probs = _sample(3, 40)
    event = label == 0
    separated = recalibrate_class(event, np.where(event, 0.9, 0.2) + np.linspace(0, 0.05, 40))
    for result in (
        separated,
        recalibrate_class(event, np.full(40, 0.3)),
        recalibrate_class(np.zeros(40, bool), probs[:, 0]),
        recalibrate(np.minimum(label, 1), probs),
        recalibrate(label, probs, np.zeros(40, int)),
        recalibrate(label[:0], probs[:0]),
    ):
        assert np.isnan(result.slopes[0].value)
        assert result.slopes[0].warnings
        assert np.isnan(result.test.p_value)
    few = recalibrate(label, probs, np.arange(40) % 4)
    assert np.isfinite(few.slopes[0].value)
    assert np.isnan(few.test.p_value)
    clipped = recalibrate_class(np.append(event, True), np.append(probs[:, 0], 0.0))
    assert clipped.slopes[0].warnings == ("probabilities below 1e-15 are clipped",)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 2.5])
def test_the_temperature_is_that_of_a_search_and_its_interval_covers_the_truth(sharpness: float) -> None:
    label, probs = _sample(4, 400, sharpness)
    estimate = temperature(label, probs, 0, replicates=300)
    assert estimate.value == pytest.approx(fit_temperature(probs, label), rel=1e-4)
    assert estimate.ci_low < sharpness < estimate.ci_high
    three = temperature(np.tile(label, 3), np.tile(probs, (3, 1)), 0, np.tile(np.arange(400), 3), replicates=300)
    assert (three.ci_low, three.ci_high) == pytest.approx((estimate.ci_low, estimate.ci_high))


def test_the_temperature_of_a_resample_is_that_of_its_rows() -> None:
    label, probs = _sample(5, 60)
    twice = np.append(np.arange(60), np.arange(10))
    estimate = temperature(label[twice], probs[twice], 0, replicates=5)
    assert estimate.value == pytest.approx(fit_temperature(probs[twice], label[twice]), rel=1e-4)


def test_a_temperature_at_the_limit_carries_a_warning() -> None:
    label = np.arange(30) % 3
    wrong = temperature(label, np.roll(0.97 * np.eye(3)[label] + 0.01, 1, axis=1), 0, replicates=20)
    assert wrong.value == pytest.approx(10, rel=1e-4)
    assert any("limit of its range" in warning for warning in wrong.warnings)
    right = temperature(label, 0.4 * np.eye(3)[label] + 0.2, 0, replicates=20)
    assert right.value == pytest.approx(0.1, rel=1e-4)
    assert np.isnan(temperature(label[:0], np.zeros((0, 3)), 0).value)
