"""Scans of the same glass slides: by scanner and repeat, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int

from crcjax.validation.predictions_table import PredictionRow
from crcjax.validation.study.trial import Patient, Scan, Trial


@dataclass(frozen=True)
class Rescans:
    """The scans of glass slides that were scanned more than once.

    Attributes:
      scanners: their names.
      glass: the names of the glass slides.
      patient: the patient of each glass slide, counted from 0.
      label: the reference class of each glass slide; -1 if it is unknown.
      call: the predicted class; -1 where there is no scan.
      probs: the probabilities; NaN where there is no scan.
    """

    scanners: tuple[str, ...]
    glass: tuple[str, ...]
    patient: Int[np.ndarray, " glass"]
    label: Int[np.ndarray, " glass"]
    call: Int[np.ndarray, "glass scanner repeat"]
    probs: Float[np.ndarray, "glass scanner repeat class"]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of scanners."""
        return list(combinations(range(len(self.scanners)), 2))

    def both(self, first: int, second: int) -> Bool[np.ndarray, " glass"]:
        """The glass slides that both scanners scanned."""
        return (self.call[:, first, 0] >= 0) & (self.call[:, second, 0] >= 0)

    @property
    def logits(self) -> Float[np.ndarray, "glass scanner repeat class"]:
        """The logits of the probabilities."""
        clipped = np.clip(self.probs, 1e-6, 1 - 1e-6)
        return np.log(clipped / (1 - clipped))


def rescans_of(trial: Trial, rows: Mapping[str, PredictionRow]) -> Rescans | None:
    """The scans of the scanner study, with the predictions `rows` by slide id; None if no glass slide has two scanners.

    Cases of the model's development are left out.
    """
    assert trial.plan.scanners is not None
    column, repeat = trial.plan.scanners.glass_slide, trial.plan.scanners.repeat
    scans_of: dict[str, list[Scan]] = {}
    for patient in trial.patients():
        for scan in patient.scans if not patient.is_of_development else ():
            if scan.value(column) and scan.value("scanner") and scan.slide.slide_id in rows:
                scans_of.setdefault(scan.value(column), []).append(scan)
    scans_of = {name: scans for name, scans in scans_of.items() if len({scan.value("scanner") for scan in scans}) > 1}
    if not scans_of:
        return None
    every = [scan for scans in scans_of.values() for scan in scans]
    scanners = tuple(sorted({scan.value("scanner") for scan in every}))
    repeats = sorted({scan.value(repeat) for scan in every}) if repeat else [""]
    return _arrays(trial.classes, scans_of, scanners, repeats, repeat, rows)


def _arrays(
    classes: tuple[str, ...],
    scans_of: Mapping[str, Sequence[Scan]],
    scanners: tuple[str, ...],
    repeats: Sequence[str],
    repeat: str | None,
    rows: Mapping[str, PredictionRow],
) -> Rescans:
    call = np.full((len(scans_of), len(scanners), len(repeats)), -1)
    probs = np.full((*call.shape, len(classes)), np.nan)
    cases = list(dict.fromkeys(scans[0].slide.case_id for scans in scans_of.values()))
    patient, label = np.zeros(len(scans_of), int), np.full(len(scans_of), -1)
    for g, scans in enumerate(scans_of.values()):
        patient[g] = cases.index(scans[0].slide.case_id)
        target = Patient(scans[0].slide.case_id, tuple(scans)).target
        label[g] = classes.index(target) if target else -1
        for scan in scans:
            row = rows[scan.slide.slide_id]
            place = g, scanners.index(scan.value("scanner")), repeats.index(scan.value(repeat)) if repeat else 0
            call[place], probs[place] = classes.index(row.call), row.probs
    return Rescans(scanners, tuple(scans_of), patient, label, call, probs)
