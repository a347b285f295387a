"""Bootstrap over patients by matrix products, compared with a loop over resamples that computes the same statistics."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
from record import Row, record
from sklearn import metrics

from crcjax.validation.bootstrap import Resamples, number_patients
from crcjax.validation.resampled_statistics import (
    decision_replicates,
    probability_replicates,
    ranking_replicates,
    table_statistics,
)

PATIENTS, REPLICATES, LOOPED = 500, 10_000, 200
SHARES = (0.5, 0.2, 0.3)


def synthetic_study(slides: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reference classes, probabilities, patients and strata of a made-up study with this many slides per patient."""
    rng = np.random.default_rng(slides)
    patient_label = rng.choice(3, PATIENTS, p=SHARES)
    patient = np.repeat(np.arange(PATIENTS), slides)
    label, site = patient_label[patient], patient % 4
    logits = rng.normal(size=(len(label), 3)) + 1.5 * np.eye(3)[label] + rng.normal(size=(PATIENTS, 3))[patient]
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return label, probs, patient, 3 * site + label


def plain_statistics(label: np.ndarray, probs: np.ndarray) -> dict[str, float]:
    """Every statistic of the table by scikit-learn, or by its definition."""
    predicted, y, n = probs.argmax(axis=1), np.eye(3)[label], len(label)
    confusion = metrics.confusion_matrix(label, predicted)
    hits, rows, columns = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    confidence, correct = probs.max(axis=1), predicted == label
    place = np.minimum((confidence * 15 - 1e-12).astype(int), 14)
    auroc = metrics.roc_auc_score(y, probs, average=None)
    precision = metrics.average_precision_score(y, probs, average=None)
    values = {
        "accuracy": hits.sum() / n,
        "balanced_accuracy": (hits / rows).mean(),
        "macro_f1": (2 * hits / (rows + columns)).mean(),
        "mcc": metrics.matthews_corrcoef(label, predicted),
        "kappa": metrics.cohen_kappa_score(label, predicted),
        "macro_auroc": auroc.mean(),
        "macro_average_precision": precision.mean(),
        "hand_till": metrics.roc_auc_score(label, probs, multi_class="ovo"),
        "brier": ((probs - y) ** 2).sum(axis=1).mean(),
        "log_loss": -np.log(probs[np.arange(n), label]).mean(),
        "ece": np.abs(np.bincount(place, correct - confidence)).sum() / n,
    }
    for k in range(3):
        values |= {
            f"sensitivity_{k}": hits[k] / rows[k],
            f"specificity_{k}": 1 - (columns[k] - hits[k]) / (n - rows[k]),
            f"ppv_{k}": hits[k] / columns[k],
            f"npv_{k}": 1 - (rows[k] - hits[k]) / (n - columns[k]),
            f"f1_{k}": 2 * hits[k] / (rows[k] + columns[k]),
            f"auroc_{k}": auroc[k],
            f"average_precision_{k}": precision[k],
        }
    return values


def looped(resamples: Resamples, label: np.ndarray, probs: np.ndarray, count: int) -> list[dict[str, float]]:
    """The statistics of the first resamples, each computed from the rows of its patients."""
    rows_of = [np.flatnonzero(resamples.patient == p) for p in range(resamples.patients)]
    results = []
    for column in range(1, 1 + count):
        chosen = np.concatenate(
            [rows_of[p] for p in np.repeat(np.arange(resamples.patients), resamples.weights[:, column])]
        )
        results.append(plain_statistics(label[chosen], probs[chosen]))
    return results


def seconds(function: Callable[[], object]) -> float:
    """The shortest of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    rows = []
    for slides in (1, 4):
        label, probs, patient, stratum = synthetic_study(slides)
        name = f"{PATIENTS} patients, {slides} slide{'s'[: slides > 1]} each"
        number = number_patients(patient, stratum, label, probs.argmax(axis=1), probs)
        resamples = Resamples.sample(number, 0, LOOPED, stratum)
        start = time.perf_counter()
        plain = looped(resamples, label, probs, LOOPED)
        per_resample = (time.perf_counter() - start) / LOOPED
        values = {
            **decision_replicates(resamples, label, probs.argmax(axis=1), 3),
            **ranking_replicates(resamples, label, probs),
            **probability_replicates(resamples, label, probs),
        }
        if values.keys() != plain[0].keys():
            raise SystemExit(f"the loop lacks {values.keys() ^ plain[0].keys()}")
        difference = max(np.abs(values[key][1:] - [result[key] for result in plain]).max() for key in values)
        loop = f"{name}: the plain loop, per resample"
        rows += [Row(loop, 1000 * per_resample, "ms")]
        for interval in ("percentile", "bca"):
            time_s = seconds(
                partial(table_statistics, label, probs, 0, patient, stratum, replicates=REPLICATES, interval=interval)
            )
            measure = f"{name}: {len(values)} statistics, {REPLICATES:,} resamples, {interval}"
            rows += [
                Row(measure, time_s, "s"),
                Row(
                    f"{measure}, per resample",
                    1000 * time_s / REPLICATES,
                    "ms",
                    time_s / REPLICATES / per_resample,
                    loop,
                ),
            ]
        rows += [Row(f"{name}: largest difference from the loop, {LOOPED} resamples", float(difference), "")]
    about = (
        "The bootstrap over patients by matrix products, compared with a plain loop over resamples\n\n"
        "* The study is made up: three classes, four sites, random probabilities; resampled within site and class.\n"
        f"* The loop gathers the rows of each resample's patients and computes the same statistics with scikit-learn; its time is "
        f"the mean of {LOOPED} resamples.\n"
        "* Target: every statistic of a table of 500 patients, 10,000 resamples, in less than 5 s on two cores."
    )
    record("bootstrap", "python tools/bench_bootstrap.py", rows, about)


if __name__ == "__main__":
    main()
