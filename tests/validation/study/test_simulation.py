"""What is put into a simulated trial comes out of the estimators."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.calibration import fit_temperature
from crcjax.validation.estimate import Estimate
from crcjax.validation.study.load_trial import load_trial
from crcjax.validation.study.read_plan import read_plan
from crcjax.validation.study.section import Section
from crcjax.validation.study.sections.agreement import agreement
from crcjax.validation.study.sections.comparison import comparison
from crcjax.validation.study.sections.decisions import decisions
from crcjax.validation.study.sections.ranking import ranking
from crcjax.validation.study.sections.scanners import scanners
from crcjax.validation.study.sections.survival import survival
from crcjax.validation.study.sections.uncertainty import calibration_cases
from crcjax.validation.study.simulation.simulate_trial import simulate_trial
from crcjax.validation.study.simulation.truth import CLASSES, Truth
from crcjax.validation.study.trial import Trial

FILLS = {
    "decisions": decisions,
    "ranking": ranking,
    "agreement": agreement,
    "comparison": comparison,
    "scanners": scanners,
    "survival": survival,
}
# Standard errors beyond which a difference is no chance; with some 40 estimates one is beyond 4 in 400 trials.
FAR = 4.0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trial, dict, dict[str, Estimate]]:
    """A trial of 600 patients with a perfect reference, the truth, and all estimates of some sections."""
    folder = tmp_path_factory.mktemp("large")
    truth = replace(Truth(), reliability={"high": 1.0, "low": 1.0})
    path = simulate_trial(folder, seed=11, patients=600, truth=truth)
    trial = load_trial(read_plan(path).plan.model_copy(update={"resamples": 200}))
    cases, estimates = trial.cases(trial.primary), {}
    for name, fill in FILLS.items():
        section = Section(name, "", "", trial.classes)
        fill(trial, cases, section, "")
        estimates |= {id: estimate for id, (_, estimate) in section.estimates.items()}
    return trial, json.loads((folder / "truth.json").read_text()), estimates


def _distance(estimate: Estimate, expected: float) -> float:
    """The distance from the expected value in standard errors, read from the limit on that side."""
    limit = estimate.ci_low if expected < estimate.value else estimate.ci_high
    return abs(expected - estimate.value) / (abs(limit - estimate.value) / 1.96)


@pytest.mark.slow
def test_estimates_are_as_far_from_the_truth_as_their_intervals_say(large) -> None:
    _, facts, estimates = large
    distances = {
        id: _distance(estimates[id], expected) for id, expected in facts["expected"].items() if id in estimates
    }
    assert len(distances) > 20
    assert {id: distance for id, distance in distances.items() if distance > FAR} == {}
    # The values are not independent, and reader and scanner intervals are wide: about two thirds lie within one error.
    assert np.mean([distance < 1.96 for distance in distances.values()]) > 0.8


@pytest.mark.slow
def test_hazard_ratios_return_to_those_put_in(large) -> None:
    _, facts, estimates = large
    parameters = facts["parameters"]
    for outcome, ratios in parameters["hazard_ratio"].items():
        for name, ratio in list(zip(CLASSES, ratios, strict=True))[1:]:
            found = estimates[f"survival.{outcome}.hazard_ratio.reference.{name}"]
            logs = replace(
                found, **{part: float(np.log(getattr(found, part))) for part in ("value", "ci_low", "ci_high")}
            )
            assert _distance(logs, float(np.log(ratio))) < FAR, (outcome, name)
            predicted = estimates[f"survival.{outcome}.hazard_ratio.predicted.{name}"].value
            assert abs(np.log(predicted)) < abs(np.log(found.value)) + 0.15, "errors of the subtype move it towards 1"


@pytest.mark.slow
def test_the_temperature_returns(large) -> None:
    trial, facts, _ = large
    cases = trial.cases(trial.primary)
    assert fit_temperature(cases.probs, cases.label) == pytest.approx(facts["parameters"]["temperature"], rel=0.2)
    held_out = calibration_cases(trial)
    assert len(held_out) == 160
    assert not set(held_out.case_ids) & set(cases.case_ids)


@pytest.mark.slow
def test_normalisation_helps_in_the_simulation_as_it_was_put_in(large) -> None:
    _, facts, estimates = large
    expected = facts["expected"]
    for pair in ("scanner A.scanner B", "scanner B.scanner C"):
        assert expected[f"scanners.agreement.{pair}"] > expected[f"scanners.without.agreement.{pair}"] + 0.05
        assert estimates[f"scanners.agreement.{pair}"].value > estimates[f"scanners.without.agreement.{pair}"].value


def test_an_imperfect_reference_lowers_the_agreement_of_a_system_that_did_not_change() -> None:
    from crcjax.validation.study.simulation.expected import expected_values

    perfect = expected_values(replace(Truth(), reliability={"high": 1.0, "low": 1.0}))
    usual = expected_values(Truth())
    assert usual["decisions.accuracy_of_true_class"] == pytest.approx(
        perfect["decisions.accuracy_of_true_class"], abs=0.01
    )
    # Independent errors of the reference, which calls either other class (validation.md, noise ceiling).
    p, q = usual["decisions.accuracy_of_true_class"], Truth().reference_reliability
    assert usual["decisions.accuracy"] == pytest.approx(p * q + (1 - p) * (1 - q) / 2, abs=0.01)


def test_the_same_seed_gives_the_same_trial_and_another_one_another(tmp_path: Path, crcjax) -> None:
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        done = crcjax("simulate-trial", "--out", tmp_path / name, "--seed", seed)
        assert done.returncode == 0, done.stderr
        assert "no evidence about patients" in done.stderr
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "plan.toml" in files
    assert "truth.json" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert (tmp_path / "one" / "cohort.csv").read_bytes() != (tmp_path / "three" / "cohort.csv").read_bytes()
    with pytest.raises(InputError, match="--patients must be at least 100, got 20"):
        simulate_trial(tmp_path / "few", patients=20)
