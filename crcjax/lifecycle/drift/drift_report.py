"""Drift between the predictions of a reference and later ones, and an estimate of the accuracy without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from crcjax.errors import InputError
from crcjax.lifecycle.drift.sequential import change_point_evidence, e_value, mean_evidence
from crcjax.lifecycle.drift.window_test import median_distance, window_p_value
from crcjax.validation.predictions_table import PredictionRow

# Cases that a reference needs, altogether and of a site that has tests of its own.
LEAST_REFERENCE = 50
# Mean difference between confidence and correctness that counts as calibrated.
_TOLERANCE = 0.03
# Labelled later cases from which their labels can confirm the estimate.
_LEAST_LABELS = 30
_Z = 1.96


@dataclass(frozen=True)
class Stream:
    """The test of one quantity: what was compared, the evidence after each window, and the first window with an alarm.

    Attributes:
      name: the quantity, and the site it is of (`stain, site leeds`).
      evidence: an e-value after each window.
      threshold: the evidence from which on it is an alarm.
      alarm: the window, counted from 1; None without one.
    """

    name: str
    evidence: tuple[float, ...]
    threshold: float
    alarm: int | None


@dataclass(frozen=True)
class PerformanceEstimate:
    """The accuracy of the later cases, estimated by their confidence alone.

    Attributes:
      accuracy, ci_low, ci_high: the mean probability of the predicted class, with a 95 % interval of the sampling of cases.
      status: `valid`: enough labels agree with it; `unverified`: no labels show that the concept is the same; `invalid`.
      reason: why.
      labelled, observed: the later cases with a label, and the accuracy on them (NaN without any).
    """

    accuracy: float
    ci_low: float
    ci_high: float
    status: Literal["valid", "unverified", "invalid"]
    reason: str
    labelled: int
    observed: float


@dataclass(frozen=True)
class DriftReport:
    """The result of `examine`: windows of `window` cases each, and the probability of any false alarm."""

    window: int
    windows: int
    error: float
    streams: tuple[Stream, ...]
    performance: PerformanceEstimate

    @property
    def alarms(self) -> list[Stream]:
        """The quantities that changed, the earliest first."""
        changed = [(stream.alarm, stream) for stream in self.streams if stream.alarm is not None]
        return [stream for _, stream in sorted(changed, key=lambda pair: pair[0])]


def examine(
    reference: Sequence[PredictionRow],
    later: Sequence[PredictionRow],
    *,
    window: int = 25,
    error: float = 0.01,
    seed: int = 0,
) -> DriftReport:
    """Tests whether later cases are like those of the reference.

    Each quantity has an e-process over windows; all together raise a false alarm, ever, with probability `error` at most, if the
    cases of the reference and the later ones are exchangeable. A case counts by its first slide with a prediction.

    Args:
      reference: held-out predictions of the bundle, such as those of its validation cases; with targets, its calibration is checked.
      later: in the order of time; rows with a target are delayed labels.
      window: cases in a window.
      error: the probability of any false alarm.
      seed: for permutations.

    Raises:
      InputError: the reference has fewer than 50 cases, or later cases do not fill a window.
    """
    before, after = _cases(reference), _cases(later)
    if len(before) < LEAST_REFERENCE:
        raise InputError(
            f"the reference must have at least {LEAST_REFERENCE} cases with a prediction, got {len(before)}; add cases"
        )
    if len(after) < window:
        raise InputError(
            f"the later predictions must fill a window of {window} cases, got {len(after)}; wait for more, or choose a smaller --window"
        )
    series = {name: _features(name, before, after) for name in ("stain", "tissue", "scanner", "classes", "confidence")}
    places = {"": (np.arange(len(before)), np.arange(len(after)))}
    for site in sorted({row.site for row in before} - {""}):
        of_site = [np.array([n for n, row in enumerate(rows) if row.site == site], int) for rows in (before, after)]
        if len(of_site[0]) >= LEAST_REFERENCE and len(of_site[1]) >= window:
            places[site] = (of_site[0], of_site[1])
    tests = [
        (name, site, features[0][rows[0]], features[1][rows[1]])
        for site, rows in places.items()
        for name, features in series.items()
        if features is not None and (not site or name in ("stain", "classes"))
    ]
    threshold = len(tests) / error
    streams = tuple(
        _stream(
            f"{name}, site {site}" if site else name,
            first,
            second,
            window,
            threshold,
            np.random.default_rng([seed, number]),
        )
        for number, (name, site, first, second) in enumerate(tests)
    )
    return DriftReport(window, len(after) // window, error, streams, _performance(before, after, streams, error))


def _cases(rows: Sequence[PredictionRow]) -> list[PredictionRow]:
    """The first evaluable slide of each case."""
    first: dict[str, PredictionRow] = {}
    for row in rows:
        if row.is_ok:
            first.setdefault(row.case_id, row)
    return list(first.values())


def _features(
    name: str, before: Sequence[PredictionRow], after: Sequence[PredictionRow]
) -> tuple[Float[np.ndarray, "case feature"], Float[np.ndarray, "later feature"]] | None:
    """A quantity of the cases before and after, each feature scaled by the reference; None if cases lack it."""
    rows = [*before, *after]
    if name == "scanner":
        # A scanner that the reference lacks is one more category.
        known = sorted({row.scanner for row in before} - {""})
        if not known or not all(row.scanner for row in rows):
            return None
        values = np.array([[row.scanner == scanner for scanner in known] for row in rows], float)
    elif name == "stain":
        if not all(row.stain for row in rows):
            return None
        values = np.array([row.stain for row in rows])
    elif name == "tissue":
        if not all(row.regions is not None for row in rows):
            return None
        values = np.array([[np.log1p(row.regions or 0), row.qc_coverage or 0.0] for row in rows])
    elif name == "classes":
        values = np.array([row.probs for row in rows])
    else:
        values = np.array([[max(row.probs)] for row in rows])
    first = values[: len(before)]
    values = (values - first.mean(axis=0)) / np.maximum(first.std(axis=0), 1e-6)
    # A rare category or a constant feature would outweigh all others.
    values = np.clip(values, -10, 10)
    return values[: len(before)], values[len(before) :]


def _stream(
    name: str, before: np.ndarray, after: np.ndarray, window: int, threshold: float, rng: np.random.Generator
) -> Stream:
    width, e_values, past = median_distance(before), [], before
    for start in range(0, len(after) - window + 1, window):
        cases = after[start : start + window]
        e_values.append(e_value(window_p_value(past, cases, width, rng)))
        past = np.concatenate([past, cases])
    evidence = change_point_evidence(e_values)
    alarm = next((number for number, value in enumerate(evidence, 1) if value >= threshold), None)
    return Stream(name, tuple(evidence), threshold, alarm)


def _performance(
    before: Sequence[PredictionRow], after: Sequence[PredictionRow], streams: Sequence[Stream], error: float
) -> PerformanceEstimate:
    confidence = np.array([max(row.probs) for row in after])
    half = _Z * float(confidence.std()) / np.sqrt(len(confidence))
    accuracy = float(confidence.mean())
    labelled = [row for row in after if row.target]
    observed = float(np.mean([row.call == row.target for row in labelled])) if labelled else float("nan")
    status, reason = _validity(before, labelled, streams, error)
    return PerformanceEstimate(
        accuracy, max(0.0, accuracy - half), min(1.0, accuracy + half), status, reason, len(labelled), observed
    )


def _validity(
    before: Sequence[PredictionRow], labelled: Sequence[PredictionRow], streams: Sequence[Stream], error: float
) -> tuple[Literal["valid", "unverified", "invalid"], str]:
    known = [row for row in before if row.target]
    if len(known) < LEAST_REFERENCE:
        return "unverified", f"only {len(known)} cases of the reference have a label: its calibration is not known"
    difference = float(np.mean([max(row.probs) - (row.call == row.target) for row in known]))
    if abs(difference) > _TOLERANCE:
        return "invalid", f"on the reference, confidence and accuracy differ by {difference:+.3f}: calibrate the bundle"
    correct = np.array([row.call == row.target for row in labelled], float)
    below, above = mean_evidence(correct, [max(row.probs) for row in labelled], _TOLERANCE)
    for history, words in ((below, "less"), (above, "more")):
        if any(value >= 2 / error for value in history):
            return (
                "invalid",
                f"later cases with a label are {words} often correct than their confidence says: the concept changed",
            )
    if len(labelled) < _LEAST_LABELS:
        return (
            "unverified",
            f"{len(labelled)} later cases have a label, and a change of the concept shows in labels alone",
        )
    if changed := [stream.name for stream in streams if stream.alarm is not None]:
        return "unverified", f"{', '.join(changed)} changed: confidence may not hold for such cases"
    return "valid", f"{len(labelled)} later cases with a label agree with it"
