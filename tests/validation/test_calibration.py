import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crcjax.errors import InputError
from crcjax.validation.calibration import (
    HOTTEST,
    Calibration,
    at_temperature,
    calibrate,
    fit_temperature,
    load_calibration,
)
from crcjax.validation.conformal import conformal_threshold, nonconformity

CLASSES = ("canonical", "immune", "stromal")


def _drawn(cases: int, sharpness: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels drawn from them; then the probabilities are sharpened."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([0.7, 0.7, 0.7], cases)
    label = np.array([rng.choice(3, p=p) for p in probs])
    return at_temperature(probs, 1 / sharpness), label


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_over_and_underconfidence_and_moves_no_call(sharpness: float) -> None:
    probs, label = _drawn(4000, sharpness, 0)
    temperature = fit_temperature(probs, label)
    assert temperature == pytest.approx(sharpness, rel=0.1)
    scaled = at_temperature(probs, temperature)
    np.testing.assert_array_equal(scaled.argmax(axis=1), probs.argmax(axis=1))
    np.testing.assert_allclose(scaled.sum(axis=1), 1)
    np.testing.assert_allclose(at_temperature(probs, 1.0), probs, atol=1e-12)


def test_probabilities_of_zero_have_a_temperature_too() -> None:
    probs = np.repeat([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1e-38, 0.0]], 10, axis=0)
    label = np.repeat([0, 2, 1], 10)  # ten right, and twenty wrong with full confidence
    assert fit_temperature(probs, label) == pytest.approx(HOTTEST, rel=1e-3)
    scaled = at_temperature(probs, HOTTEST)
    assert (scaled > 0).all()
    np.testing.assert_allclose(scaled.sum(axis=1), 1)
    assert np.isfinite(at_temperature(probs, 1 / HOTTEST)).all()


@given(
    scores=st.lists(st.integers(0, 6), min_size=2, max_size=40),
    error=st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.5]),
)
def test_each_score_of_any_set_left_out_in_turn_is_covered_as_often_as_was_asked(
    scores: list[int], error: float
) -> None:
    """Marginal coverage for every exchangeable distribution: which of the scores is the new one is then uniform."""
    values = np.array(scores, float)
    covered = [values[i] <= conformal_threshold(np.delete(values, i), error) for i in range(len(values))]
    assert np.mean(covered) >= 1 - error - 1e-12
    if len(set(scores)) == len(scores) and len(scores) > 1 / error:  # no ties, none full: hardly more either
        assert np.mean(covered) <= 1 - error + 1 / len(scores) + 1e-12


@pytest.mark.parametrize("method", ["lac", "aps"])
@settings(deadline=None, max_examples=8)
@given(error=st.sampled_from([0.05, 0.1, 0.25]), cases=st.integers(40, 120), sharpness=st.sampled_from([0.5, 1.0, 4.0]))
def test_sets_hold_the_truth_as_often_as_asked_however_wrong_the_model_is(
    method: str, error: float, cases: int, sharpness: float
) -> None:
    rng = np.random.default_rng([cases, int(10 * sharpness)])
    trials, held = 800, []
    for trial in range(trials):
        probs, label = _drawn(cases + 1, sharpness, trial)
        scores = nonconformity(probs, method, rng.random(cases + 1))[np.arange(cases + 1), label]
        held.append(scores[-1] <= conformal_threshold(scores[:-1], error))
    deviation = math.sqrt(error * (1 - error) / trials)
    assert 1 - error - 4 * deviation <= np.mean(held) <= 1 - error + 1 / (cases + 1) + 4 * deviation


def test_too_few_cases_give_full_sets_and_not_the_largest_score() -> None:
    assert conformal_threshold(np.zeros(8), 0.1) == math.inf
    assert conformal_threshold(np.arange(9.0), 0.1) == 8
    everything = Calibration("m", CLASSES, 1.0, "lac", 0.1, {"": math.inf}, {"": 8})
    assert everything.set_of(np.array([1.0, 0.0, 0.0]), "a", None) == CLASSES


def test_scores_are_those_of_the_papers() -> None:
    probs = np.array([[0.2, 0.5, 0.3]])
    np.testing.assert_allclose(nonconformity(probs, "lac", np.array([0.5])), [[0.8, 0.5, 0.7]])
    np.testing.assert_allclose(nonconformity(probs, "aps", np.array([0.5])), [[0.9, 0.25, 0.65]])
    np.testing.assert_allclose(nonconformity(probs, "aps", np.array([1.0])), [[1.0, 0.5, 0.8]])


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path]:
    """60 validation cases of two sites, one of them with two slides, and 60 test cases that are called wrong."""
    probs, label = _drawn(120, 2.0, 5)
    predictions, cohort = [], []
    for i in range(120):
        split = "val" if i < 60 else ""
        shown = probs[i] if split else np.roll(np.eye(3)[label[i]], 1)
        row = {"slide_id": f"s{i}", "case_id": f"c{i}", "subtype": "", "status": "ok", "reason": "", "model": "abc"}
        row |= {f"p_{name}": repr(float(p)) for name, p in zip(CLASSES, shown, strict=True)}
        predictions.append(row | {"split": split, "calibration": ""})
        site = "north" if i % 10 else "south"
        cohort.append({"slide_id": f"s{i}", "case_id": f"c{i}", "subtype": CLASSES[label[i]], "site": site})
    predictions.append(predictions[0] | {"slide_id": "again"})
    cohort.append(cohort[0] | {"slide_id": "again"})
    paths = tmp_path / "predictions.csv", tmp_path / "cohort.csv"
    for path, rows in zip(paths, (predictions, cohort), strict=True):
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    return paths


def test_the_validation_cases_alone_are_fitted_on_once_each(tables: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "calibration.json"
    found = calibrate(*tables, out, method="lac", error=0.1, by_site=True)
    assert found.cases == {"": 60, "north": 54}  # the 6 of south are too few
    assert found.temperature == pytest.approx(fit_temperature(*(part[:60] for part in _drawn(120, 2.0, 5))))
    assert load_calibration(out, "abc", CLASSES) == found
    probs = np.array([0.6, 0.3, 0.1])
    north = found.thresholds["north"]
    expected = tuple(name for name, p in zip(CLASSES, probs, strict=True) if 1 - p <= north)
    assert found.set_of(probs, "x", "north") == expected
    assert found.set_of(probs, "x", "east") == found.set_of(probs, "x", None)


def test_a_calibration_of_another_model_or_of_calibrated_predictions_is_refused(
    tables: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "calibration.json"
    calibrate(*tables, out, method="aps", error=0.2, by_site=False)
    with pytest.raises(InputError, match="is of model abc, not def"):
        load_calibration(out, "def", CLASSES)
    out.write_text(json.dumps({"temperature": 1}))
    with pytest.raises(InputError, match="is not a calibration"):
        load_calibration(out, "abc", CLASSES)
    text = tables[0].read_text()
    tables[0].write_text(text.replace(",val,", ",val,abc"))
    with pytest.raises(InputError, match="is calibrated already"):
        calibrate(*tables, out, method="lac", error=0.1, by_site=False)
    tables[0].write_text(text.replace(",val,", ",test,"))
    with pytest.raises(InputError, match="has no validation cases"):
        calibrate(*tables, out, method="lac", error=0.1, by_site=False)
