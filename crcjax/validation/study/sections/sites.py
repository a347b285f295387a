"""Section 2.6: what holds over sites, and what to expect at a new one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from crcjax.validation.estimate import LEVEL, Estimate
from crcjax.validation.proportions import wilson
from crcjax.validation.ranking import macro_auroc_estimate
from crcjax.validation.sites import leave_one_site_out, logit_proportions, pool_sites
from crcjax.validation.study.forest import Row, forest_figure
from crcjax.validation.study.section import Section, value_and_interval
from crcjax.validation.study.trial import Cases, Trial

_Z = float(stats.norm.ppf((1 + LEVEL) / 2))
POOLED, NEW_SITE = "pooled over sites", "expected at a new site"


def sites(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    of_case = cases.values("site")
    names = sorted(set(of_case.tolist()) - {""})
    unknown = int((of_case == "").sum())
    if unknown:
        section.add_sentences(f"{unknown} patients have no site and are left out of this section.")
    if len(names) < 2:
        reason = f"all patients are of one site ({names[0]})" if names else "no patient has a site"
        section.missing = f"Nothing can be said about other sites: {reason}."
        return
    _counts(cases, of_case, names, section)
    by_site = {name: cases.subset(of_case == name) for name in names}
    correct = {name: int((c.label == c.call).sum()) for name, c in by_site.items()}
    n = {name: len(c) for name, c in by_site.items()}
    accuracies = {name: wilson(correct[name], n[name]) for name in names}
    effect, variance = logit_proportions(np.array(list(correct.values())), np.array(list(n.values())))
    _pooled("accuracy", "accuracy", accuracies, effect, variance, section, stamp)
    aurocs = {name: macro_auroc_estimate(c.label, c.probs) for name, c in by_site.items()}
    _pooled("macro_auroc", "macro AUROC", aurocs, *_logits(list(aurocs.values())), section, stamp)
    section.add_sentences(
        "Sites are pooled on the logit scale with REML's variance between sites and the modified Hartung-Knapp interval. The "
        "prediction interval is for a new site; with few sites it is wide."
    )
    rows = {name: f"{{}}.{name}" for name in names} | {POOLED: "{}.pooled", NEW_SITE: "{}.prediction"}
    rows |= {"variance between sites (I²)": "{}.i2"} | {
        f"pooled without {name}": f"{{}}.without.{name}" for name in names
    }
    columns = {"accuracy": "accuracy", "macro AUROC": "macro_auroc"}
    section.estimate_matrix("estimates", "By site, pooled, and without each site in turn", "site", rows, columns)


def _counts(cases: Cases, of_case: np.ndarray, names: list[str], section: Section) -> None:
    rows = []
    for name in names:
        label = cases.label[of_case == name]
        rows.append((name, str(len(label)), *(str(int((label == k).sum())) for k in range(len(cases.classes)))))
    columns = ("site", "patients", *cases.classes)
    section.table("counts", "Patients by site and reference class", columns, rows, columns[1:])


def _pooled(
    name: str,
    label: str,
    by_site: dict[str, Estimate],
    effect: np.ndarray,
    variance: np.ndarray,
    section: Section,
    stamp: str,
) -> None:
    """Keeps the estimates of sites, pooled ones and those without each site, and draws the forest plot."""
    rows: list[Row] = []
    for site, estimate in by_site.items():
        rows.append((site, section.estimate(f"{name}.{site}", f"{label}, {site}", estimate)))
    pooled = pool_sites(effect, variance)
    for key, title, part in (("pooled", POOLED, pooled.pooled), ("prediction", NEW_SITE, pooled.prediction)):
        rows.append((title, section.estimate(f"{name}.{key}", f"{label}, {title}", to_share(part))))
    section.estimate(f"{name}.i2", f"{label}, share of variance between sites (I²)", pooled.i2)
    for site, without in zip(by_site, leave_one_site_out(effect, variance), strict=True):
        section.estimate(f"{name}.without.{site}", f"{label}, without {site}", to_share(without.pooled))
    section.figures.append(
        forest_figure(
            *(f"sites_{name}", f"{label[0].upper()}{label[1:]} by site", rows, label),
            caption=f"Variance between sites (tau², logit scale) {pooled.tau2:.3f}; I² {value_and_interval(pooled.i2)}.",
            summaries=(POOLED, NEW_SITE),
            stamp=stamp,
        )
    )


def to_share(estimate: Estimate) -> Estimate:
    """An estimate on the logit scale as a share."""
    value, low, high = (float(expit(v)) for v in (estimate.value, estimate.ci_low, estimate.ci_high))
    return replace(estimate, value=value, ci_low=low, ci_high=high)


def _logits(estimates: list[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of areas, and their variances by the width of the intervals, which are symmetric on that scale."""
    values, low, high = (np.array([getattr(e, part) for e in estimates]) for part in ("value", "ci_low", "ci_high"))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isfinite(low), logit(values), np.nan), ((logit(high) - logit(low)) / (2 * _Z)) ** 2
