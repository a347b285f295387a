"""Cases divided into train, val and test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from crcjax.data.cohort import Cohort
from crcjax.errors import InputError


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
    split_of: dict[str, str] = {}
    for number, subtype in enumerate(cohort.classes):
        # Sorted, so that the table's order does not matter.
        cases = np.array(sorted({row.case_id for row in labelled if row.subtype == subtype}))
        cases = np.random.default_rng([seed, number]).permutation(cases)
        test, val = (round(fraction * len(cases)) for fraction in (test_fraction, val_fraction))
        names = ["test"] * test + ["val"] * val + ["train"] * (len(cases) - test - val)
        split_of |= dict(zip(cases.tolist(), names, strict=True))
    return replace(cohort, rows=tuple(replace(row, split=split_of.get(row.case_id)) for row in cohort.rows))
