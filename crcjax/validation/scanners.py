"""Concordance of scanners, or of repeated scans, of the same slides: marginal tests, ICC, Bland-Altman limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from crcjax.validation.estimate import LEVEL, Estimate, TestResult, undetermined


def stuart_maxwell(table: Int[np.ndarray, "first second"]) -> TestResult:
    """The test that both scanners call the classes equally often; classes that neither calls are left out."""
    return _marginal_test(table, "Stuart-Maxwell", bhapkars=False)


def bhapkar(table: Int[np.ndarray, "first second"]) -> TestResult:
    """Bhapkar's test of the same hypothesis, which is more powerful."""
    return _marginal_test(table, "Bhapkar", bhapkars=True)


def _marginal_test(table: np.ndarray, method: str, bhapkars: bool) -> TestResult:
    used = (table.sum(axis=0) + table.sum(axis=1)) > 0
    if not used.any():
        return TestResult(np.nan, np.nan, method, warnings=("no slides",))
    warnings = () if used.all() else ("classes that neither scanner calls are left out",)
    counts = table[np.ix_(used, used)].astype(float)
    # The last difference is determined by the others.
    difference = (counts.sum(axis=1) - counts.sum(axis=0))[:-1]
    covariance = np.diag(counts.sum(axis=1) + counts.sum(axis=0)) - counts - counts.T
    covariance = covariance[:-1, :-1]
    if bhapkars and counts.sum() > 0:
        covariance = covariance - np.outer(difference, difference) / counts.sum()
    if not difference.any():
        return TestResult(0.0, 1.0, method, len(difference), warnings)
    if np.linalg.matrix_rank(covariance) < len(difference):
        warning = "the classes are confused in too few ways for the test"
        return TestResult(np.nan, np.nan, method, len(difference), (*warnings, warning))
    statistic = float(difference @ np.linalg.solve(covariance, difference))
    return TestResult(statistic, float(stats.chi2.sf(statistic, len(difference))), method, len(difference), warnings)


def bowker(table: Int[np.ndarray, "first second"]) -> TestResult:
    """Bowker's test that the scanners confuse each pair of classes equally often in both directions.

    The degrees of freedom are those of all pairs, whether they occur or not.
    """
    if not table.any():
        return TestResult(np.nan, np.nan, "Bowker", warnings=("no slides",))
    upper = np.triu_indices(len(table), 1)
    first, second = table[upper].astype(float), table.T[upper].astype(float)
    occurs = first + second > 0
    statistic = float(((first - second)[occurs] ** 2 / (first + second)[occurs]).sum())
    return TestResult(statistic, float(stats.chi2.sf(statistic, len(first))), "Bowker", len(first))


@dataclass(frozen=True)
class IntraclassCorrelations:
    """Intraclass correlations of single scans in a two-way layout (McGraw and Wong 1996).

    Attributes:
      agreement: ICC(A,1), absolute agreement, scanners random; the primary one.
      consistency: ICC(C,1), which forgives a constant offset between scanners.
      one_way: ICC(1,1), the scanners of each slide being arbitrary.
    """

    agreement: Estimate
    consistency: Estimate
    one_way: Estimate


def intraclass_correlations(value: Float[np.ndarray, "slide scanner"]) -> IntraclassCorrelations:
    """ICCs of values such as logits; slides with a missing (NaN) value are excluded. Intervals are by F distributions."""
    complete = value[np.isfinite(value).all(axis=1)]
    excluded = len(value) - len(complete)
    n, k = complete.shape
    names = ("ICC(A,1)", "ICC(C,1)", "ICC(1,1)")
    if n < 2 or k < 2 or np.ptp(complete.mean(axis=1)) == 0:
        return IntraclassCorrelations(
            *(undetermined(name, n, "the slides do not differ, or are too few") for name in names)
        )
    grand = complete.mean()
    rows = k * ((complete.mean(axis=1) - grand) ** 2).sum() / (n - 1)
    columns = n * ((complete.mean(axis=0) - grand) ** 2).sum() / (k - 1)
    total = ((complete - grand) ** 2).sum()
    within = (total - rows * (n - 1)) / (n * (k - 1))
    residual = max(0.0, (total - rows * (n - 1) - columns * (k - 1)) / ((n - 1) * (k - 1)))

    def f_interval(error: float, df: int) -> tuple[float, float, float]:
        if error == 0:
            return 1.0, 1.0, 1.0
        ratio, tail = rows / error, (1 - LEVEL) / 2
        limits = ratio / stats.f.isf(tail, n - 1, df), ratio * stats.f.isf(tail, df, n - 1)
        return tuple((f - 1) / (f + k - 1) for f in (ratio, *limits))

    estimates = [
        _agreement(rows, columns, residual, n, k),
        f_interval(residual, (n - 1) * (k - 1)),
        f_interval(within, n * (k - 1)),
    ]
    warnings = ("the scanners agree exactly",) if residual == 0 else ()
    return IntraclassCorrelations(
        *(
            Estimate(float(icc), float(low), float(high), f"{name}, F", n, warnings=warnings, n_excluded=excluded)
            for name, (icc, low, high) in zip(names, estimates, strict=True)
        )
    )


def _agreement(rows: float, columns: float, residual: float, n: int, k: int) -> tuple[float, float, float]:
    """ICC(A,1) and its limits: McGraw and Wong 1996, table 7."""
    icc = (rows - residual) / (rows + (k - 1) * residual + k * (columns - residual) / n)
    if columns == residual == 0:
        return 1.0, 1.0, 1.0
    a = k * icc / (n * (1 - icc)) if icc < 1 else np.inf
    b = 1 + k * icc * (n - 1) / (n * (1 - icc)) if icc < 1 else np.inf
    df = (a * columns + b * residual) ** 2 / ((a * columns) ** 2 / (k - 1) + (b * residual) ** 2 / ((n - 1) * (k - 1)))
    tail = (1 - LEVEL) / 2
    f_low, f_high = stats.f.isf(tail, n - 1, df), stats.f.isf(tail, df, n - 1)
    spread = k * columns + (k * n - k - n) * residual
    low = n * (rows - f_low * residual) / (f_low * spread + n * rows)
    high = n * (f_high * rows - residual) / (spread + n * f_high * rows)
    return icc, low, high


@dataclass(frozen=True)
class BlandAltman:
    """Bias and limits of agreement of two scanners (Bland and Altman 1986), and the slope of differences over means."""

    bias: Estimate
    lower_limit: Estimate
    upper_limit: Estimate
    proportional_bias: TestResult


def bland_altman(first: Float[np.ndarray, " slide"], second: Float[np.ndarray, " slide"]) -> BlandAltman:
    """Compares values of the same slides, `first` minus `second`; slides with a missing (NaN) value are excluded.

    The intervals of the limits are exact for normal differences (Carkeet 2015).
    """
    complete = np.isfinite(first) & np.isfinite(second)
    difference, mean = (first - second)[complete], ((first + second) / 2)[complete]
    n, excluded = len(difference), int((~complete).sum())
    if n < 3:
        nothing = undetermined("Bland-Altman", n, "fewer than three slides have both values")
        return BlandAltman(nothing, nothing, nothing, TestResult(np.nan, np.nan, "slope", warnings=nothing.warnings))
    bias, deviation = float(difference.mean()), float(difference.std(ddof=1))
    z, tail = float(stats.norm.ppf((1 + LEVEL) / 2)), (1 - LEVEL) / 2
    t = float(stats.t.isf(tail, n - 1)) * deviation / np.sqrt(n)
    # A limit is bias plus z deviations: its interval is that of a noncentral t distribution.
    near, far = (
        float(stats.nct.ppf(probability, n - 1, z * np.sqrt(n))) * deviation / np.sqrt(n)
        for probability in (tail, 1 - tail)
    )
    slope_test = TestResult(0.0, 1.0, "slope of differences over means", n - 2, ("the means do not vary",))
    if np.ptp(mean) > 0 and deviation > 0:
        fit = stats.linregress(mean, difference)
        slope_test = TestResult(float(fit.slope), float(fit.pvalue), "slope of differences over means", n - 2)
    exact = "exact for normal differences"
    return BlandAltman(
        Estimate(bias, bias - t, bias + t, "t", n, n_excluded=excluded),
        Estimate(bias - z * deviation, bias - far, bias - near, exact, n, n_excluded=excluded),
        Estimate(bias + z * deviation, bias + near, bias + far, exact, n, n_excluded=excluded),
        slope_test,
    )


def cochrans_q(correct: Bool[np.ndarray, "slide scanner"]) -> TestResult:
    """Cochran's test that every scanner is correct equally often on the same slides."""
    scanners, method = correct.shape[1], "Cochran's Q"
    by_slide = correct.sum(axis=1)
    spread = float((by_slide * (scanners - by_slide)).sum())
    if spread == 0 or scanners < 2:
        return TestResult(np.nan, np.nan, method, max(scanners - 1, 0), ("no slide is correct on one scanner alone",))
    by_scanner = correct.sum(axis=0)
    # Cochran 1950: the deviations of the scanners' totals against the slides on which scanners differ.
    statistic = float((scanners - 1) * (scanners * (by_scanner**2).sum() - by_scanner.sum() ** 2) / spread)
    return TestResult(statistic, float(stats.chi2.sf(statistic, scanners - 1)), method, scanners - 1)
