"""Evaluates uncertainty: risk against coverage, and the coverage of conformal sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crcjax.data.cohort import SlideRow
from crcjax.validation.estimate import Estimate
from crcjax.validation.predictions_table import PredictionRow
from crcjax.validation.proportions import wilson
from crcjax.validation.risk_coverage import selective_risk

# Measures that need several distributions: those of an evidential head, an ensemble or dropout.
DISTRIBUTION_MEASURES = ("expected_entropy", "mutual_information")
MEASURES = ("entropy", *DISTRIBUTION_MEASURES, "vacuity")


def uncertainty_statistics(
    rows: Sequence[PredictionRow], slides: Sequence[SlideRow], seed: int = 0
) -> dict[str, Estimate | float]:
    """Computes the area under the risk-coverage curve of each uncertainty measure, and coverage and size of conformal sets.

    Only the first slide of each case counts, so that the cases are independent. A measure is omitted if a row lacks it. If
    every mutual information is zero the model has a single distribution, and the expected entropy equals the entropy.

    Args:
      rows: rows with a prediction.
      slides: their labelled slides.
      seed: the seed of the bootstrap.
    """
    first_slide = {slide.case_id: i for i, slide in reversed(list(enumerate(slides)))}
    pairs = [(rows[i], slides[i]) for i in sorted(first_slide.values())]
    misclassified = np.array([row.call != slide.label for row, slide in pairs])
    statistics: dict[str, Estimate | float] = {}
    is_single = not any(row.mutual_information for row, _ in pairs)
    for measure in MEASURES:
        values = [getattr(row, measure) for row, _ in pairs]
        if None not in values and not (is_single and measure in DISTRIBUTION_MEASURES):
            name = f"area under risk-coverage by {measure.replace('_', ' ')}"
            statistics[name] = selective_risk(np.array(values, float), misclassified, seed).area
    sets = [row.conformal_set for row, _ in pairs if row.conformal_set is not None]
    if len(sets) == len(pairs):
        covers = np.array([slide.label in names for names, (_, slide) in zip(sets, pairs, strict=True)])
        sizes = np.array([len(names) for names in sets])
        statistics |= {"set coverage": wilson(int(covers.sum()), len(covers)), "mean set size": float(sizes.mean())}
        statistics |= {"sets of one": float((sizes == 1).mean()), "empty sets": float((sizes == 0).mean())}
        sites = np.array([slide.site or "" for _, slide in pairs])
        for site in sorted(set(sites) - {""}):
            statistics[f"set coverage, {site}"] = wilson(int(covers[sites == site].sum()), int((sites == site).sum()))
    return statistics
