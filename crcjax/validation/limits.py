"""Limits beyond which a slide is not evaluable: fitted on the calibration's slides, applied to every later prediction.

| limit | value that must not exceed it |
|---|---|
| excluded tissue | the share of the tissue that quality control excluded |
| little tissue | regions with tissue, negative |
| stain distance | Euclidean distance of the tissue's optical densities to their medians over the calibration's slides |
| out-of-distribution score | the feature density's excess |
| entropy, mutual information, vacuity | as in the table of predictions |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from crcjax.validation.conformal import conformal_threshold
from crcjax.validation.predictions_table import NOT_EVALUABLE, PredictionRow

# The default share of slides like those of the calibration that each limit may refuse.
SHARE = 0.02
EXCLUDED, TISSUE, STAIN, OOD = "excluded tissue", "little tissue", "stain distance", "out-of-distribution score"
ENTROPY, DISAGREEMENT, VACUITY = "entropy", "mutual information", "vacuity"
# Quality control marks a slide for review from this share on; a stricter limit would refuse slides that it accepts.
_LEAST_EXCLUDED = 0.1
# The table rounds values to this number of digits; a slide of the calibration must not exceed a limit by rounding.
_DIGITS = 4


@dataclass(frozen=True)
class Limits:
    """The largest value of each measure with which a slide is evaluable.

    Attributes:
      share: the share of slides like those of the calibration that each limit may refuse.
      slides: the number of slides that the limits were fitted on.
      largest: by measure; a measure that the slides do not have, or that too few slides have, is absent.
      stain: the medians of the slides' optical densities in red, green and blue; empty if they are unknown.
    """

    share: float
    slides: int
    largest: dict[str, float]
    stain: tuple[float, ...]

    def exceeded_by(self, row: PredictionRow) -> list[str]:
        """A sentence for each limit that a predicted slide exceeds."""
        values = _measures(row, self.stain)
        return [
            _sentence(name, values[name], limit)
            for name, limit in self.largest.items()
            if name in values and values[name] > limit
        ]

    def apply(self, row: PredictionRow) -> PredictionRow:
        """The row; with status `not_evaluable`, the reasons and no call if the slide exceeds a limit."""
        sentences = self.exceeded_by(row)
        return replace(row, status=NOT_EVALUABLE, reason="; ".join(sentences), call="") if sentences else row


def fit_limits(rows: Sequence[PredictionRow], share: float = SHARE) -> Limits:
    """Fits the limits on slides with a prediction, whose probabilities and entropy are those at the calibration's temperature.

    Each limit is the ⌈(n + 1)(1 - share)⌉-th smallest of the n values (`conformal_threshold`), so that it refuses a slide that is
    exchangeable with these with a probability of at most `share`. With fewer than 1 / share - 1 values there is no limit.
    """
    colours = [row.stain for row in rows if row.stain]
    stain = tuple(np.round(np.median(colours, axis=0), _DIGITS).tolist()) if colours else ()
    measures = [_measures(row, stain) for row in rows]
    largest = {}
    for name in (EXCLUDED, TISSUE, STAIN, OOD, ENTROPY, DISAGREEMENT, VACUITY):
        values = np.array([values[name] for values in measures if name in values], float)
        limit = conformal_threshold(values, share) if share else math.inf
        if math.isfinite(limit):
            largest[name] = max(limit, _LEAST_EXCLUDED) if name == EXCLUDED else limit
    return Limits(share, len(rows), largest, stain)


def _measures(row: PredictionRow, stain: Sequence[float]) -> dict[str, float]:
    """The measures that a row states."""
    colour = [round(value, _DIGITS) for value in row.stain]
    distance = math.dist(colour, stain) if colour and stain else None
    values = {
        EXCLUDED: None if row.qc_coverage is None else 1 - round(row.qc_coverage, _DIGITS),
        TISSUE: None if row.regions is None else -float(row.regions),
        STAIN: distance,
        OOD: row.ood,
        ENTROPY: row.entropy,
        DISAGREEMENT: row.mutual_information,
        VACUITY: row.vacuity,
    }
    return {name: round(value, _DIGITS) for name, value in values.items() if value is not None}


def _sentence(name: str, value: float, limit: float) -> str:
    if name == TISSUE:
        return f"{name}: {-value:.0f} regions, the limit is {-limit:.0f}"
    if name == EXCLUDED:
        return f"{name}: {value:.0%}, the limit is {limit:.0%}"
    return f"{name}: {value:.3g}, the limit is {limit:.3g}"
