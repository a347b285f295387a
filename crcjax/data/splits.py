"""Splits: divides cases into train, val and test, once or in cross-validation folds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from ml_collections import ConfigDict

from crcjax.data.cohort import Cohort, SlideRow
from crcjax.errors import InputError

FOLD_BY = ("case", "site")


def divide(cohort: Cohort, config: ConfigDict) -> Cohort:
    """Returns the cohort with splits by `config` (config.data). Raises InputError."""
    if config.fold and not config.folds:
        raise InputError(
            f"config.data.fold must be 0 without config.data.folds, got {config.fold}; set config.data.folds"
        )
    if config.folds:
        return assign_fold(cohort, config.fold, config.folds, config.fold_by, config.val_fraction, config.split_seed)
    return assign_splits(cohort, config.val_fraction, config.test_fraction, config.split_seed)


def assign_splits(cohort: Cohort, val_fraction: float, test_fraction: float, seed: int) -> Cohort:
    """Assigns a split to every labelled slide, by case and stratified by subtype.

    Args:
      cohort: a cohort whose table has splits is returned unchanged. Unlabelled slides get no split.
      val_fraction: the fraction of the cases for validation.
      test_fraction: the fraction of the cases for test.
      seed: the seed of the random assignment.

    Raises:
      InputError: some labelled slides have a split and others have none, or the fractions leave no training case.
    """
    labelled = [row for row in cohort.rows if row.label is not None]
    if any(row.split is not None for row in labelled):
        without_split = next((row.slide_id for row in labelled if row.split is None), None)
        if without_split is not None:
            raise InputError(
                f"slide {without_split} of the cohort has no split, others have; fill the column or drop it"
            )
        return cohort
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise InputError(f"val_fraction {val_fraction} and test_fraction {test_fraction} must sum to less than 1")
    return _with_splits(cohort, _sample_splits(labelled, cohort.classes, val_fraction, test_fraction, [seed]))


def assign_fold(cohort: Cohort, fold: int, folds: int, by: str, val_fraction: float, seed: int) -> Cohort:
    """Assigns the splits of one cross-validation fold.

    The fold's cases are test; the other labelled cases are divided into train and val, stratified by subtype. Slides with
    split test in the table are in no fold. The table's other splits are ignored.

    Args:
      cohort: the cohort.
      fold: the test fold, from 0 to folds - 1.
      folds: the number of folds.
      by: the unit that is not divided between folds, one of FOLD_BY.
      val_fraction: the fraction of the cases outside the fold for validation.
      seed: the seed of the folds and of the validation cases.

    Raises:
      InputError: there is no such fold, or the folds cannot be filled (`fold_of`).
    """
    if not 0 <= fold < folds:
        raise InputError(
            f"config.data.fold must be from 0 to {folds - 1}, one of config.data.folds {folds}, got {fold}; try 0"
        )
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction must be from 0 to less than 1, got {val_fraction}; try 0.2")
    fold_of_case = fold_of(cohort, folds, by, seed)
    test = {case: "test" for case, number in fold_of_case.items() if number == fold}
    others = [row for row in cohort.rows if fold_of_case.get(row.case_id, fold) != fold]
    train_and_val = _sample_splits(others, cohort.classes, val_fraction, 0.0, [seed, 1, fold])
    return _with_splits(cohort, test | train_and_val)


def fold_of(cohort: Cohort, folds: int, by: str, seed: int) -> dict[str, int]:
    """The fold of every labelled case that does not have split test in the table.

    By "case", folds differ by at most one case in size and in every subtype.

    By "site", all cases of a site are in one fold (site-preserving cross-validation: Howard et al. 2021). The largest sites
    are placed first, each into the fold where its subtypes are rarest. With as many folds as sites, each site is a fold.
    Folds are as unequal as the sites are.

    Raises:
      InputError: there are fewer cases or sites than folds, or a case has no site or two.
    """
    if by not in FOLD_BY:
        raise InputError(f"config.data.fold_by must be one of {', '.join(FOLD_BY)}, got {by!r}; try case")
    rows = [row for row in cohort.rows if row.label is not None and row.split != "test"]
    units = _sites(rows) if by == "site" else {row.case_id: [row.case_id] for row in rows}
    if not 2 <= folds <= len(units):
        raise InputError(
            f"config.data.folds must be from 2 to {len(units)}, the number of {by}s of the cohort, got {folds}; try {min(5, len(units))}"
        )
    if by == "case":
        shuffled = _shuffled_cases(rows, cohort.classes, [seed, 2])
        # A class continues at the fold after the last case of the class before, so that all folds have equal sizes.
        cases = [case for class_cases in shuffled.values() for case in class_cases]
        return {case: position % folds for position, case in enumerate(cases)}
    subtype_of = {row.case_id: row.label for row in rows}
    sites = np.random.default_rng([seed, 2]).permutation(np.array(sorted(units))).tolist()
    # A site's fraction of the cohort's cases of each subtype, and of all cases.
    is_of_class = {
        site: [[subtype_of[case] == name for name in cohort.classes] for case in units[site]] for site in sites
    }
    counts = {site: np.append(np.sum(is_of_class[site], axis=0), len(units[site])) for site in sites}
    total = np.maximum(sum(counts.values()), 1)
    fractions = {site: counts[site] / total for site in sites}
    fold_fractions = np.zeros((folds, len(total)))
    fold_of_case: dict[str, int] = {}
    for site in sorted(sites, key=lambda site: -len(units[site])):
        # The fold for which the sum of squared fractions grows least; an empty fold always comes first.
        fold = int(np.argmin(fold_fractions @ fractions[site]))
        fold_fractions[fold] += fractions[site]
        fold_of_case |= dict.fromkeys(units[site], fold)
    return fold_of_case


def _sample_splits(
    rows: list[SlideRow], classes: tuple[str, ...], val_fraction: float, test_fraction: float, seed: list[int]
) -> dict[str, str]:
    """The split of each case, stratified by class."""
    split_of_case: dict[str, str] = {}
    for cases in _shuffled_cases(rows, classes, seed).values():
        test, val = (round(fraction * len(cases)) for fraction in (test_fraction, val_fraction))
        names = ["test"] * test + ["val"] * val + ["train"] * (len(cases) - test - val)
        split_of_case |= dict(zip(cases, names, strict=True))
    return split_of_case


def _shuffled_cases(rows: list[SlideRow], classes: tuple[str, ...], seed: list[int]) -> dict[str, list[str]]:
    """The cases of each class in random order."""
    # Sorted first, so that the order of the table does not matter.
    cases = {name: sorted({row.case_id for row in rows if row.label == name}) for name in classes}
    return {
        name: np.random.default_rng([*seed, number]).permutation(np.array(cases[name])).tolist()
        for number, name in enumerate(classes)
    }


def _sites(rows: list[SlideRow]) -> dict[str, list[str]]:
    """The cases of every site."""
    site_of: dict[str, str] = {}
    for row in rows:
        if row.site is None:
            raise InputError(
                f"slide {row.slide_id} of the cohort has no site; fill it in, or set config.data.fold_by=case"
            )
        if site_of.setdefault(row.case_id, row.site) != row.site:
            raise InputError(
                f"case {row.case_id} of the cohort has slides of {site_of[row.case_id]} and {row.site}; give it one site, "
                "or set config.data.fold_by=case"
            )
    return {site: sorted(case for case in site_of if site_of[case] == site) for site in sorted(set(site_of.values()))}


def _with_splits(cohort: Cohort, split_of_case: dict[str, str]) -> Cohort:
    return replace(cohort, rows=tuple(replace(row, split=split_of_case.get(row.case_id)) for row in cohort.rows))
