"""The noise ceiling against its computed values and simulated references."""

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.noise_ceiling import accuracy_for_truth, expected_agreement, reference_accuracy
from crcjax.validation.proportions import wilson


def test_a_perfect_system_agrees_as_often_as_the_reference_is_right() -> None:
    assert expected_agreement(1.0, 0.88, 3) == pytest.approx(0.88)
    assert expected_agreement(0.85, 0.88, 3) == pytest.approx(0.757)


def _with_errors(rng: np.random.Generator, truth: np.ndarray, accuracy: float) -> np.ndarray:
    wrong = (truth + rng.integers(1, 3, size=len(truth))) % 3
    return np.where(rng.random(len(truth)) < accuracy, truth, wrong)


def test_the_accuracies_that_were_put_into_a_simulation_come_out() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=200_000)
    system, first, second = (_with_errors(rng, truth, accuracy) for accuracy in (0.8, 0.88, 0.88))
    quality = reference_accuracy(wilson(int((first == second).sum()), len(truth)), 3)
    assert quality.ci_low < 0.88 < quality.ci_high
    corrected = accuracy_for_truth(wilson(int((system == first).sum()), len(truth)), 0.88, 3)
    assert corrected.ci_low < 0.8 < corrected.ci_high
    assert "sensitivity analysis" in corrected.method


def test_agreement_above_the_ceiling_is_cut_with_a_warning() -> None:
    estimate = accuracy_for_truth(wilson(95, 100), 0.88, 3)
    assert estimate.value == 1
    assert any("above the ceiling" in warning for warning in estimate.warnings)
    below = reference_accuracy(wilson(20, 100), 3)
    assert below.value == pytest.approx(1 / 3, abs=1e-6)
    assert any("less often than by chance" in warning for warning in below.warnings)


def test_a_reference_no_better_than_chance_is_refused() -> None:
    with pytest.raises(InputError, match="above 1/3"):
        expected_agreement(0.8, 0.3, 3)
    with pytest.raises(InputError, match="two classes"):
        expected_agreement(0.8, 0.9, 1)
    with pytest.raises(InputError, match="from 0 to 1"):
        expected_agreement(1.2, 0.9, 3)
