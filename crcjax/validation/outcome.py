"""Subtype and outcome: prognosis by reference and by predicted subtype, and treatment by subtype. Needs the extra `stats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int, Shaped
from scipy import stats

from crcjax.errors import InputError
from crcjax.validation.cox import (
    EVENTS_PER_COEFFICIENT,
    Covariates,
    CoxModel,
    chi_squared,
    cox,
    indicators,
    nested_test,
)
from crcjax.validation.estimate import LEVEL, Estimate, TestResult, undetermined
from crcjax.validation.sites import cochran_q
from crcjax.validation.survival import FollowUp, restricted_mean_difference

_Z = float(stats.norm.ppf((1 + LEVEL) / 2))
_EXPLORATORY = "exploratory: no conclusion about a subtype follows from its own p-value or interval"


@dataclass(frozen=True)
class Prognosis:
    """Hazard ratios of the subtypes against the first, by each source of the subtype, on the same patients.

    Attributes:
      by_source: a model with the subtypes of one source. Those of a predicted subtype are nearer to 1, because it has errors.
      joint: a model with the subtypes of all sources.
      added: by source, the test that its subtypes add nothing to those of the other sources.
    """

    by_source: dict[str, CoxModel]
    joint: CoxModel
    added: dict[str, TestResult]


def prognosis(
    follow_up: FollowUp,
    subtype: Mapping[str, Int[np.ndarray, " patient"]],
    classes: Sequence[str],
    covariates: Covariates | None = None,
    strata: Shaped[np.ndarray, " patient"] | None = None,
) -> Prognosis:
    """Compares the outcome of subtypes by several sources, such as `reference` and `predicted`.

    Patients without a subtype (-1) from one of the sources are left out of all models. The model that predicts the subtype must
    not have been chosen by outcome.
    """
    is_known = np.all([labels >= 0 for labels in subtype.values()], axis=0)
    others = {name: np.where(is_known, values, np.nan) for name, values in (covariates or {}).items()}
    columns = {
        source: {
            f"{name}, {source}": np.where(is_known, values, np.nan)
            for name, values in indicators(labels, classes).items()
        }
        for source, labels in subtype.items()
    }

    def fit(sources: Sequence[str]) -> CoxModel:
        return cox(follow_up, {**others, **{n: v for source in sources for n, v in columns[source].items()}}, strata)

    by_source, joint = {source: fit([source]) for source in subtype}, fit(list(subtype))
    added = {}
    for source in subtype if len(subtype) > 1 else ():
        reduced = fit([other for other in subtype if other != source])
        added[source] = nested_test(joint, reduced)
    return Prognosis(by_source, joint, added)


@dataclass(frozen=True)
class TreatmentBySubtype:
    """Whether a treatment's effect differs between subtypes; exploratory.

    Attributes:
      interaction: the likelihood ratio test of treatment by subtype.
      hazard_ratio: of the treated against the others, by subtype.
      restricted_mean_difference: treated minus others, by subtype; empty without a horizon.
      restricted_mean_interaction: the test that these differences are equal; None without a horizon.
      events: by subtype.
    """

    interaction: TestResult
    hazard_ratio: dict[str, Estimate]
    restricted_mean_difference: dict[str, Estimate]
    restricted_mean_interaction: TestResult | None
    events: dict[str, int]


def treatment_by_subtype(
    follow_up: FollowUp,
    is_treated: Bool[np.ndarray, " patient"],
    subtype: Int[np.ndarray, " patient"],
    classes: Sequence[str],
    covariates: Covariates | None = None,
    strata: Shaped[np.ndarray, " patient"] | None = None,
    horizon: float | None = None,
) -> TreatmentBySubtype:
    """Tests treatment by subtype, by intention to treat, and estimates the effect within each subtype.

    Args:
      follow_up: one row for each randomised patient.
      is_treated: the arm that the patient was randomised to.
      subtype: the class, by reference or by prediction.
      classes: the names of the classes.
      covariates: further ones to adjust for.
      strata: the strata of the randomisation, such as the centre.
      horizon: the time to which mean times are restricted.
    """
    main, treated = {**indicators(subtype, classes), **(covariates or {})}, is_treated.astype(float)
    by_subtype = {f"treatment, {name}": treated * (subtype == k) for k, name in enumerate(classes)}
    full = cox(follow_up, {**main, **by_subtype}, strata)
    reduced = cox(follow_up, {**main, "treatment": treated}, strata)
    df = len(classes) - 1
    reasons = (_EXPLORATORY, *dict.fromkeys((*full.likelihood_ratio.warnings, *reduced.likelihood_ratio.warnings)))
    statistic = 2 * (full.log_likelihood - reduced.log_likelihood)
    interaction = chi_squared(statistic, df, "likelihood ratio, treatment by subtype, Cox, efron", reasons)
    events = {name: int(follow_up.is_event[subtype == k].sum()) for k, name in enumerate(classes)}
    ratios = {
        name: _exploratory(full.coefficients[f"treatment, {name}"].hazard_ratio, events[name]) for name in classes
    }
    differences: dict[str, Estimate] = {}
    if horizon is not None:
        for k, name in enumerate(classes):
            arm, other = (follow_up.of((subtype == k) & (is_treated == treatment)) for treatment in (True, False))
            try:
                difference = restricted_mean_difference(arm, other, horizon)
            except InputError as error:
                method = f"difference of restricted means to {horizon:g}"
                difference = undetermined(method, len(arm) + len(other), str(error))
            differences[name] = _exploratory(difference, events[name])
    test = _heterogeneity(list(differences.values())) if differences else None
    return TreatmentBySubtype(interaction, ratios, differences, test, events)


def _exploratory(estimate: Estimate, events: int) -> Estimate:
    few = (f"{events} events: descriptive only",) if events < EVENTS_PER_COEFFICIENT else ()
    return replace(estimate, warnings=(*estimate.warnings, _EXPLORATORY, *few))


def _heterogeneity(differences: Sequence[Estimate]) -> TestResult:
    """Cochran's test that the differences are equal."""
    method, df = "Cochran's Q of differences of restricted means", len(differences) - 1
    values = np.array([difference.value for difference in differences])
    errors = np.array([(difference.ci_high - difference.ci_low) / (2 * _Z) for difference in differences])
    if not (np.isfinite(values) & (errors > 0)).all():
        return TestResult(np.nan, np.nan, method, df, ("a subtype has no difference", _EXPLORATORY))
    return chi_squared(cochran_q(values, errors**2), df, method, (_EXPLORATORY,))
