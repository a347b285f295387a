"""Cox regression against expected.json, R's survival 3.5 and published values."""

import json

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.cox import cox, indicators, nested_test, proportional_hazards_test
from crcjax.validation.survival import FollowUp

COLON = ("lev5fu", "lev", "age", "sex", "nodes", "differ", "extent")


@pytest.fixture(scope="module")
def data(real_table):
    """The follow-up and the covariates of each table of expected.json."""

    def read(name: str) -> tuple[FollowUp, dict[str, np.ndarray]]:
        if name == "rossi":
            table = real_table("rossi")
            names = ("fin", "age", "race", "wexp", "mar", "paro", "prio")
            return FollowUp(table["week"], table["arrest"] == 1), {covariate: table[covariate] for covariate in names}
        if name == "lung":
            table = real_table("lung")
            follow_up = FollowUp(table["time"], table["status"] == 1)
            return follow_up, {covariate: table[covariate] for covariate in ("age", "sex", "ph.ecog")}
        table = {column: values[real_table("colon")["etype"] == 2] for column, values in real_table("colon").items()}
        table |= {"lev": (table["rx"] == "Lev") * 1.0, "lev5fu": (table["rx"] == "Lev+5FU") * 1.0}
        return FollowUp(table["time"], table["status"] == 1), {covariate: table[covariate] for covariate in COLON}

    return read


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("entry", "table", "names"),
    [
        ("cox_lung_age_sex_ecog", "lung", ()),
        ("cox_rossi", "rossi", ()),
        ("cox_colon_death_rx", "colon", ("lev", "lev5fu")),
        ("cox_colon_death_multi", "colon", COLON),
    ],
)
def test_lung_rossi_and_colon_have_the_expected_coefficients(real_data, data, entry, table, names) -> None:
    expected = json.loads((real_data / "stats" / "expected.json").read_text())[entry]
    follow_up, covariates = data(table)
    model = cox(follow_up, {name: covariates[name] for name in names or covariates})
    assert (int(model.is_used.sum()), model.events, model.ties) == (expected["n"], expected["events"], "efron")
    assert model.log_likelihood == pytest.approx(expected["loglik"], abs=1e-6)
    for name, coefficient in model.coefficients.items():
        assert coefficient.log_hazard_ratio.value == pytest.approx(expected["statsmodels_coef"][name], abs=1e-8)
        # lifelines stops a few steps before the maximum, at 1e-6 to 1e-4 of it.
        assert coefficient.log_hazard_ratio.value == pytest.approx(expected["coef"][name], abs=5e-5)
        assert coefficient.error == pytest.approx(expected["se"][name], rel=1e-4)
        assert coefficient.test.p_value == pytest.approx(expected["p"][name], rel=1e-3)
        assert coefficient.hazard_ratio.n_excluded == len(follow_up) - expected["n"]


def test_the_rule_for_ties_changes_the_coefficient_of_freireichs_trial(freireich) -> None:
    for ties, golden in (("efron", (1.572125, 0.412397)), ("breslow", (1.509191, 0.409564))):
        model = cox(freireich.follow_up, {"placebo": 1.0 - freireich.is_treated}, ties=ties)
        coefficient = model.coefficients["placebo"]
        assert (coefficient.log_hazard_ratio.value, coefficient.error) == pytest.approx(golden, abs=1e-6)
        assert ties in coefficient.hazard_ratio.method
        assert model.ties == ties


@pytest.mark.real_data
def test_the_hazards_of_lung_are_proportional_by_the_test_of_r(data) -> None:
    tests = proportional_hazards_test(*data("lung"))
    golden = {"age": 0.18798767, "sex": 2.30543723, "ph.ecog": 2.05424877, "all covariates": 4.46365759}
    assert {name: test.statistic for name, test in tests.items()} == pytest.approx(golden, abs=1e-7)
    assert (tests["all covariates"].df, tests["all covariates"].p_value) == pytest.approx((3, 0.21555), abs=1e-5)


@pytest.mark.real_data
def test_strata_have_baseline_hazards_of_their_own_as_in_r(data, real_table) -> None:
    follow_up, covariates = data("colon")
    chosen = {name: covariates[name] for name in ("lev5fu", "lev", "age")}
    model = cox(follow_up, chosen, strata=covariates["extent"])
    assert model.log_likelihood == pytest.approx(-2660.02951284, abs=1e-6)
    # R's reference was Lev here: against observation, both differ by the coefficient of Obs.
    assert model.coefficients["lev"].log_hazard_ratio.value == pytest.approx(-0.03072299974799, abs=1e-7)
    expected = -0.33115761889293 - 0.03072299974799
    assert model.coefficients["lev5fu"].log_hazard_ratio.value == pytest.approx(expected, abs=1e-7)
    tests = proportional_hazards_test(follow_up, chosen, covariates["extent"])
    assert (tests["age"].statistic, tests["all covariates"].statistic) == pytest.approx((0.61092221, 2.11492243))


@pytest.mark.real_data
def test_nested_models_have_rs_likelihood_ratio(data) -> None:
    follow_up, covariates = data("lung")
    known = np.isfinite(covariates["ph.ecog"])
    covariates, follow_up = {name: values[known] for name, values in covariates.items()}, follow_up.of(known)
    full, reduced = cox(follow_up, covariates), cox(follow_up, {name: covariates[name] for name in ("age", "sex")})
    test = nested_test(full, reduced)
    assert (test.statistic, test.df, test.p_value) == pytest.approx((16.62444, 1, 4.556e-5), rel=1e-4)
    with pytest.raises(InputError, match="must have the covariates of the reduced one"):
        nested_test(reduced, full)
    with pytest.raises(InputError, match="on the same patients"):
        nested_test(full, cox(follow_up.of(np.arange(100)), {"age": covariates["age"][:100]}))


def _simulated(seed: int, effect: float, growth: float = 0.0) -> tuple[FollowUp, np.ndarray]:
    """Patients of whom half have another hazard, by the factor exp(effect), and growing by the power `growth` of time."""
    rng = np.random.default_rng(seed)
    x = np.arange(600) % 2
    time = rng.exponential(size=600) ** np.where(x, 1 / (1 + growth), 1) * np.exp(-effect * x)
    return FollowUp(np.minimum(time, 2.0), time < 2), x.astype(float)


def test_a_planted_hazard_ratio_is_recovered_and_non_proportional_hazards_are_noticed() -> None:
    follow_up, x = _simulated(0, 0.7)
    estimate = cox(follow_up, {"x": x}).coefficients["x"].log_hazard_ratio
    assert estimate.ci_low < 0.7 < estimate.ci_high
    assert proportional_hazards_test(follow_up, {"x": x})["x"].p_value > 0.01
    crossing, x = _simulated(0, 0.3, growth=1.0)
    assert proportional_hazards_test(crossing, {"x": x})["x"].p_value < 1e-4


def test_the_order_of_patients_and_the_unit_of_a_covariate_change_no_test() -> None:
    follow_up, x = _simulated(1, 0.4)
    noise = np.random.default_rng(2).normal(size=len(x))
    order = np.random.default_rng(3).permutation(len(x))
    plain = cox(follow_up, {"x": x, "noise": noise})
    other = cox(follow_up.of(order), {"x": x[order], "noise": 1000 * noise[order] + 7})
    assert other.log_likelihood == pytest.approx(plain.log_likelihood, abs=1e-8)
    for name, factor in (("x", 1), ("noise", 1000)):
        first, second = plain.coefficients[name].log_hazard_ratio, other.coefficients[name].log_hazard_ratio
        assert second.value * factor == pytest.approx(first.value, rel=1e-7)


def test_indicators_leave_the_reference_class_out() -> None:
    columns = indicators(np.array([0, 1, 2, 1]), ("canonical", "immune", "stromal"))
    assert {name: values.tolist() for name, values in columns.items()} == {
        "immune": [0, 1, 0, 1],
        "stromal": [0, 0, 1, 0],
    }


def test_what_the_data_do_not_determine_is_nan_with_a_warning(freireich) -> None:
    treated = freireich.is_treated.astype(float)
    nobody_fails = FollowUp(freireich.follow_up.time, np.zeros(42, bool))
    separated = FollowUp(freireich.follow_up.time, ~freireich.is_treated)
    for follow_up, covariates in (
        (freireich.follow_up, {"constant": np.ones(42)}),
        (freireich.follow_up, {"treated": treated, "not treated": 1 - treated}),
        (nobody_fails, {"treated": treated}),
        (separated, {"treated": treated}),
        (freireich.follow_up, {"unknown": np.full(42, np.nan)}),
    ):
        model = cox(follow_up, covariates)
        for coefficient in model.coefficients.values():
            assert np.isnan([coefficient.hazard_ratio.value, coefficient.error, coefficient.test.p_value]).all()
            assert coefficient.hazard_ratio.warnings
        tests = proportional_hazards_test(follow_up, covariates)
        assert all(np.isnan(test.p_value) and test.warnings for test in tests.values())
    # The likelihood of a separated model approaches a limit, so that its test is known.
    assert cox(separated, {"treated": treated}).likelihood_ratio.p_value < 1e-4


def test_few_events_for_each_coefficient_are_a_warning(freireich) -> None:
    noise = np.random.default_rng(0).normal(size=(4, 42))
    model = cox(freireich.follow_up, {f"x{i}": values for i, values in enumerate(noise)})
    assert any("30 events for 4 coefficients" in warning for warning in model.likelihood_ratio.warnings)


def test_wrong_covariates_are_refused(freireich) -> None:
    with pytest.raises(InputError, match="must have a covariate"):
        cox(freireich.follow_up, {})
    with pytest.raises(InputError, match="covariate x must have 42 values, got 2"):
        cox(freireich.follow_up, {"x": np.zeros(2)})
