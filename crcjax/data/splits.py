"""Cases divided into train, val and test, once or in folds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from ml_collections import ConfigDict

from crcjax.data.cohort import Cohort, SlideRow
from crcjax.errors import InputError

FOLD_BY = ("case", "site")


def divide(cohort: Cohort, config: ConfigDict) -> Cohort:
    """The cohort with the splits that `config` (config.data) asks for. Raises InputError."""
    if config.fold and not config.folds:
        raise InputError(f"config.data.fold {config.fold}: of how many? set config.data.folds, or leave fold at 0")
    if config.folds:
        folds = config.folds, config.fold_by
        return assign_fold(cohort, config.fold, *folds, config.val_fraction, config.split_seed)
    return assign_splits(cohort, config.val_fraction, config.test_fraction, config.split_seed)


def assign_splits(cohort: Cohort, val_fraction: float, test_fraction: float, seed: int) -> Cohort:
    """The cohort with a split for every labelled slide: by case, stratified by subtype, drawn from `seed`.

    A cohort whose table has splits is returned as it is. Unlabelled slides get none. Raises InputError if only some
    labelled slides have a split, or the fractions leave no case to train on.
    """
    labelled = [row for row in cohort.rows if row.subtype is not None]
    given = [row.split is not None for row in labelled]
    if any(given):
        if not all(given):
            missing = next(row.slide_id for row in labelled if row.split is None)
            raise InputError(f"slide {missing} of the cohort has no split, others have; fill the column or drop it")
        return cohort
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise InputError(f"val_fraction {val_fraction} and test_fraction {test_fraction} must sum to less than 1")
    return _with_splits(cohort, _sampled_splits(labelled, cohort.classes, val_fraction, test_fraction, [seed]))


def assign_fold(cohort: Cohort, fold: int, folds: int, by: str, val_fraction: float, seed: int) -> Cohort:
    """The cohort with fold `fold` (0 to folds - 1) as test, and the other labelled cases divided into train and val.

    The validation cases are `val_fraction` of those, by case and subtype. What the table calls test is left out of every
    fold, and its other splits are not used. Raises InputError: no such fold, or one that cannot be filled (`fold_of`).
    """
    if not 0 <= fold < folds:
        raise InputError(f"config.data.fold {fold}: choose one from 0 to {folds - 1}, of config.data.folds {folds}")
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction {val_fraction} must be from 0 to less than 1")
    of_case = fold_of(cohort, folds, by, seed)
    rest = [row for row in cohort.rows if of_case.get(row.case_id, fold) != fold]
    split_of_case = {case: "test" for case, number in of_case.items() if number == fold}
    return _with_splits(
        cohort, split_of_case | _sampled_splits(rest, cohort.classes, val_fraction, 0.0, [seed, 1, fold])
    )


def fold_of(cohort: Cohort, folds: int, by: str, seed: int) -> dict[str, int]:
    """The fold of every labelled case that the table does not call test, drawn from `seed`.

    By `case`, folds differ by at most one case in size and in every subtype. By `site`, all cases of a site are in one
    fold (Howard et al. 2021), sites with most cases first and each where its subtypes are rarest; with as many folds as
    sites, each site is one. Sites that differ in their subtypes give folds that differ so. Raises InputError: fewer
    cases or sites than folds, a case without a site or with two.
    """
    if by not in FOLD_BY:
        raise InputError(f"config.data.fold_by {by!r}: choose one of {', '.join(FOLD_BY)}")
    rows = [row for row in cohort.rows if row.subtype is not None and row.split != "test"]
    units = _sites(rows) if by == "site" else {row.case_id: [row.case_id] for row in rows}
    if not 2 <= folds <= len(units):
        raise InputError(f"config.data.folds {folds}: choose from 2 to {len(units)}, the {by}s of the cohort")
    if by == "case":
        shuffled = _by_class(rows, cohort.classes, [seed, 2])
        cases = [case for members in shuffled.values() for case in members]  # one class continues where the last ended
        return {case: position % folds for position, case in enumerate(cases)}
    subtype_of = {row.case_id: row.subtype for row in rows}
    sites = np.random.default_rng([seed, 2]).permutation(np.array(sorted(units))).tolist()
    # A site's cases of each subtype and of any, as shares of the cohort's.
    counts = {site: [[subtype_of[case] == name for name in cohort.classes] for case in units[site]] for site in sites}
    shares = {site: np.append(np.sum(counts[site], axis=0), len(units[site])) for site in sites}
    total = np.maximum(sum(shares.values()), 1)
    class_counts = np.zeros((folds, len(total)))
    fold_of_case: dict[str, int] = {}
    for site in sorted(sites, key=lambda site: -len(units[site])):
        # Where the sum of all folds' squared shares grows least: an empty fold is always taken first.
        number = int(np.argmin(class_counts @ (shares[site] / total)))
        class_counts[number] += shares[site] / total
        fold_of_case |= dict.fromkeys(units[site], number)
    return fold_of_case


def _sampled_splits(
    rows: list[SlideRow], classes: tuple[str, ...], val_fraction: float, test_fraction: float, seed: list[int]
) -> dict[str, str]:
    split_of: dict[str, str] = {}
    for cases in _by_class(rows, classes, seed).values():
        test, val = (round(fraction * len(cases)) for fraction in (test_fraction, val_fraction))
        names = ["test"] * test + ["val"] * val + ["train"] * (len(cases) - test - val)
        split_of |= dict(zip(cases, names, strict=True))
    return split_of


def _by_class(rows: list[SlideRow], classes: tuple[str, ...], seed: list[int]) -> dict[str, list[str]]:
    """The cases of each class in an order drawn from `seed`; sorted before, so that the table's order does not matter."""
    cases = {name: sorted({row.case_id for row in rows if row.subtype == name}) for name in classes}
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


def _with_splits(cohort: Cohort, split_of: dict[str, str]) -> Cohort:
    return replace(cohort, rows=tuple(replace(row, split=split_of.get(row.case_id)) for row in cohort.rows))
