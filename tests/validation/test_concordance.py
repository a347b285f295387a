"""Concordance against expected.json, R's survival 3.5, and a plain count of pairs."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crcjax.errors import InputError
from crcjax.validation.concordance import compare_concordance, harrell_c, uno_c
from crcjax.validation.cox import cox
from crcjax.validation.survival import FollowUp


def _error(estimate) -> float:
    return (estimate.ci_high - estimate.ci_low) / (2 * 1.959963984540054)


@pytest.mark.real_data
def test_lung_has_the_concordances_and_errors_of_r(real_data, real_table) -> None:
    table = real_table("lung")
    known = np.isfinite(table["ph.ecog"])
    follow_up = FollowUp(table["time"], table["status"] == 1).of(known)
    covariates = {name: table[name][known] for name in ("age", "sex", "ph.ecog")}
    full = cox(follow_up, covariates).risk
    reduced = cox(follow_up, {name: covariates[name] for name in ("age", "sex")}).risk
    harrell, uno, difference = (
        harrell_c(follow_up, full),
        uno_c(follow_up, full),
        compare_concordance(follow_up, full, reduced),
    )
    expected = json.loads((real_data / "stats" / "expected.json").read_text())["cox_lung_age_sex_ecog"]
    assert harrell.value == pytest.approx(expected["c_index"], abs=1e-12)
    assert _error(harrell) == pytest.approx(0.0250679738531, abs=1e-10)
    assert (uno.value, _error(uno)) == pytest.approx((0.626148295214, 0.0235624272153), abs=1e-10)
    assert (difference.value, _error(difference)) == pytest.approx((0.03512407136, 0.019805992236), abs=1e-10)


@pytest.mark.real_data
def test_rossi_has_the_expected_concordance(real_data, real_table) -> None:
    table = real_table("rossi")
    names = ("fin", "age", "race", "wexp", "mar", "paro", "prio")
    follow_up = FollowUp(table["week"], table["arrest"] == 1)
    expected = json.loads((real_data / "stats" / "expected.json").read_text())["cox_rossi"]["c_index"]
    assert harrell_c(follow_up, cox(follow_up, {n: table[n] for n in names}).risk).value == pytest.approx(expected)


_PATIENTS = st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 4)), min_size=2, max_size=15)


@settings(deadline=None, max_examples=100)
@given(_PATIENTS)
def test_harrells_c_is_a_count_of_pairs(patients) -> None:
    time, is_event, risk = (np.array(column) for column in zip(*patients, strict=True))
    wins = total = 0.0
    for i in range(len(time)):
        for j in range(len(time)):
            if is_event[i] and (time[i] < time[j] or (time[i] == time[j] and not is_event[j])):
                total += 1
                wins += (risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j])
    estimate = harrell_c(FollowUp(time, is_event), risk.astype(float))
    if total == 0:
        assert np.isnan(estimate.value)
        assert estimate.warnings
    else:
        assert estimate.value == pytest.approx(wins / total)
        if estimate.warnings:
            assert np.isnan(estimate.ci_low)
        else:
            assert estimate.ci_low <= estimate.value <= estimate.ci_high


def test_censoring_shifts_harrells_c_and_hardly_unos() -> None:
    shifts = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        risk = rng.normal(size=1500)
        time = rng.exponential(size=1500) * np.exp(-risk)
        complete = FollowUp(np.minimum(time, 3), time < 3)
        limit = rng.uniform(0, 4, size=1500)
        censored = FollowUp(np.minimum(np.minimum(time, limit), 3), (time < limit) & (time < 3))
        truth = harrell_c(complete, risk).value
        assert uno_c(complete, risk).value == pytest.approx(truth)
        shifts.append((uno_c(censored, risk, 3.0).value - truth, harrell_c(censored, risk).value - truth))
    uno, harrell = np.abs(np.mean(shifts, axis=0))
    assert uno < 0.5 * harrell


def test_perfect_opposite_and_constant_risks_have_known_values() -> None:
    time = np.arange(1.0, 21)
    follow_up = FollowUp(time, np.ones(20, bool))
    assert [harrell_c(follow_up, risk).value for risk in (-time, time, np.zeros(20))] == [1, 0, 0.5]
    assert harrell_c(follow_up, -time).warnings
    assert compare_concordance(follow_up, -time, -time).value == 0
    with pytest.raises(InputError, match="a risk that is a number"):
        harrell_c(follow_up, np.full(20, np.nan))
