import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.calibration import calibrate, load_calibration
from crcjax.validation.limits import (
    DISAGREEMENT,
    ENTROPY,
    EXCLUDED,
    OOD,
    STAIN,
    TISSUE,
    VACUITY,
    Limits,
    fit_limits,
)
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.predictions_table import PredictionRow, write_predictions

CLASSES = ("canonical", "immune", "stromal")


def _rows(count: int, seed: int, split: str = "val") -> list[PredictionRow]:
    """Slides with every measure, of a case each."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        probs = rng.dirichlet([0.5, 0.5, 0.5])
        rows.append(
            PredictionRow(
                *(f"{split}-{seed}-{number}", f"case-{split}-{seed}-{number}", "ok"),
                call=CLASSES[int(probs.argmax())],
                probs=tuple(map(float, probs)),
                entropy=float(-(probs * np.log(probs)).sum()),
                mutual_information=float(rng.gamma(1, 0.05)),
                vacuity=float(rng.beta(2, 5)),
                ood=float(rng.gamma(0.3, 1)),
                qc_coverage=float(rng.beta(9, 2)),
                regions=int(rng.integers(20, 400)),
                stain=tuple(map(float, rng.normal([0.2, 0.5, 0.3], 0.03))),
                model="m",
                split=split,
            )
        )
    return rows


def test_each_limit_refuses_at_most_the_stated_share_of_slides_like_those_it_was_fitted_on() -> None:
    share, refused = 0.1, dict.fromkeys((EXCLUDED, TISSUE, STAIN, OOD, ENTROPY, DISAGREEMENT, VACUITY), 0)
    later, repeats = 200, 40
    for seed in range(repeats):
        limits = fit_limits(_rows(60, seed), share)
        assert set(limits.largest) == set(refused)
        for row in _rows(later, 1000 + seed):
            for sentence in limits.exceeded_by(row):
                refused[sentence.split(":")[0]] += 1
    shares = {name: count / later / repeats for name, count in refused.items()}
    # The standard error over 40 calibrations of 60 slides is 0.006. The stain's centre is fitted on the same slides.
    assert all(value < share + 0.02 for value in shares.values()), shares
    assert min(shares.values()) > share - 0.04, shares


def test_no_slide_of_the_calibration_exceeds_the_largest_value_after_the_table_has_rounded_it(tmp_path: Path) -> None:
    rows = _rows(30, 0)
    write_predictions(tmp_path / "p.csv", rows, CLASSES)
    limits = fit_limits(load_predictions(tmp_path / "p.csv").rows, 1 / 31)
    assert [limits.exceeded_by(row) for row in rows] == [[]] * 30


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"qc_coverage": 0.02}, "excluded tissue: 98%, the limit is "),
        ({"regions": 2}, "little tissue: 2 regions, the limit is "),
        ({"stain": (0.5, 0.2, 0.3)}, "stain distance: 0.4"),
        ({"ood": 40.0}, "out-of-distribution score: 40, the limit is "),
        ({"entropy": 1.0986}, "entropy: 1.1, the limit is "),
        ({"mutual_information": 0.9}, "mutual information: 0.9, the limit is "),
        ({"vacuity": 0.999}, "vacuity: 0.999, the limit is "),
    ],
)
def test_a_slide_beyond_a_limit_is_not_evaluable_with_the_reason_and_keeps_its_probabilities(
    change: dict, sentence: str, tmp_path: Path
) -> None:
    limits = fit_limits(_rows(60, 0))
    usual = replace(
        *(_rows(1, 5)[0],),
        **{"qc_coverage": 1.0, "regions": 200, "stain": (0.2, 0.5, 0.3), "ood": 0.0, "entropy": 0.2},
        **{"mutual_information": 0.0, "vacuity": 0.1},
    )
    assert limits.apply(usual) == usual
    row = limits.apply(replace(usual, **change))
    assert (row.status, row.call, row.probs) == ("not_evaluable", "", usual.probs)
    assert row.reason.startswith(sentence)
    assert ";" not in row.reason
    # The table keeps all of it, and evaluations leave the slide out.
    write_predictions(tmp_path / "p.csv", [row, replace(usual, slide_id="usual")], CLASSES)
    read = load_predictions(tmp_path / "p.csv")
    assert (read.rows[0].status, read.rows[0].call, read.rows[0].reason) == ("not_evaluable", "", row.reason)
    assert read.rows[0].probs == pytest.approx(usual.probs)
    assert [row.slide_id for row in read.evaluable] == ["usual"]


def test_limits_are_absent_for_too_few_slides_and_for_measures_that_the_slides_lack() -> None:
    assert fit_limits(_rows(48, 0), 0.02).largest == {}
    assert len(fit_limits(_rows(49, 0), 0.02).largest) == 7
    softmax = [replace(row, vacuity=None, ood=None, stain=()) for row in _rows(60, 0)]
    limits = fit_limits(softmax)
    assert set(limits.largest) == {EXCLUDED, TISSUE, ENTROPY, DISAGREEMENT}
    assert limits.stain == ()
    # A slide that lacks a measure is not refused by its limit.
    assert fit_limits(_rows(60, 0)).exceeded_by(PredictionRow("a", "a", "ok")) == []


def test_slides_with_little_excluded_tissue_are_never_refused_for_it() -> None:
    limits = fit_limits([replace(row, qc_coverage=1.0) for row in _rows(60, 0)])
    assert limits.largest[EXCLUDED] == 0.1


@pytest.mark.parametrize("has_split", [False, True])
def test_they_are_fitted_on_the_calibration_split_or_else_on_the_validation_cases_and_stored(
    tmp_path: Path, has_split: bool
) -> None:
    # Slides of validation are rejected for ten times the out-of-distribution score.
    validation = [replace(row, ood=10 * (row.ood or 0)) for row in _rows(60, 1)]
    held_out = _rows(60, 2, split="")
    write_predictions(tmp_path / "p.csv", [*validation, *held_out], CLASSES)
    rng = np.random.default_rng(3)
    with open(tmp_path / "c.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide_id", "case_id", "subtype", "split"])
        for row in [*validation, *held_out]:
            split = row.split or ("calibration" if has_split else "test")
            table.writerow([row.slide_id, row.case_id, rng.choice(CLASSES), split])
    out = tmp_path / "calibration.json"
    options = {"method": "lac", "error": 0.1, "by_site": False}
    calibration = calibrate(tmp_path / "p.csv", tmp_path / "c.csv", out, **options)
    used = held_out if has_split else validation
    assert calibration.cases[""] == 60
    limits = calibration.limits
    assert limits is not None
    assert limits.largest[OOD] == pytest.approx(fit_limits(used).largest[OOD], abs=1e-4)
    # The entropy is that at the calibration's temperature.
    probs = calibration.probs(np.array([row.probs for row in used]))
    entropies = np.sort(-(probs * np.log(np.maximum(probs, 1e-300))).sum(axis=1))
    assert limits.largest[ENTROPY] == pytest.approx(entropies[-1], abs=1e-4)
    assert load_calibration(out, "m", CLASSES) == calibration
    # A calibration without limits is as those of earlier versions: the same file, and the same id.
    without = calibrate(tmp_path / "p.csv", tmp_path / "c.csv", tmp_path / "without.json", reject=0.0, **options)
    assert without.limits is None
    assert "limits" not in json.loads((tmp_path / "without.json").read_text())
    assert load_calibration(tmp_path / "without.json", "m", CLASSES) == without
    assert without.id != calibration.id
    with pytest.raises(InputError, match="--reject must be at least 0 and below 1"):
        calibrate(tmp_path / "p.csv", tmp_path / "c.csv", out, reject=1.5, **options)


def test_limits_apply_to_what_they_name_alone() -> None:
    limits = Limits(0.02, 60, {VACUITY: 0.5}, ())
    assert limits.exceeded_by(replace(_rows(1, 0)[0], vacuity=0.6, ood=99.0)) == ["vacuity: 0.6, the limit is 0.5"]
