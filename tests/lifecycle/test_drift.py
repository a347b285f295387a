"""Drift is noticed, false alarms are as rare as stated, and the estimate without labels says when it does not hold."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.lifecycle.drift.drift_report import examine
from crcjax.lifecycle.drift.sequential import change_point_evidence, e_value, mean_evidence
from crcjax.lifecycle.drift.window_test import median_distance, window_p_value
from crcjax.validation.predictions_table import PredictionRow, write_predictions

CLASSES = ("canonical", "immune", "stromal")


def simulate(rng: np.random.Generator, count: int, start: int = 0, **changes: float) -> list[PredictionRow]:
    """Calibrated predictions: the target is sampled from the probabilities. `stain`, `scanner` and `concept` change them."""
    rows = []
    for number in range(start, start + count):
        probs = rng.dirichlet((0.4, 0.4, 0.4))
        target = rng.choice(3, p=probs)
        if rng.uniform() < changes.get("concept", 0.0):
            target = rng.choice(3)
        scanner = "new" if rng.uniform() < changes.get("scanner", 0.0) else ("AT2", "GT450")[number % 2]
        stain = tuple((rng.normal(size=3) * 0.05 + 0.5 + changes.get("stain", 0.0)).tolist())
        known = {"call": CLASSES[int(np.argmax(probs))], "probs": tuple(probs.tolist()), "target": CLASSES[target]}
        size = {"regions": int(rng.integers(50, 200)), "qc_coverage": float(rng.uniform(0.6, 1))}
        rows.append(
            PredictionRow(
                f"s{number}", f"c{number}", "ok", model="m", scanner=scanner, stain=stain, site="leeds", **known, **size
            )
        )
    return rows


def test_without_a_change_the_p_values_are_uniform_and_independent_of_those_before() -> None:
    rng = np.random.default_rng(0)
    past, p_values = rng.normal(size=(60, 2)), []
    width = median_distance(past)
    for _ in range(200):
        window = rng.normal(size=(10, 2))
        p_values.append(window_p_value(past, window, width, rng))
        past = np.concatenate([past, window])
    assert abs(np.mean(p_values) - 0.5) < 0.08
    assert abs(np.corrcoef(p_values[:-1], p_values[1:])[0, 1]) < 0.2


def test_the_mean_e_value_of_a_uniform_p_value_is_one_and_small_ones_are_evidence() -> None:
    # The mean over p-values above a small one; those below contribute (s - 1)/ln(s).
    logarithms = np.linspace(np.log(1e-6), 0, 20_001)[:-1]
    integral = sum(e_value(float(np.exp(x))) * float(np.exp(x)) for x in logarithms) * (logarithms[1] - logarithms[0])
    assert integral + (1e-6 - 1) / np.log(1e-6) == pytest.approx(1, abs=0.01)
    assert e_value(0.001) > 20
    assert e_value(1.0) == 0.5
    assert change_point_evidence([1.0] * 50) == pytest.approx([1.0] * 50)
    # A change after fifty windows without evidence is noticed soon.
    evidence = change_point_evidence([0.7] * 50 + [20.0] * 6)
    assert max(evidence[:50]) <= 1
    assert evidence[-1] > 1000


def test_evidence_about_a_mean_stays_small_within_the_tolerance_and_grows_beyond_it() -> None:
    rng = np.random.default_rng(1)
    largest = [
        max(mean_evidence((rng.uniform(size=300) < 0.77).astype(float), [0.8] * 300, 0.03)[0]) for _ in range(100)
    ]
    # Ville: one in twenty at most; of 100, more than 12 then have a probability of 0.1 %.
    assert np.sum(np.array(largest) >= 20) <= 12
    below, above = mean_evidence((rng.uniform(size=300) < 0.5).astype(float), [0.8] * 300, 0.03)
    assert max(below) > 1000
    assert max(above) < 20


@pytest.mark.parametrize(("change", "stream"), [({"stain": 0.1}, "stain"), ({"scanner": 0.9}, "scanner")])
def test_a_change_is_noticed_in_what_changed_and_not_before(change: dict, stream: str) -> None:
    rng = np.random.default_rng(2)
    later = simulate(rng, 100, 1000) + simulate(rng, 200, 2000, **change)
    report = examine(simulate(rng, 200), later)
    assert [found.name for found in report.alarms][:1] == [stream]
    assert 5 <= report.alarms[0].alarm <= 9, "the change is at the fifth of twelve windows"
    assert report.performance.status == "unverified"
    assert stream in report.performance.reason


def test_the_estimate_is_valid_with_labels_that_agree_and_invalid_if_the_concept_changed() -> None:
    rng = np.random.default_rng(3)
    reference = simulate(rng, 1000)
    valid = examine(reference, simulate(rng, 1000, 2000)).performance
    assert valid.status == "valid"
    assert abs(valid.accuracy - valid.observed) < 0.03
    changed = simulate(rng, 300, 2000, concept=0.6)
    invalid = examine(reference, changed).performance
    assert (invalid.status, "less often correct" in invalid.reason) == ("invalid", True)
    # Without labels nothing shows it, and the estimate says so.
    unlabelled = [replace(row, target="") for row in changed]
    assert examine(reference, unlabelled).performance.status == "unverified"


def test_a_bundle_that_is_not_calibrated_has_no_estimate() -> None:
    rng = np.random.default_rng(4)
    performance = examine(simulate(rng, 300, concept=0.5), simulate(rng, 50, 1000)).performance
    assert performance.status == "invalid"
    assert "calibrate the bundle" in performance.reason


def test_too_few_cases_are_named() -> None:
    rng = np.random.default_rng(5)
    with pytest.raises(InputError, match="at least 50 cases with a prediction, got 20"):
        examine(simulate(rng, 20), simulate(rng, 50))
    with pytest.raises(InputError, match="must fill a window of 25 cases, got 10"):
        examine(simulate(rng, 60), simulate(rng, 10))


def test_the_command_reports_each_quantity_and_exits_with_1_after_a_change(crcjax: Callable, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    write_predictions(tmp_path / "reference.csv", simulate(rng, 100), CLASSES)
    write_predictions(tmp_path / "same.csv", simulate(rng, 100, 1000), CLASSES)
    write_predictions(tmp_path / "other.csv", simulate(rng, 150, 1000, stain=0.2), CLASSES)
    options = ("--reference", tmp_path / "reference.csv", "--out", tmp_path / "drift.json")
    done = crcjax("drift", tmp_path / "same.csv", *options)
    assert (done.returncode, done.stdout.count("no change")) == (0, 7), done.stderr
    done = crcjax("drift", tmp_path / "other.csv", *options)
    assert done.returncode == 1
    assert "stain: changed, noticed in window" in done.stdout
    assert json.loads((tmp_path / "drift.json").read_text())["windows"] == 6
