"""Statistics of decisions against reference classes, with intervals.

`label` and `predicted` hold a class index for every unit. A unit is a patient, or a slide whose patient is named by
`cluster`. If the reference is imperfect, read sensitivity as positive, and specificity as negative percent agreement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int
from scipy import stats

from crcjax.validation import confusion as formulas
from crcjax.validation.confusion import cell_influence, confusion_matrix
from crcjax.validation.estimate import Estimate, TestResult, undetermined
from crcjax.validation.influence import count_clusters, wald_estimate
from crcjax.validation.proportions import effective_units, proportion, rarity, simultaneous_proportions

Labels = Int[np.ndarray, " unit"]
Clusters = Int[np.ndarray, " unit"] | None


def accuracy(label: Labels, predicted: Labels, cluster: Clusters = None, *, exact: bool = False) -> Estimate:
    """The share of units whose predicted class is the reference class: overall percent agreement."""
    return proportion(label == predicted, cluster, exact=exact)


@dataclass(frozen=True)
class NoInformation:
    """The accuracy of always predicting the most frequent class, and the one-sided test that the system exceeds it."""

    rate: Estimate
    test: TestResult


def no_information_rate(label: Labels, predicted: Labels, cluster: Clusters = None) -> NoInformation:
    """Compares the accuracy with the share of the most frequent reference class.

    The test is binomial, exact; with clusters, a score test with the effective number of units. The rate counts as known.
    """
    if len(label) == 0:
        nothing = undetermined("largest class", 0, "no cases")
        return NoInformation(nothing, TestResult(np.nan, np.nan, "binomial, exact, one-sided", warnings=("no cases",)))
    is_largest = label == np.bincount(label).argmax()
    rate, correct = proportion(is_largest, cluster), label == predicted
    share = float(is_largest.mean())
    excess = float(correct.mean()) - share
    if cluster is None:
        p_value = stats.binomtest(int(correct.sum()), len(label), share, alternative="greater").pvalue
        return NoInformation(rate, TestResult(excess, float(p_value), "binomial, exact, one-sided"))
    method = "score test, effective n, one-sided"
    if share == 1:
        return NoInformation(rate, TestResult(excess, 1.0, method, warnings=("all units are of one class",)))
    z = excess / np.sqrt(share * (1 - share) / effective_units(correct, cluster))
    return NoInformation(rate, TestResult(excess, float(stats.norm.sf(z)), method))


@dataclass(frozen=True)
class ClassRates:
    """The decisions on one class against the rest.

    Attributes:
      sensitivity: or positive percent agreement.
      specificity: or negative percent agreement.
      ppv: at the prevalence of the study; see `predictive_values` for another.
      npv: likewise.
      f1: with the interval of the multinomial delta method.
      prevalence: the share of the class among the reference classes.
    """

    sensitivity: Estimate
    specificity: Estimate
    ppv: Estimate
    npv: Estimate
    f1: Estimate
    prevalence: Estimate


def class_rates(
    label: Labels, predicted: Labels, classes: int, cluster: Clusters = None, *, exact: bool = False
) -> list[ClassRates]:
    """The rates of every class; those of a class with fewer than ten cases carry a warning."""
    confusion_matrix(label, predicted, classes)  # refuses unknown classes
    rates = []
    for k in range(classes):
        of_class, called = label == k, predicted == k
        warnings = rarity(_cases(of_class, cluster), f"class {k}")

        def rate(
            success: np.ndarray, among: np.ndarray, lacking: str, warnings: tuple[str, ...] = warnings
        ) -> Estimate:
            if not among.any():
                return undetermined("Wilson", 0, lacking)
            estimate = proportion(success[among], None if cluster is None else cluster[among], exact=exact)
            return replace(estimate, warnings=(*estimate.warnings, *warnings))

        rates.append(
            ClassRates(
                sensitivity=rate(called, of_class, f"class {k} has no case"),
                specificity=rate(~called, ~of_class, f"every case is of class {k}"),
                ppv=rate(of_class, called, f"class {k} is never predicted"),
                npv=rate(~of_class, ~called, f"class {k} is always predicted"),
                f1=class_f1(label, predicted, classes, k, cluster),
                prevalence=rate(of_class, np.ones(len(label), bool), "no cases"),
            )
        )
    return rates


def class_f1(label: Labels, predicted: Labels, classes: int, k: int, cluster: Clusters = None) -> Estimate:
    """The F1 score of class `k`, with the interval of the multinomial delta method (Takahashi et al. 2022)."""
    confusion = confusion_matrix(label, predicted, classes)
    value, method = float(formulas.f1_scores(confusion)[k]), "multinomial delta"
    warnings = rarity(_cases(label == k, cluster), f"class {k}")
    if not np.isfinite(value):
        reason = f"class {k} is neither present nor predicted"
        return undetermined(method, len(label), reason, count_clusters(cluster))
    influence = cell_influence(formulas.f1_gradients(confusion)[k], label, predicted)
    estimate = wald_estimate(value, influence, method, cluster, (0.0, 1.0), warnings)
    if np.isfinite(estimate.ci_low):
        return estimate
    # F1 is a rising function of TP / (TP + FP + FN), which is a proportion even where the variance vanishes.
    union = (label == k) | (predicted == k)
    agreement = proportion((label == predicted)[union], None if cluster is None else cluster[union])
    low, high = (2 * limit / (1 + limit) for limit in (agreement.ci_low, agreement.ci_high))
    return replace(estimate, ci_low=low, ci_high=high, method="Wilson of TP / (TP + FP + FN)", warnings=warnings)


def macro_f1(label: Labels, predicted: Labels, classes: int, cluster: Clusters = None) -> Estimate:
    """The mean F1 score over classes, with the interval of the multinomial delta method (Takahashi et al. 2022)."""
    confusion = confusion_matrix(label, predicted, classes)
    value, method = float(formulas.macro_f1_scores(confusion)), "multinomial delta"
    absent = np.flatnonzero(confusion.sum(axis=1) == 0)
    if not np.isfinite(value):
        reason = "a class is neither present nor predicted"
        return undetermined(method, len(label), reason, count_clusters(cluster))
    warnings = tuple(f"class {k} has no case" for k in absent)
    influence = cell_influence(formulas.f1_gradients(confusion).mean(axis=0), label, predicted)
    estimate = wald_estimate(value, influence, method, cluster, (0.0, 1.0), warnings)
    if np.isfinite(estimate.ci_low) or value not in (0.0, 1.0):
        return estimate
    by_class = [class_f1(label, predicted, classes, k, cluster) for k in range(classes)]
    return _mean_limits(estimate, by_class, "mean limits of the classes", warnings)


def balanced_accuracy(label: Labels, predicted: Labels, classes: int, cluster: Clusters = None) -> Estimate:
    """The mean sensitivity over classes, with the interval of the delta method; NaN if a class has no case."""
    confusion = confusion_matrix(label, predicted, classes)
    method, absent = "delta", np.flatnonzero(confusion.sum(axis=1) == 0)
    if len(absent):
        return undetermined(method, len(label), f"class {absent[0]} has no case", count_clusters(cluster))
    sensitivity = formulas.sensitivities(confusion)
    share = confusion.sum(axis=1) / len(label)
    influence = ((label == predicted) - sensitivity[label]) / share[label] / classes
    warnings = tuple(w for k in range(classes) for w in rarity(_cases(label == k, cluster), f"class {k}"))
    estimate = wald_estimate(float(sensitivity.mean()), influence, method, cluster, (0.0, 1.0), warnings)
    if np.isfinite(estimate.ci_low):
        return estimate
    by_class = [
        proportion((label == predicted)[label == k], None if cluster is None else cluster[label == k])
        for k in range(classes)
    ]
    return _mean_limits(estimate, by_class, "mean of Wilson's limits of the classes", warnings)


def matthews_correlation(label: Labels, predicted: Labels, classes: int, cluster: Clusters = None) -> Estimate:
    """Matthews' correlation coefficient of several classes, with the interval of the multinomial delta method."""
    confusion = confusion_matrix(label, predicted, classes)
    value, method = float(formulas.matthews_correlations(confusion)), "multinomial delta"
    if not np.isfinite(value):
        reason = "all reference classes, or all predicted ones, are the same"
        return undetermined(method, len(label), reason, count_clusters(cluster))
    influence = cell_influence(formulas.matthews_gradient(confusion), label, predicted)
    return wald_estimate(value, influence, method, cluster, (-1.0, 1.0))


@dataclass(frozen=True)
class ConfusionTable:
    """Counts with their shares by row (sensitivity) and by column (predictive value); rows are reference classes.

    The intervals of a row, or of a column, hold together (Goodman 1965). They take units as independent.
    """

    counts: Int[np.ndarray, "reference predicted"]
    row_shares: list[list[Estimate]]
    column_shares: list[list[Estimate]]


def confusion_table(label: Labels, predicted: Labels, classes: int) -> ConfusionTable:
    """The confusion matrix with row and column shares; `column_shares` has one list per predicted class."""
    counts = confusion_matrix(label, predicted, classes)
    return ConfusionTable(
        counts,
        [simultaneous_proportions(row) for row in counts],
        [simultaneous_proportions(column) for column in counts.T],
    )


def _cases(of_class: np.ndarray, cluster: Clusters) -> int:
    """The number of patients of a class."""
    return int(of_class.sum()) if cluster is None else len(np.unique(cluster[of_class]))


def _mean_limits(estimate: Estimate, by_class: list[Estimate], method: str, warnings: tuple[str, ...]) -> Estimate:
    """Limits that hold for every class hold for their mean."""
    low, high = (float(np.mean([getattr(e, name) for e in by_class])) for name in ("ci_low", "ci_high"))
    return replace(estimate, ci_low=low, ci_high=high, method=method, warnings=warnings)
