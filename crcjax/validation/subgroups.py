"""A statistic by subgroup: sex, age band, site, scanner, specimen … with differences and a test of heterogeneity.

Analyses of subgroups are exploratory unless the plan names them; correct them for their number with `holm`. A subgroup with
fewer than ten patients is counted and not estimated. Patients without an entry are shown as `missing` and never assigned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Shaped
from scipy import special, stats

from crcjax.errors import InputError
from crcjax.validation.estimate import Estimate, TestResult, undetermined
from crcjax.validation.influence import Z
from crcjax.validation.proportions import RARE, wilson
from crcjax.validation.sites import cochran_q

MISSING = "missing"
Scale = Literal["identity", "logit", "log"]
Statistic = Callable[[Bool[np.ndarray, " patient"]], Estimate]


@dataclass(frozen=True)
class Subgroup:
    """One subgroup: its patients, the statistic, and its difference from that of all other patients."""

    n: int
    estimate: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Subgroups:
    """A statistic by subgroup.

    Attributes:
      groups: by name, `missing` last; subgroups with fewer than ten patients are undetermined.
      heterogeneity: the test that all subgroups that are estimated have the same value.
      lowest: the subgroup with the lowest value; None if fewer than two are estimated.
      highest: the subgroup with the highest value.
      gap: the highest minus the lowest value.
    """

    groups: dict[str, Subgroup]
    heterogeneity: TestResult
    lowest: str | None
    highest: str | None
    gap: Estimate


def subgroup_statistic(
    statistic: Statistic, group: Shaped[np.ndarray, " patient"], scale: Scale = "identity"
) -> Subgroups:
    """Any statistic by subgroup, with Cochran's test of heterogeneity.

    Args:
      statistic: the estimate of the patients that a mask selects, such as
        `lambda rows: auroc_estimate(positive[rows], score[rows])`. Its `n` counts the patients.
      group: the subgroup of each patient, as text; empty if it is not known.
      scale: the scale on which its intervals are symmetric: `logit` for AUROCs, `log` for ratios.
    """
    result = _by_group(statistic, group)
    values, errors = (np.array([f(group.estimate, scale) for group in _estimated(result)]) for f in (_value, _error))
    method, usable = f"Cochran's Q, {scale} scale", np.isfinite(values) & (errors > 0)
    if usable.sum() < 2:
        reason = "fewer than two subgroups have an interval"
        return replace(result, heterogeneity=TestResult(np.nan, np.nan, method, warnings=(reason,)))
    left_out = int((~usable).sum())
    warnings = (f"{left_out} subgroups without an interval are not tested",) if left_out else ()
    df, q = int(usable.sum()) - 1, cochran_q(values[usable], errors[usable] ** 2)
    return replace(result, heterogeneity=TestResult(q, float(stats.chi2.sf(q, df)), method, df, warnings))


def subgroup_rates(
    success: Bool[np.ndarray, " patient"],
    group: Shaped[np.ndarray, " patient"],
    seed: int,
    *,
    resamples: int = 9999,
) -> Subgroups:
    """A proportion by subgroup: accuracy, sensitivity (of the patients of a class), abstention.

    Intervals are Wilson's and, for differences, Newcombe's (1998). Heterogeneity is tested by chi-squared; where an expected
    count is below 5, its p-value is that of permutations of the patients.

    Args:
      success: whether the system is right, or abstains, for each patient.
      group: the subgroup of each patient, as text; empty if it is not known.
      seed: the seed of the permutations.
      resamples: the number of permutations.
    """
    result = _by_group(lambda rows: wilson(int(success[rows].sum()), int(rows.sum())), group)
    names = [name for name, part in result.groups.items() if name != MISSING and np.isfinite(part.estimate.value)]
    table = np.array([[(success & (group == name)).sum(), (~success & (group == name)).sum()] for name in names])
    if len(names) < 2 or (table.sum(axis=0) == 0).any():
        reason = "fewer than two subgroups are estimated, or all patients are alike"
        return replace(result, heterogeneity=TestResult(np.nan, np.nan, "chi-squared", warnings=(reason,)))
    test = stats.chi2_contingency(table, correction=False)
    if (test.expected_freq >= 5).all():
        heterogeneity = TestResult(float(test.statistic), float(test.pvalue), "chi-squared", int(test.dof))
    else:
        rng = np.random.default_rng([seed, 24])
        sampling = stats.PermutationMethod(n_resamples=resamples, rng=rng)
        sampled = stats.chi2_contingency(table, correction=False, method=sampling)
        method = f"chi-squared, {resamples} permutations"
        heterogeneity = TestResult(float(sampled.statistic), float(sampled.pvalue), method, int(test.dof))
    return replace(result, heterogeneity=heterogeneity)


def holm(tests: Mapping[str, TestResult]) -> dict[str, TestResult]:
    """The tests with p-values corrected for their number (Holm 1979); undetermined tests are not counted."""
    known = sorted((name for name in tests if np.isfinite(tests[name].p_value)), key=lambda name: tests[name].p_value)
    corrected, largest = dict(tests), 0.0
    for rank, name in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * tests[name].p_value))
        corrected[name] = replace(tests[name], p_value=largest, method=f"{tests[name].method}, Holm of {len(known)}")
    return corrected


def difference_of_independent(first: Estimate, second: Estimate) -> Estimate:
    """The difference of two estimates of different patients, from their limits (Zou and Donner 2008).

    Of two proportions with Wilson's intervals, this is Newcombe's interval.
    """
    method, n = f"difference of two: {first.method}", first.n + second.n
    warnings = tuple(dict.fromkeys((*first.warnings, *second.warnings)))
    value = first.value - second.value
    low = value - np.hypot(first.value - first.ci_low, second.ci_high - second.value)
    high = value + np.hypot(first.ci_high - first.value, second.value - second.ci_low)
    return Estimate(value, float(low), float(high), method, n, warnings=warnings)


def _by_group(statistic: Statistic, group: np.ndarray) -> Subgroups:
    if (group == MISSING).any():
        raise InputError(f"a subgroup must not be called {MISSING!r}; leave the entry empty where it is not known")
    names, groups = sorted(set(group.tolist()) - {""}), {}
    for name in (*names, *((MISSING,) if (group == "").any() else ())):
        members = group == ("" if name == MISSING else name)
        others = ~members & (group != "")
        estimate, rest = (_unless_rare(statistic, rows) for rows in (members, others))
        groups[name] = Subgroup(estimate.n, estimate, difference_of_independent(estimate, rest))
    known = {name: groups[name].estimate for name in names if np.isfinite(groups[name].estimate.value)}
    untested = TestResult(np.nan, np.nan, "not tested")
    if len(known) < 2:
        gap = undetermined("highest minus lowest", len(group), "fewer than two subgroups are estimated")
        return Subgroups(groups, untested, None, None, gap)
    lowest, highest = (choose(known, key=lambda name: known[name].value) for choose in (min, max))
    gap = difference_of_independent(known[highest], known[lowest])
    reason = "the subgroups were chosen by their values: the gap is larger than expected by chance alone"
    gap = replace(gap, method="highest minus lowest", warnings=(*gap.warnings, reason))
    return Subgroups(groups, untested, lowest, highest, gap)


def _unless_rare(statistic: Statistic, rows: np.ndarray) -> Estimate:
    """The statistic, or NaN if it is made of fewer than ten patients."""
    estimate = statistic(rows)
    if estimate.n >= RARE:
        return estimate
    return undetermined(estimate.method, estimate.n, f"suppressed: fewer than {RARE} patients")


def _estimated(result: Subgroups) -> list[Subgroup]:
    return [part for name, part in result.groups.items() if name != MISSING]


def _value(estimate: Estimate, scale: Scale) -> float:
    return float(_transformed(np.array([estimate.value]), scale)[0])


def _error(estimate: Estimate, scale: Scale) -> float:
    """The standard error on the scale, from the width of the interval; NaN if a limit is at the end of the scale."""
    low, high = _transformed(np.array([estimate.ci_low, estimate.ci_high]), scale)
    return float((high - low) / (2 * Z)) if np.isfinite(high - low) else np.nan


def _transformed(values: np.ndarray, scale: Scale) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"identity": lambda v: v, "logit": special.logit, "log": np.log}[scale](values)
