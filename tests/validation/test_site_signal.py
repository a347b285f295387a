"""Probes of site and scanner: planted signals, their absence, and AUROCs that the site cannot inflate."""

import numpy as np
import pytest
from scipy.stats import contingency

from crcjax.validation.ranking import macro_auroc_estimate
from crcjax.validation.site_signal import label_association, probe_groups, within_site_auroc

SITES = np.array(["leeds", "oxford", "york"])


def _study(seed: int, shift: float, patients: int = 120, slides: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings in which the site moves two of 24 features, and slides of a patient are alike."""
    rng = np.random.default_rng(seed)
    site, patient = rng.integers(3, size=patients), np.repeat(np.arange(patients), slides)
    own = rng.normal(size=(patients, 24))
    features = own[patient] + 0.3 * rng.normal(size=(len(patient), 24))
    features[:, :2] += shift * np.eye(3)[site[patient]][:, :2]
    return features, SITES[site[patient]], patient


def test_a_planted_site_is_found_far_above_the_baseline() -> None:
    features, site, _ = _study(0, shift=3.0)
    probe = probe_groups(features, site, seed=0, permutations=199)
    assert probe.groups == ("leeds", "oxford", "york")
    assert probe.balanced_accuracy.ci_low > 0.7
    assert probe.baseline == pytest.approx(1 / 3, abs=0.03)
    assert probe.test.p_value == pytest.approx(1 / 200)


def test_without_a_site_signal_p_values_are_uniform_also_with_several_slides_a_patient() -> None:
    p_values = []
    for seed in range(60):
        features, site, patient = _study(seed, shift=0.0, patients=60, slides=3)
        p_values.append(probe_groups(features, site, 0, patient, permutations=99).test.p_value)
    # Of 60 tests at 5 %, 3 are expected; more than 9 have a probability below 0.1 %.
    assert (np.array(p_values) <= 0.05).sum() <= 9
    assert 0.35 < np.mean(p_values) < 0.65


def test_a_patients_slides_are_never_divided_between_folds() -> None:
    features, site, patient = _study(1, shift=0.0, patients=60, slides=4)
    # Copies of a slide would be recognised, and look like a signal of the site.
    copied = features[np.unique(patient, return_index=True)[1]][patient]
    probe = probe_groups(copied, site, 0, patient, permutations=199)
    assert probe.balanced_accuracy.value < 0.5
    assert probe.balanced_accuracy.n_clusters == 60


def test_scanners_that_scanned_the_same_slides_are_compared_within_patients() -> None:
    rng = np.random.default_rng(2)
    own = np.repeat(2 * rng.normal(size=(50, 16)), 2, axis=0)
    scanner, patient = np.tile(["AT2", "P1000"], 50), np.repeat(np.arange(50), 2)
    shifted = own + 0.3 * rng.normal(size=own.shape) + (scanner == "AT2")[:, None] * np.eye(16)[0] * 2
    assert probe_groups(shifted, scanner, 0, patient, permutations=199).test.p_value < 0.02
    same = own + 0.3 * rng.normal(size=own.shape)
    assert probe_groups(same, scanner, 0, patient, permutations=199).test.p_value > 0.05


def test_a_signal_that_is_only_that_of_the_label_vanishes_within_labels() -> None:
    rng = np.random.default_rng(3)
    label = rng.integers(2, size=200)
    # Sites with other mixtures of labels; the features tell the label alone.
    site = np.where(rng.random(200) < np.where(label == 1, 0.85, 0.15), "leeds", "york")
    features = rng.normal(size=(200, 8)) + 2 * label[:, None]
    assert probe_groups(features, site, 0, permutations=199).test.p_value < 0.01
    assert probe_groups(features, site, 0, stratum=label, permutations=199).test.p_value > 0.05


def test_the_order_of_rows_and_the_names_of_patients_change_nothing() -> None:
    features, site, patient = _study(4, shift=1.0, patients=50, slides=2)
    order = np.random.default_rng(0).permutation(len(site))
    first = probe_groups(features, site, 0, patient, permutations=19)
    second = probe_groups(features[order], site[order], 0, 1000 - patient[order], permutations=19)
    assert first.balanced_accuracy.value == second.balanced_accuracy.value


def test_small_groups_and_missing_features_are_excluded_and_one_group_is_nan() -> None:
    features, site, _ = _study(5, shift=1.0)
    site[:3], features[5] = "hull", np.nan
    probe = probe_groups(features, site, 0, permutations=19)
    assert probe.groups == ("leeds", "oxford", "york")
    assert probe.balanced_accuracy.n_excluded == 4
    alone = probe_groups(features, np.full(120, "leeds"), 0)
    assert np.isnan([alone.balanced_accuracy.value, alone.test.p_value]).all()
    assert alone.balanced_accuracy.warnings


def test_cramers_v_is_that_of_bergsma_and_zero_where_labels_are_mixed_alike() -> None:
    table = np.array([[30, 5, 10], [6, 25, 9]])
    label = np.repeat(["immune", "stromal"], table.sum(axis=1))
    site = np.concatenate([np.repeat(SITES, counts) for counts in table])
    result = label_association(label, site, seed=0, permutations=999)
    plain = contingency.association(table, method="cramer")
    n = table.sum()
    phi = plain**2 - 2 / (n - 1)
    assert result.cramer_v == pytest.approx(np.sqrt(phi / (2 - 1 / (n - 1) - 1)))
    assert result.test.p_value == pytest.approx(1 / 1000)
    balanced = label_association(np.tile(["a", "b"], 60), np.repeat(["x", "y"], 60), seed=0, permutations=199)
    assert (balanced.cramer_v, balanced.test.p_value) == (0, 1)
    assert np.isnan(label_association(np.array(["a", "b"]), np.array(["x", "x"]), seed=0).cramer_v)


def _plain_within(positive: np.ndarray, score: np.ndarray, site: np.ndarray) -> float:
    pairs = [
        (score[i] > score[j]) + 0.5 * (score[i] == score[j])
        for i in np.flatnonzero(positive)
        for j in np.flatnonzero(~positive & (site == site[i]))
    ]
    return float(np.mean(pairs))


def test_within_sites_an_auroc_that_is_only_the_sites_is_chance() -> None:
    rng = np.random.default_rng(6)
    site = rng.integers(3, size=300)
    label = np.where(rng.random(300) < 0.8, site, rng.integers(3, size=300))
    # The probabilities tell the site and nothing of the label.
    probs = np.eye(3)[site] + 0.1 * rng.random((300, 3))
    estimate = within_site_auroc(label, probs, site)
    assert macro_auroc_estimate(label, probs).value > 0.8
    assert estimate.ci_low < 0.5 < estimate.ci_high
    plain = np.mean([_plain_within(label == k, probs[:, k].round(1), site) for k in range(3)])
    assert within_site_auroc(label, probs.round(1), site).value == pytest.approx(plain)


def test_at_one_site_the_auroc_within_sites_is_the_macro_auroc() -> None:
    rng = np.random.default_rng(7)
    label, patient = rng.integers(3, size=90), np.arange(90) // 2
    probs = rng.dirichlet(np.ones(3), 90) + 0.3 * np.eye(3)[label]
    for cluster in (None, patient):
        one, macro = (
            within_site_auroc(label, probs, np.full(90, "leeds"), cluster),
            macro_auroc_estimate(label, probs, cluster),
        )
        assert (one.value, one.ci_low, one.ci_high) == pytest.approx((macro.value, macro.ci_low, macro.ci_high))
    doubled = [np.concatenate([values, values]) for values in (label, probs, np.full(90, "leeds"), patient)]
    again = within_site_auroc(*doubled)
    single = within_site_auroc(label, probs, np.full(90, "leeds"), patient)
    assert (again.ci_low, again.ci_high) == pytest.approx((single.ci_low, single.ci_high))


def test_a_class_that_no_site_compares_is_nan() -> None:
    estimate = within_site_auroc(np.array([0, 0, 1, 1]), np.eye(2)[[0, 0, 1, 1]], np.array(["a", "a", "b", "b"]))
    assert np.isnan(estimate.value)
    assert estimate.warnings
