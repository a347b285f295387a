"""Sample size and power: how many cases a claim about a system needs before a study is begun.

Numbers are of independent, evaluable cases; `recruitment` turns them into patients and slides to be collected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.estimate import LEVEL
from crcjax.validation.influence import Z
from crcjax.validation.proportions import wilson

# Larger numbers than this are refused.
_MOST = 1_000_000


@dataclass(frozen=True)
class SampleSize:
    """The smallest number that reaches a goal.

    Attributes:
      n: the number.
      of: what is counted: cases, cases of the class, events, sites.
      reached: the half-width of the interval, or the power, at that number.
      method: how it was computed.
    """

    n: int
    of: str
    reached: float
    method: str


@dataclass(frozen=True)
class Recruitment:
    """What must be collected: patients and slides, and the design effect of several slides a patient."""

    patients: int
    slides: int
    design_effect: float


def width_of_proportion(expected: float, n: int) -> float:
    """The half-width of Wilson's interval of a proportion that is as expected, to the nearest case."""
    interval = wilson(round(expected * n), n)
    return (interval.ci_high - interval.ci_low) / 2


def size_for_width(expected: float, half_width: float) -> SampleSize:
    """The cases for which Wilson's interval of an expected proportion has a half-width."""
    _check_shares(expected=expected, half_width=half_width)
    n = _smallest(lambda n: width_of_proportion(expected, n) <= half_width)
    return SampleSize(n, "cases", width_of_proportion(expected, n), "half-width of Wilson's interval")


def power_above_bound(expected: float, bound: float, n: int) -> float:
    """The probability that the lower limit of Wilson's two-sided interval is above a bound."""
    return float(_power_above_bound(expected, bound, np.array([n]))[0])


def size_above_bound(expected: float, bound: float, power: float = 0.8) -> SampleSize:
    """The cases for which the lower limit of a proportion is above a bound with a power.

    The power is the exact binomial one. It goes up and down as cases are added, so the number is the smallest from which on
    the power is never below the target. A smaller number that happens to reach it would lose it with one more case.
    Sensitivity: the cases of the class. Agreement of scanners: the slides that both have scanned.
    """
    _check_shares(expected=expected, bound=bound, power=power)
    if not expected > bound:
        raise InputError(f"the expected value must be above the bound, got {expected:g} and {bound:g}")
    approximate = _normal_size(expected, bound, power)
    if approximate > _MOST:
        raise _too_narrow()
    # The power of twice as many cases is so high that its steps stay above the target.
    n = np.arange(2, int(2 * approximate) + 100)
    reached = _power_above_bound(expected, bound, n)
    below = np.flatnonzero(reached < power)
    first = int(below[-1]) + 1 if len(below) else 0
    return SampleSize(int(n[first]), "cases", float(reached[first]), "exact power of Wilson's lower limit")


def _power_above_bound(expected: float, bound: float, n: Int[np.ndarray, " number"]) -> Float[np.ndarray, " number"]:
    # Wilson's lower limit is above the bound if the score test of the bound is significant.
    most_not_above = np.floor(n * bound + Z * np.sqrt(n * bound * (1 - bound)))
    return stats.binom.sf(most_not_above, n, expected)


def _normal_size(expected: float, bound: float, power: float) -> float:
    spread = Z * math.sqrt(bound * (1 - bound)) + stats.norm.ppf(power) * math.sqrt(expected * (1 - expected))
    return (spread / (expected - bound)) ** 2


def auroc_error(expected: float, share: float, n: int) -> float:
    """The standard error of an AUROC (Hanley and McNeil 1982) with a share of positive cases."""
    positives = share * n
    negatives = n - positives
    q1, q2 = expected / (2 - expected), 2 * expected**2 / (1 + expected)
    variance = expected * (1 - expected) + (positives - 1) * (q1 - expected**2) + (negatives - 1) * (q2 - expected**2)
    return math.sqrt(max(0.0, variance) / (positives * negatives))


def size_for_auroc_width(expected: float, share: float, half_width: float) -> SampleSize:
    """The cases, of all classes, for which the interval of an expected AUROC has a half-width."""
    _check_shares(expected=expected, share=share, half_width=half_width)
    n = _smallest(lambda n: width_of_auroc(expected, share, n) <= half_width, start=10)
    return SampleSize(n, "cases", width_of_auroc(expected, share, n), "half-width by Hanley and McNeil's error")


def width_of_auroc(expected: float, share: float, n: int) -> float:
    """The half-width of the interval of an AUROC, for `n` cases of all classes."""
    return Z * auroc_error(expected, share, n)


def size_for_auroc_above(expected: float, share: float, bound: float, power: float = 0.8) -> SampleSize:
    """The cases, of all classes, for which the lower limit of an AUROC is above a bound with a power."""
    _check_shares(expected=expected, share=share, bound=bound, power=power)
    if not expected > bound:
        raise InputError(f"the expected value must be above the bound, got {expected:g} and {bound:g}")

    n = _smallest(lambda n: power_of_auroc_above(expected, share, bound, n) >= power, start=10)
    reached = power_of_auroc_above(expected, share, bound, n)
    return SampleSize(n, "cases", reached, "normal power with Hanley and McNeil's error")


def power_of_auroc_above(expected: float, share: float, bound: float, n: int) -> float:
    """The probability that the lower limit of an AUROC is above a bound, for `n` cases of all classes."""
    return float(stats.norm.cdf((expected - bound) / auroc_error(expected, share, n) - Z))


def size_for_non_inferiority(
    margin: float, discordant: float, difference: float = 0.0, power: float = 0.8
) -> SampleSize:
    """The cases on which both systems are tried, for which the lower limit of their difference is above minus the margin.

    Args:
      margin: the loss that is still acceptable.
      discordant: the expected share of cases in which one system alone is right.
      difference: the expected difference of the shares of right cases, new minus old.
      power: the probability of showing it.
    """
    _check_shares(margin=margin, discordant=discordant, power=power)
    if not abs(difference) <= discordant or not difference > -margin:
        raise InputError(
            f"the difference must be above minus the margin and within the discordant share, got {difference:g}"
        )
    n = _smallest(lambda n: power_of_non_inferiority(margin, discordant, difference, n) >= power)
    reached = power_of_non_inferiority(margin, discordant, difference, n)
    return SampleSize(n, "cases", reached, "normal power of a paired difference (Connor 1987)")


def power_of_non_inferiority(margin: float, discordant: float, difference: float, n: int) -> float:
    """The probability that the lower limit of a paired difference is above minus the margin; see size_for_non_inferiority."""
    return float(stats.norm.cdf((margin + difference) * math.sqrt(n / (discordant - difference**2)) - Z))


def events_for_hazard_ratio(ratio: float, share: float, power: float = 0.8) -> SampleSize:
    """The events for which a hazard ratio between two groups is significant (Schoenfeld 1983).

    `share` is that of one group among the patients of both.
    """
    _check_shares(share=share, power=power)
    if not ratio > 0 or ratio == 1:
        raise InputError(f"the hazard ratio must be above 0 and not 1, got {ratio:g}")
    n = _smallest(lambda events: power_of_hazard_ratio(ratio, share, events) >= power)
    return SampleSize(n, "events", power_of_hazard_ratio(ratio, share, n), "Schoenfeld's formula")


def power_of_hazard_ratio(ratio: float, share: float, events: int) -> float:
    """The probability that a hazard ratio between two groups is significant; `share` as for events_for_hazard_ratio."""
    return float(stats.norm.cdf(abs(math.log(ratio)) * math.sqrt(events * share * (1 - share)) - Z))


def detectable_interaction(first_events: int, second_events: int, power: float = 0.8) -> float:
    """The ratio of two subtypes' hazard ratios of treatment that a trial with two equal arms detects.

    The standard error of its logarithm is sqrt(4 / events of one subtype + 4 / events of the other).
    """
    _check_shares(power=power)
    if min(first_events, second_events) < 1:
        raise InputError(f"both subtypes must have events, got {first_events} and {second_events}")
    error = math.sqrt(4 / first_events + 4 / second_events)
    return math.exp((Z + float(stats.norm.ppf(power))) * error)


@dataclass(frozen=True)
class SitesInterval:
    """The interval that a study of several sites expects, as shares: of the mean over sites, and of a new site."""

    pooled: tuple[float, float]
    new_site: tuple[float, float]


def interval_of_sites(expected: float, sites: int, cases_per_site: int, between: float) -> SitesInterval:
    """The intervals of a proportion that differs between sites, as `sites.pool_sites` would find them.

    Args:
      expected: the proportion at an average site.
      sites: the number of sites; two determine no interval of a new one, which is then (0, 1).
      cases_per_site: cases at each.
      between: the standard deviation between sites of the proportion's logit; 0.5 is common.
    """
    _check_shares(expected=expected)
    if sites < 2 or cases_per_site < 1 or between < 0:
        raise InputError(f"there must be two sites with cases or more, got {sites} sites with {cases_per_site} cases")
    centre = math.log(expected / (1 - expected))
    variance = (1 / (cases_per_site * expected * (1 - expected)) + between**2) / sites

    def limits(df: int, spread: float) -> tuple[float, float]:
        width = float(stats.t.ppf((1 + LEVEL) / 2, df)) * math.sqrt(spread)
        return tuple(1 / (1 + math.exp(-(centre + sign * width))) for sign in (-1, 1))  # type: ignore[return-value]

    new_site = limits(sites - 2, variance + between**2) if sites > 2 else (0.0, 1.0)
    return SitesInterval(limits(sites - 1, variance), new_site)


def sites_above_bound(expected: float, bound: float, cases_per_site: int, between: float) -> SampleSize:
    """The sites for which the lower limit of the expected pooled interval is above a bound."""
    _check_shares(expected=expected, bound=bound)
    if not expected > bound:
        raise InputError(f"the expected value must be above the bound, got {expected:g} and {bound:g}")

    def limit(sites: int) -> float:
        return interval_of_sites(expected, sites, cases_per_site, between).pooled[0]

    n = _smallest(lambda sites: limit(sites) > bound, most=2000)
    return SampleSize(n, "sites", limit(n), "lower limit of the expected pooled interval, t distribution")


def recruitment(
    size: SampleSize, share: float = 1.0, slides_per_case: int = 1, correlation: float = 1.0, evaluable: float = 1.0
) -> Recruitment:
    """The patients and slides to collect for a number of independent, evaluable cases.

    Args:
      size: what the claim needs.
      share: of patients who count: a sensitivity needs the patients of one class.
      slides_per_case: if each slide counts as a unit, the slides of a patient; 1 if patients are aggregated.
      correlation: of the results of one patient's slides: 1 means that further slides add nothing.
      evaluable: the share of slides that pass quality control and have a reference.
    """
    _check_shares(upper=1.0, share=share, evaluable=evaluable)
    if slides_per_case < 1 or not 0 <= correlation <= 1:
        raise InputError(f"a case has one slide or more, correlated by 0 to 1, got {slides_per_case}, {correlation:g}")
    effect = 1 + (slides_per_case - 1) * correlation
    patients = math.ceil(size.n * effect / slides_per_case / (share * evaluable) - 1e-9)
    return Recruitment(patients, patients * slides_per_case, effect)


def _check_shares(upper: float = 1 - 1e-12, **shares: float) -> None:
    for name, share in shares.items():
        if not 0 < share <= upper:
            raise InputError(f"{name.replace('_', ' ')} must be between 0 and 1, got {share:g}")


def _smallest(holds: Callable[[int], bool], start: int = 2, most: int = _MOST) -> int:
    """The smallest number from `start` on for which something holds, found by trying each up to 2,000 and then by halves."""
    for n in range(start, min(start + 2000, most) + 1):
        if holds(n):
            return n
    low, high = start + 2000, 2 * (start + 2000)
    while high <= most and not holds(high):
        low, high = high, 2 * high
    if high > most:
        raise _too_narrow(most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _too_narrow(most: int = _MOST) -> InputError:
    return InputError(f"more than {most:,} would be needed; the claim is too narrow for any study")
