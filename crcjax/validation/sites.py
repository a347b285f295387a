"""Random-effects meta-analysis of an estimate over sites.

Effects are on an unbounded scale (logit of a proportion or of an AUROC, Fisher's z of a kappa) with their variances within
sites. The variance between sites is REML's. With five sites or fewer the data hardly determine it: show every site.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, stats

from crcjax.errors import InputError
from crcjax.validation.estimate import LEVEL, Estimate, undetermined

# Sites below which a prediction interval, whose t distribution has sites - 2 degrees of freedom, does not exist.
_FEWEST_FOR_PREDICTION = 3
_FEW_SITES = 5


@dataclass(frozen=True)
class MetaAnalysis:
    """The pooled effect over sites, on the scale of the effects.

    Attributes:
      pooled: the mean effect with the modified Hartung-Knapp interval (Knapp and Hartung 2003, with a scale of at least 1).
      prediction: the interval of the effect at a new site (t distribution with sites - 2 degrees of freedom).
      tau2: the variance between sites.
      q: Cochran's Q.
      i2: the share of the variance that lies between sites, with the Q-profile interval (Viechtbauer 2007).
    """

    pooled: Estimate
    prediction: Estimate
    tau2: float
    q: float
    i2: Estimate


def logit_proportions(
    successes: Int[np.ndarray, " site"], n: Int[np.ndarray, " site"]
) -> tuple[Float[np.ndarray, " site"], Float[np.ndarray, " site"]]:
    """The logits of proportions by site, and their variances; a half is added to both counts where one is zero.

    Raises InputError for a site without cases.
    """
    if (n < 1).any():
        raise InputError(f"every site must have a case, got {n.tolist()}; leave out sites without cases")
    failures = n - successes
    half = np.where((successes == 0) | (failures == 0), 0.5, 0.0)
    return np.log((successes + half) / (failures + half)), 1 / (successes + half) + 1 / (failures + half)


def pool_sites(effect: Float[np.ndarray, " site"], variance: Float[np.ndarray, " site"]) -> MetaAnalysis:
    """Pools the effects of sites. With one site nothing is pooled: the estimates are NaN with a warning.

    Sites whose effect is not a number are excluded and counted. Raises InputError for a variance that is not above 0.
    """
    known = np.isfinite(effect) & np.isfinite(variance)
    excluded = int((~known).sum())
    effect, variance = effect[known], variance[known]
    if not (variance > 0).all():
        raise InputError(f"the variance of every site's effect must be above 0, got {variance.tolist()}")
    sites = len(effect)
    if sites < 2:
        nothing = undetermined("random effects, REML", sites, "a single site has nothing to be pooled with")
        return MetaAnalysis(nothing, nothing, np.nan, np.nan, nothing)
    tau2 = reml_tau2(effect, variance)
    weight = 1 / (variance + tau2)
    mean, plain_variance = float((weight * effect).sum() / weight.sum()), float(1 / weight.sum())
    scale = max(1.0, float((weight * (effect - mean) ** 2).sum()) / (sites - 1))
    warnings: tuple[str, ...] = (
        (f"{sites} sites hardly determine the variance between sites",) if sites <= _FEW_SITES else ()
    )
    if excluded:
        warnings += (f"{excluded} sites without an effect are excluded",)
    pooled = _t_interval(mean, scale * plain_variance, sites - 1, "REML, modified Hartung-Knapp", sites, warnings)
    pooled = replace(pooled, n_excluded=excluded)
    if sites < _FEWEST_FOR_PREDICTION:
        prediction = undetermined("prediction interval", sites, "two sites determine no prediction interval")
    else:
        method = f"prediction interval, t with {sites - 2} degrees of freedom"
        prediction = _t_interval(mean, tau2 + plain_variance, sites - 2, method, sites, warnings)
    return MetaAnalysis(pooled, prediction, tau2, cochran_q(effect, variance), _i2(effect, variance, tau2, warnings))


def reml_tau2(effect: Float[np.ndarray, " site"], variance: Float[np.ndarray, " site"]) -> float:
    """The restricted maximum-likelihood estimate of the variance between sites (Viechtbauer 2005)."""

    def loss(tau2: float) -> float:
        weight = 1 / (variance + tau2)
        mean = (weight * effect).sum() / weight.sum()
        deviance = (weight * (effect - mean) ** 2).sum()
        return float(-np.log(weight).sum() + np.log(weight.sum()) + deviance) / 2

    widest = max(1e-12, 10 * float(effect.var(ddof=1)) + float(variance.max()))
    best = optimize.minimize_scalar(loss, bounds=(0, widest), method="bounded", options={"xatol": 1e-12 * widest})
    # The search never reaches its bounds.
    return float(best.x) if best.fun < loss(0.0) else 0.0


def cochran_q(effect: Float[np.ndarray, " site"], variance: Float[np.ndarray, " site"], tau2: float = 0.0) -> float:
    """The weighted sum of squares about the mean, with the weights of `tau2`."""
    weight = 1 / (variance + tau2)
    return float((weight * (effect - (weight * effect).sum() / weight.sum()) ** 2).sum())


def dersimonian_laird_tau2(effect: Float[np.ndarray, " site"], variance: Float[np.ndarray, " site"]) -> float:
    """The moment estimate of DerSimonian and Laird (1986), at least 0; for comparison with older reports."""
    weight = 1 / variance
    spread = weight.sum() - (weight**2).sum() / weight.sum()
    return max(0.0, float((cochran_q(effect, variance) - (len(effect) - 1)) / spread))


def leave_one_site_out(effect: Float[np.ndarray, " site"], variance: Float[np.ndarray, " site"]) -> list[MetaAnalysis]:
    """The meta-analysis without each site in turn."""
    return [pool_sites(np.delete(effect, site), np.delete(variance, site)) for site in range(len(effect))]


def _i2(effect: np.ndarray, variance: np.ndarray, tau2: float, warnings: tuple[str, ...]) -> Estimate:
    sites, weight = len(effect), 1 / variance
    typical = (sites - 1) * weight.sum() / (weight.sum() ** 2 - (weight**2).sum())
    limits = [_q_profile(effect, variance, probability) for probability in ((1 + LEVEL) / 2, (1 - LEVEL) / 2)]
    low, high, value = (between / (between + typical) for between in (*limits, tau2))
    return Estimate(value, low, high, "I² of REML, Q-profile", sites, warnings=warnings)


def _q_profile(effect: np.ndarray, variance: np.ndarray, probability: float) -> float:
    """The variance between sites at which Q equals a quantile of chi-squared; 0 if it is below for any."""
    quantile = stats.chi2.ppf(probability, len(effect) - 1)

    def excess(tau2: float) -> float:
        return cochran_q(effect, variance, tau2) - quantile

    if excess(0.0) <= 0:
        return 0.0
    widest = 1.0
    while excess(widest) > 0:
        widest *= 2
    return float(optimize.brentq(excess, 0.0, widest))


def _t_interval(mean: float, variance: float, df: int, method: str, n: int, warnings: tuple[str, ...]) -> Estimate:
    width = float(stats.t.ppf((1 + LEVEL) / 2, df) * np.sqrt(variance))
    return Estimate(mean, mean - width, mean + width, method, n, warnings=warnings)
