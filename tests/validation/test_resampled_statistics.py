"""All statistics of a table by matrix products: the same numbers as scikit-learn's, one resample after the other."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
from sklearn import metrics

from crcjax.validation.bootstrap import Resamples, number_patients
from crcjax.validation.ranking import hand_till
from crcjax.validation.resampled_statistics import (
    compare_tables,
    decision_replicates,
    probability_replicates,
    ranking_replicates,
    table_statistics,
)


def _study(seed: int, patients: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    label = rng.integers(3, size=patients)[cluster]
    logits = rng.normal(size=(len(cluster), 3)) + np.eye(3)[label]
    # Rounded, so that scores are tied.
    probs = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).round(1) + 0.01
    return cluster, label, probs / probs.sum(axis=1, keepdims=True)


def _ece(label: np.ndarray, probs: np.ndarray) -> float:
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == label
    edges = np.linspace(0, 1, 16)
    inside = [(confidence > a) & (confidence <= b) for a, b in pairwise(edges)]
    return sum(abs((correct[i] - confidence[i]).sum()) for i in inside) / len(label)


def plain_statistics(label: np.ndarray, probs: np.ndarray) -> dict[str, float]:
    predicted, y = probs.argmax(axis=1), np.eye(3)[label]
    recall = metrics.recall_score(label, predicted, average=None, labels=range(3))
    values = {
        "accuracy": metrics.accuracy_score(label, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(label, predicted),
        "macro_f1": metrics.f1_score(label, predicted, average="macro", labels=range(3)),
        "mcc": metrics.matthews_corrcoef(label, predicted),
        "kappa": metrics.cohen_kappa_score(label, predicted),
        "macro_auroc": metrics.roc_auc_score(label, probs, multi_class="ovr"),
        "hand_till": hand_till(label, probs).value,
        "brier": ((probs - y) ** 2).sum(axis=1).mean(),
        "log_loss": metrics.log_loss(label, probs),
        "ece": _ece(label, probs),
    }
    for k in range(3):
        values |= {
            f"sensitivity_{k}": recall[k],
            f"specificity_{k}": metrics.recall_score(label != k, predicted != k),
            f"ppv_{k}": metrics.precision_score(label == k, predicted == k),
            f"npv_{k}": metrics.precision_score(label != k, predicted != k),
            f"f1_{k}": metrics.f1_score(label == k, predicted == k),
            f"auroc_{k}": metrics.roc_auc_score(y[:, k], probs[:, k]),
            f"average_precision_{k}": metrics.average_precision_score(y[:, k], probs[:, k]),
        }
    return values | {"macro_average_precision": np.mean([values[f"average_precision_{k}"] for k in range(3)])}


def test_every_resample_has_the_statistics_of_the_plain_loop() -> None:
    cluster, label, probs = _study(0)
    stratum = label
    patient = number_patients(cluster, label, probs)
    resamples = Resamples.sample(patient, 3, 25, stratum, "bca")
    values = {
        **decision_replicates(resamples, label, probs.argmax(axis=1), 3),
        **ranking_replicates(resamples, label, probs),
        **probability_replicates(resamples, label, probs),
    }
    for column in (0, 1, 20, *range(41, 66)):
        chosen = np.concatenate(
            [np.flatnonzero(patient == p) for p in np.repeat(np.arange(40), resamples.weights[:, column])]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = plain_statistics(label[chosen], probs[chosen])
        assert plain.keys() == values.keys()
        for name, value in plain.items():
            assert values[name][column] == pytest.approx(value, abs=1e-10), name


def test_a_table_has_all_statistics_with_intervals_of_the_stratified_bootstrap() -> None:
    cluster, label, probs = _study(1)
    estimates = table_statistics(label, probs, 0, cluster, label, replicates=300, interval="bca")
    assert len(estimates) == 11 + 7 * 3
    for name, estimate in estimates.items():
        assert estimate.ci_low <= estimate.value <= estimate.ci_high, name
        assert (estimate.n, estimate.n_clusters) == (len(label), 40)
        assert "stratified" in estimate.method
    decided = table_statistics(label, probs, 0, cluster, predicted=label, replicates=50)
    assert decided["accuracy"].value == 1
    assert decided["ece"].value == estimates["ece"].value


def test_a_class_without_cases_leaves_its_statistics_undetermined() -> None:
    cluster, label, probs = _study(2)
    estimates = table_statistics(np.minimum(label, 1), probs, 0, cluster, replicates=100)
    for name in ("sensitivity_2", "auroc_2", "macro_auroc", "average_precision_2", "hand_till", "balanced_accuracy"):
        assert np.isnan(estimates[name].value), name
        assert estimates[name].warnings
    assert np.isfinite(estimates["accuracy"].ci_low)
    assert np.isfinite(estimates["auroc_0"].ci_low)


def test_two_systems_are_compared_in_the_same_resamples() -> None:
    cluster, label, probs = _study(3)
    other = probs**2 / (probs**2).sum(axis=1, keepdims=True)
    differences = compare_tables(label, probs, other, 0, cluster, label, replicates=300)
    for name, estimate in differences.items():
        single = [table_statistics(label, p, 0, cluster, label, replicates=5)[name].value for p in (probs, other)]
        assert estimate.value == pytest.approx(single[0] - single[1]), name
    # The decisions are the same, in every resample.
    assert differences["accuracy"].value == 0
    assert np.isnan(differences["accuracy"].ci_low)
    assert differences["log_loss"].ci_low < differences["log_loss"].value < differences["log_loss"].ci_high
