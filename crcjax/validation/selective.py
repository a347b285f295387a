"""What doubt is worth: risk against coverage, and how often conformal sets hold the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from crcjax.data.cohort import SlideRow
from crcjax.validation.statistics import Estimate, wilson

OF_SEVERAL = ("expected_entropy", "mutual_information")  # distributions held possible
MEASURES = ("entropy", *OF_SEVERAL, "vacuity")


def doubt_statistics(rows: Sequence[dict[str, str]], slides: Sequence[SlideRow]) -> dict[str, Estimate | float]:
    """Of rows of predictions.csv and their labelled slides, the first slide of each case alone: cases are independent.

    The area under the risk-coverage curve by every measure of doubt that says something of its own, and coverage and size
    of the sets. Where no mutual information is above zero, there is one distribution, and its expected entropy its entropy.
    """
    first = {slide.case_id: i for i, slide in reversed(list(enumerate(slides)))}
    chosen = [(rows[i], slides[i]) for i in sorted(first.values())]
    wrong = np.array([row["subtype"] != slide.subtype for row, slide in chosen])
    found: dict[str, Estimate | float] = {}
    one = not any(float(row.get("mutual_information") or 0) for row, _ in chosen)
    for measure in MEASURES:
        if all(row.get(measure) for row, _ in chosen) and not (one and measure in OF_SEVERAL):
            doubt = np.array([float(row[measure]) for row, _ in chosen])
            found[f"area under risk-coverage by {measure.replace('_', ' ')}"] = risk_coverage_area(doubt, wrong)
    if all(row.get("set") for row, _ in chosen):
        sets = [tuple(name for name in row["set"].split("|") if name != "none") for row, _ in chosen]
        holds = np.array([slide.subtype in held for held, (_, slide) in zip(sets, chosen, strict=True)])
        sizes = np.array([len(held) for held in sets])
        found |= {"set coverage": wilson(int(holds.sum()), len(holds)), "mean set size": float(sizes.mean())}
        found |= {"sets of one": float((sizes == 1).mean()), "empty sets": float((sizes == 0).mean())}
        sites = np.array([slide.site or "" for _, slide in chosen])
        for site in sorted(set(sites) - {""}):
            found[f"set coverage, {site}"] = wilson(int(holds[sites == site].sum()), int((sites == site).sum()))
    return found


def risk_coverage_area(doubt: Float[np.ndarray, " case"], wrong: Bool[np.ndarray, " case"]) -> float:
    """The mean over coverages of the share of wrong calls among the least doubtful (Geifman et al. 2019, equation 1).

    Cases of equal doubt stand in every order at once.
    """
    _, inverse = np.unique(doubt, return_inverse=True)
    share = np.bincount(inverse, wrong) / np.bincount(inverse)
    ordered = share[np.sort(inverse)]
    return float((ordered.cumsum() / np.arange(1, len(ordered) + 1)).mean())
