"""What the estimators should return for a truth: their values in a very large simulated trial."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from jaxtyping import Float, Int

from crcjax.validation.confusion import confusion_matrix, f1_scores, kappas, sensitivities
from crcjax.validation.ranking import auroc
from crcjax.validation.study.simulation.tables import READERS
from crcjax.validation.study.simulation.truth import (
    CLASSES,
    SCANNERS,
    Sampled,
    Truth,
    sample_patients,
    softmax,
    weaker_calls,
)

_SCANNER_OF_SITE = np.array([0, 1, 2, 0])


def expected_values(truth: Truth, patients: int = 40_000, seed: int = 1) -> dict[str, float]:
    """Values by the id of the estimate, from one sample of patients; their error is that of so large a sample.

    Scans and glass slides are combined as the simulated plan does it.
    """
    rng = np.random.default_rng([seed, 33])
    sampled = sample_patients(truth, patients, rng)
    probs = _patient_probs(truth, sampled, rng)
    call, label, classes = probs.argmax(axis=1), sampled.reference, len(CLASSES)
    table = confusion_matrix(label, call, classes)
    values = {"decisions.accuracy": float((label == call).mean()), "agreement.kappa": float(kappas(table))}
    values["decisions.balanced_accuracy"] = float(sensitivities(table).mean())
    for k, name in enumerate(CLASSES):
        values[f"decisions.sensitivity.{name}"] = float(sensitivities(table)[k])
        values[f"decisions.f1.{name}"] = float(f1_scores(table)[k])
        values[f"ranking.auroc.{name}"] = auroc(label == k, probs[:, k])
    values["ranking.macro_auroc"] = float(np.mean([values[f"ranking.auroc.{name}"] for name in CLASSES]))
    values["decisions.accuracy_of_true_class"] = float((sampled.true == call).mean())
    values["agreement.second call.reference.overall"] = float((sampled.other == label).mean())
    comparator = weaker_calls(sampled, truth, truth.comparator_separation, 0.6, rng)
    logits = comparator * truth.comparator_separation + np.log(truth.prevalence)
    values["comparison.accuracy.comparator"] = float((logits.argmax(axis=1) == label).mean())
    values["comparison.accuracy.difference"] = values["decisions.accuracy"] - values["comparison.accuracy.comparator"]
    values |= _readers(truth, sampled, call, rng)
    for prefix, shifts in (("", truth.scanner_shift), ("without.", truth.scanner_shift_without)):
        values |= {f"scanners.{prefix}{name}": value for name, value in _scanners(truth, sampled, shifts, rng).items()}
    return values


def _patient_probs(truth: Truth, sampled: Sampled, rng: np.random.Generator) -> Float[np.ndarray, "patient class"]:
    """The probabilities of one or two glass slides of each patient, on the scanner of the site, combined."""
    shift, logs = np.array(truth.scanner_shift)[_SCANNER_OF_SITE[sampled.site]], []
    for _ in range(2):
        noise = np.hypot(truth.glass_noise, truth.scan_noise) * rng.normal(size=sampled.score.shape)
        logs.append(np.log(np.maximum(truth.probabilities(sampled.score + shift + noise), 1e-15)))
    has_two = (rng.random(len(sampled.true)) < 0.4)[:, None]
    return softmax(np.where(has_two, (logs[0] + logs[1]) / 2, logs[0]))


def _readers(
    truth: Truth, sampled: Sampled, call: Int[np.ndarray, " patient"], rng: np.random.Generator
) -> dict[str, float]:
    classes = len(CLASSES)
    calls = [
        (
            weaker_calls(sampled, truth, truth.reader_separation, 0.5, rng) + 0.5 * rng.normal(size=sampled.score.shape)
        ).argmax(axis=1)
        for _ in READERS
    ]
    pairs = [float(kappas(confusion_matrix(a, b, classes))) for a, b in combinations(calls, 2)]
    system = [float(kappas(confusion_matrix(call, reader, classes))) for reader in calls]
    means = {"agreement.readers.pairwise": float(np.mean(pairs)), "agreement.readers.system": float(np.mean(system))}
    return means | {
        "agreement.readers.difference": means["agreement.readers.system"] - means["agreement.readers.pairwise"]
    }


def _scanners(
    truth: Truth, sampled: Sampled, shifts: tuple[tuple[float, ...], ...], rng: np.random.Generator
) -> dict[str, float]:
    """How often two scanners give a glass slide the same call."""
    glass = sampled.score + truth.glass_noise * rng.normal(size=sampled.score.shape)
    calls = [
        truth.probabilities(glass + np.array(shift) + truth.scan_noise * rng.normal(size=glass.shape)).argmax(axis=1)
        for shift in shifts
    ]
    return {
        f"agreement.{SCANNERS[a]}.{SCANNERS[b]}": float((calls[a] == calls[b]).mean())
        for a, b in combinations(range(len(SCANNERS)), 2)
    }
