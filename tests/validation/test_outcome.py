"""Subtype and outcome: a planted interaction is found, and R's interaction test of a real trial is repeated."""

import numpy as np
import pytest

from crcjax.validation.outcome import prognosis, treatment_by_subtype
from crcjax.validation.survival import FollowUp, restricted_mean_difference

CLASSES = ("canonical", "immune", "stromal")


def _trial(seed: int, effects: tuple[float, float, float], n: int = 900) -> tuple[FollowUp, np.ndarray, np.ndarray]:
    """A trial whose treatment changes the log hazard of each subtype by `effects`; subtypes differ in their hazards."""
    rng = np.random.default_rng(seed)
    subtype, is_treated = np.arange(n) % 3, rng.random(n) < 0.5
    log_hazard = np.array([0.0, -0.8, 0.5])[subtype] + np.array(effects)[subtype] * is_treated
    time, limit = rng.exponential(size=n) * np.exp(-log_hazard), rng.uniform(1, 3, size=n)
    return FollowUp(np.minimum(time, limit), time < limit), is_treated, subtype


def test_a_planted_interaction_is_found_with_its_hazard_ratios_and_is_called_exploratory() -> None:
    effects = (0.0, -1.2, 0.0)
    result = treatment_by_subtype(*_trial(0, effects), CLASSES, horizon=1.0)
    assert result.interaction.p_value < 1e-4
    assert (result.interaction.df, result.restricted_mean_interaction.df) == (2, 2)
    assert result.restricted_mean_interaction.p_value < 0.05
    for name, effect in zip(CLASSES, effects, strict=True):
        ratio = result.hazard_ratio[name]
        assert ratio.ci_low < np.exp(effect) < ratio.ci_high
        assert any("exploratory" in warning for warning in ratio.warnings)
    assert any("exploratory" in warning for warning in result.interaction.warnings)


def test_the_difference_of_restricted_means_of_a_subtype_is_that_of_its_arms() -> None:
    follow_up, is_treated, subtype = _trial(1, (0.2, 0.2, 0.2))
    result = treatment_by_subtype(follow_up, is_treated, subtype, CLASSES, horizon=1.0)
    immune = [follow_up.of((subtype == 1) & (is_treated == arm)) for arm in (True, False)]
    assert result.restricted_mean_difference["immune"].value == restricted_mean_difference(*immune, 1.0).value
    assert sum(result.events.values()) == follow_up.events


@pytest.mark.real_data
def test_colon_has_rs_interaction_of_treatment_with_sex(real_table) -> None:
    table = real_table("colon")
    chosen = (table["etype"] == 2) & (table["rx"] != "Lev")
    table = {name: values[chosen] for name, values in table.items()}
    follow_up = FollowUp(table["time"], table["status"] == 1)
    result = treatment_by_subtype(
        follow_up, table["rx"] == "Lev+5FU", table["sex"].astype(int), ("women", "men"), horizon=1825.0
    )
    # coxph(Surv(time, status) ~ rx * sex), rx Lev+5FU or Obs: anova against rx + sex, and the coefficients of rx.
    assert (result.interaction.statistic, result.interaction.p_value) == pytest.approx((4.118, 0.04243), rel=1e-4)
    assert result.hazard_ratio["women"].value == pytest.approx(0.8591179, rel=1e-6)


def test_a_subtype_without_events_in_one_arm_is_undetermined_and_the_test_still_known() -> None:
    follow_up, is_treated, subtype = _trial(2, (0.0, 0.0, 0.0), n=300)
    no_event = FollowUp(follow_up.time, follow_up.is_event & ~((subtype == 1) & is_treated))
    result = treatment_by_subtype(no_event, is_treated, subtype, CLASSES)
    assert np.isnan(result.hazard_ratio["immune"].value)
    assert np.isfinite(result.hazard_ratio["canonical"].value)
    assert np.isfinite(result.interaction.p_value)
    assert (result.restricted_mean_difference, result.restricted_mean_interaction) == ({}, None)


def test_a_horizon_that_a_subtype_does_not_reach_is_a_warning_not_an_error() -> None:
    follow_up, is_treated, subtype = _trial(3, (0.0, 0.0, 0.0), n=30)
    result = treatment_by_subtype(follow_up, is_treated, subtype, CLASSES, horizon=50.0)
    assert all(np.isnan(difference.value) for difference in result.restricted_mean_difference.values())
    assert np.isnan(result.restricted_mean_interaction.p_value)
    assert any("descriptive only" in w for estimate in result.hazard_ratio.values() for w in estimate.warnings)


def test_errors_of_the_predicted_subtype_weaken_its_hazard_ratio_and_add_nothing_to_the_reference() -> None:
    follow_up, _, reference = _trial(4, (0.0, 0.0, 0.0), n=1500)
    rng = np.random.default_rng(5)
    predicted = np.where(rng.random(1500) < 0.3, rng.integers(3, size=1500), reference)
    unknown = np.arange(1500) < 100
    result = prognosis(follow_up, {"reference": np.where(unknown, -1, reference), "predicted": predicted}, CLASSES)
    ratios = {
        source: model.coefficients[f"immune, {source}"].log_hazard_ratio.value
        for source, model in result.by_source.items()
    }
    assert ratios["reference"] < ratios["predicted"] < 0
    assert result.added["reference"].p_value < 1e-6 < 0.01 < result.added["predicted"].p_value
    assert {int(model.is_used.sum()) for model in (*result.by_source.values(), result.joint)} == {1400}
