from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from crcjax.config import get_config
from crcjax.data.cohort import Cohort, SlideRow
from crcjax.data.splits import assign_fold, assign_splits, divide, fold_of
from crcjax.errors import InputError

CLASSES = ("canonical", "immune", "stromal")


def _cohort(cases: int = 60) -> Cohort:
    rows = [
        SlideRow(f"s{case}-{slide}", f"c{case}", label=CLASSES[case % 3]) for case in range(cases) for slide in range(2)
    ]
    return Cohort((*rows, SlideRow("unlabelled", "u")), CLASSES)


def test_splits_divide_whole_cases_and_are_stratified_by_subtype() -> None:
    cohort = assign_splits(_cohort(), 0.2, 0.2, seed=1)
    split_of = {row.case_id: row.split for row in cohort.rows if row.label}
    assert all(row.split == split_of[row.case_id] for row in cohort.rows if row.label)
    counts = Counter((row.split, row.label) for row in cohort.rows if row.label)
    for subtype in CLASSES:
        assert [counts[split, subtype] for split in ("train", "val", "test")] == [24, 8, 8]
    assert cohort.rows[-1].split is None


def test_splits_depend_on_the_seed_and_not_on_the_order_of_the_table() -> None:
    cohort = _cohort()
    backwards = replace(cohort, rows=cohort.rows[::-1])
    there = {row.slide_id: row.split for row in assign_splits(cohort, 0.2, 0.2, 1).rows}
    assert there == {row.slide_id: row.split for row in assign_splits(backwards, 0.2, 0.2, 1).rows}
    assert there != {row.slide_id: row.split for row in assign_splits(cohort, 0.2, 0.2, 2).rows}


def test_splits_of_the_table_are_used_and_incomplete_ones_refused() -> None:
    rows = tuple(replace(row, split="test") for row in _cohort(6).rows)
    assert assign_splits(Cohort(rows, CLASSES), 0.2, 0.2, 0).rows == rows
    with pytest.raises(InputError, match="slide s1-0 of the cohort has no split"):
        assign_splits(Cohort((*rows[:2], replace(rows[2], split=None)), CLASSES), 0.2, 0.2, 0)
    with pytest.raises(InputError, match="must sum to less than 1"):
        assign_splits(_cohort(), 0.6, 0.4, 0)


def _sited(counts: dict[str, tuple[int, int, int]]) -> Cohort:
    """Cases of each site with two slides each; `counts` is the number of cases by class."""
    rows = [
        SlideRow(f"{site}{k}{case}-{slide}", f"{site}{k}{case}", label=CLASSES[k], site=site)
        for site, of_class in counts.items()
        for k, count in enumerate(of_class)
        for case in range(count)
        for slide in range(2)
    ]
    return Cohort(tuple(rows), CLASSES)


def test_every_case_is_test_in_one_fold_and_folds_are_stratified_by_subtype() -> None:
    cohort = _cohort(67)
    tested: Counter[str] = Counter()
    sizes = []
    for fold in range(5):
        divided = assign_fold(cohort, fold, 5, "case", 0.2, seed=1)
        split_of = {row.case_id: row.split for row in divided.rows if row.label}
        assert all(row.split == split_of[row.case_id] for row in divided.rows if row.label)
        tested.update(case for case, split in split_of.items() if split == "test")
        counts = Counter((row.split, row.label) for row in divided.rows[::2] if row.label)
        assert all(4 <= counts["test", name] <= 5 for name in CLASSES)
        assert all(3 <= counts["val", name] <= 4 for name in CLASSES)
        sizes.append(sum(split == "test" for split in split_of.values()))
    assert set(tested.values()) == {1}
    assert len(tested) == 67
    assert max(sizes) - min(sizes) <= 1


def test_folds_by_site_keep_each_site_whole_and_as_many_as_sites_leave_one_out() -> None:
    cohort = _sited({name: (4 + i % 3, 2 + i % 2, 3) for i, name in enumerate("abcdefgh")})
    site_of = {row.case_id: row.site for row in cohort.rows}
    for folds in (3, 8):
        actual = fold_of(cohort, folds, "site", seed=0)
        folds_of_site = {site: {actual[case] for case in actual if site_of[case] == site} for site in "abcdefgh"}
        assert all(len(numbers) == 1 for numbers in folds_of_site.values())
        assert set(actual.values()) == set(range(folds))
        shares = np.array(
            [np.bincount([actual[c] for c in actual if c[1] == str(k)], minlength=folds) for k in range(3)]
        )
        assert (np.ptp(shares, axis=1) <= 6).all()
    divided = assign_fold(cohort, 2, 8, "site", 0.25, seed=0)
    assert len({row.site for row in divided.split("test").rows}) == 1
    assert len({row.site for row in divided.split("train").rows}) == 7


def test_cases_with_split_test_in_the_table_are_in_no_fold() -> None:
    rows = tuple(replace(row, split="test" if i < 12 else "train") for i, row in enumerate(_cohort(30).rows[:60]))
    locked = {row.case_id for row in rows[:12]}
    for fold in range(3):
        divided = assign_fold(Cohort(rows, CLASSES), fold, 3, "case", 0.2, seed=0)
        assert {row.case_id for row in divided.rows if row.split is None} == locked


@pytest.mark.parametrize(
    ("folds", "fold", "by", "message"),
    [
        (5, 5, "case", "config.data.fold must be from 0 to 4, one of config.data.folds 5, got 5"),
        (1, 0, "case", "config.data.folds must be from 2 to 60, the number of cases of the cohort, got 1; try 5"),
        (3, 0, "hospital", "config.data.fold_by must be one of case, site, got 'hospital'"),
        (3, 0, "site", "slide s0-0 of the cohort has no site"),
    ],
)
def test_impossible_folds_are_refused(folds: int, fold: int, by: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        assign_fold(_cohort(), fold, folds, by, 0.2, 0)


def test_a_case_of_two_sites_is_in_no_fold_by_site() -> None:
    cohort = _sited({"a": (3, 3, 3), "b": (3, 3, 3)})
    rows = (replace(cohort.rows[0], site="b"), *cohort.rows[1:])
    with pytest.raises(InputError, match="case a00 of the cohort has slides of b and a"):
        fold_of(Cohort(rows, CLASSES), 2, "site", 0)


def test_a_fold_without_a_number_of_folds_is_refused() -> None:
    config = get_config().data
    config.fold = 2
    with pytest.raises(InputError, match=r"config\.data\.fold must be 0 without config\.data\.folds, got 2; set"):
        divide(_cohort(), config)
