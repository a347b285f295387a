"""Slides that tiling refused, and the QC results of the others, as training reports them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from crcjax.data.cohort import SPLITS, Cohort, SlideRow
from crcjax.slides.preprocess.manifest import refused_slides
from crcjax.slides.store.tile_store import TileStore
from crcjax.slides.tiling.qc_result import QCResult


def without_refused(cohort: Cohort, store: str | Path) -> tuple[Cohort, list[str]]:
    """Leaves out the slides that tiling refused.

    Args:
      cohort: slides with their splits.
      store: the folder of tile stores, with the manifest of tiling.

    Returns:
      The cohort without them, and sentences for the log: their numbers per split and class, then one line for each slide
      with the reason. There are no sentences if tiling refused no slide of the cohort.
    """
    outcomes = refused_slides(Path(store))
    refused = [row for row in cohort.rows if row.slide_id in outcomes]
    if not refused:
        return cohort, []
    ids = {row.slide_id for row in refused}
    left_out = replace(cohort, rows=tuple(row for row in cohort.rows if row.slide_id not in ids))
    lost_cases = len(set(cohort.cases) - set(left_out.cases))
    sentences = [
        f"tiling refused {len(refused)} of {len(cohort.rows)} slides, which are left out: {_counts(refused)}; "
        f"{lost_cases} of {len(cohort.cases)} cases have no other slide"
    ]
    for row in refused:
        outcome = outcomes[row.slide_id]
        sentences.append(f"{_name(row)}: refused, {outcome['status']}: {outcome['reason']}")
    return left_out, sentences


def quality_sentences(rows: Sequence[SlideRow], stores: Sequence[TileStore]) -> list[str]:
    """Sentences about the QC results of slides: their numbers, and one for each slide that is not accepted."""
    results: Mapping[str, QCResult] = {store.slide_id: store.qc for store in stores}
    counts = Counter(results[row.slide_id].status for row in rows)
    sentences = [
        f"QC results of {len(rows)} slides: {', '.join(f'{status} {counts[status]}' for status in sorted(counts))}"
    ]
    not_accepted = [row for row in rows if results[row.slide_id].status != "accept"]
    sentences += [f"{_name(row)}: {results[row.slide_id].status}, {results[row.slide_id]}" for row in not_accepted]
    return sentences


def _counts(rows: Sequence[SlideRow]) -> str:
    """The number of slides of each class within each split, such as `train: immune 2, stromal 1; test: immune 1`."""
    numbers = Counter((row.split, row.label) for row in rows)
    texts = []
    for split in (*SPLITS, None):
        of_split = {name or "unlabelled": number for (other, name), number in numbers.items() if other == split}
        if of_split:
            texts.append(f"{split or 'no split'}: {', '.join(f'{name} {of_split[name]}' for name in sorted(of_split))}")
    return "; ".join(texts)


def _name(row: SlideRow) -> str:
    return f"slide {row.slide_id} ({row.split or 'no split'}, {row.label or 'unlabelled'})"
