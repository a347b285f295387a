from collections import Counter
from dataclasses import replace

import pytest

from crcjax.data.cohort import Cohort, SlideRow
from crcjax.data.splits import assign_splits
from crcjax.errors import InputError

CLASSES = ("canonical", "immune", "stromal")


def _cohort(cases: int = 60) -> Cohort:
    rows = [
        SlideRow(f"s{case}-{slide}", f"c{case}", subtype=CLASSES[case % 3])
        for case in range(cases)
        for slide in range(2)
    ]
    return Cohort((*rows, SlideRow("unlabelled", "u")), CLASSES)


def test_cases_are_divided_whole_and_every_split_has_every_subtype_alike() -> None:
    cohort = assign_splits(_cohort(), 0.2, 0.2, seed=1)
    split_of = {row.case_id: row.split for row in cohort.rows if row.subtype}
    assert all(row.split == split_of[row.case_id] for row in cohort.rows if row.subtype)
    counts = Counter((row.split, row.subtype) for row in cohort.rows if row.subtype)
    for subtype in CLASSES:
        assert [counts[split, subtype] for split in ("train", "val", "test")] == [24, 8, 8]
    assert cohort.rows[-1].split is None


def test_splits_depend_on_the_seed_and_not_on_the_order_of_the_table() -> None:
    cohort = _cohort()
    backwards = replace(cohort, rows=cohort.rows[::-1])
    there = {row.slide_id: row.split for row in assign_splits(cohort, 0.2, 0.2, 1).rows}
    assert there == {row.slide_id: row.split for row in assign_splits(backwards, 0.2, 0.2, 1).rows}
    assert there != {row.slide_id: row.split for row in assign_splits(cohort, 0.2, 0.2, 2).rows}


def test_given_splits_are_kept_and_half_given_ones_refused() -> None:
    rows = tuple(replace(row, split="test") for row in _cohort(6).rows)
    assert assign_splits(Cohort(rows, CLASSES), 0.2, 0.2, 0).rows == rows
    with pytest.raises(InputError, match="slide s1-0 of the cohort has no split"):
        assign_splits(Cohort((*rows[:2], replace(rows[2], split=None)), CLASSES), 0.2, 0.2, 0)
    with pytest.raises(InputError, match="must sum to less than 1"):
        assign_splits(_cohort(), 0.6, 0.4, 0)
