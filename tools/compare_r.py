"""The statistics of crcjax.validation compared with R's on random tables. Needs Rscript with pROC, metafor and survival."""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import record
from scipy import special, stats

from crcjax.validation import ranking, scanners, sites
from crcjax.validation.concordance import harrell_c
from crcjax.validation.cox import cox, proportional_hazards_test
from crcjax.validation.estimate import Estimate
from crcjax.validation.paired import mcnemar
from crcjax.validation.probability_scores import brier_decomposition
from crcjax.validation.proportions import clopper_pearson, wilson
from crcjax.validation.recalibration import recalibrate_class
from crcjax.validation.survival import FollowUp, log_rank, restricted_mean, survival_at

TOLERANCE = 1e-6
SCRIPT = Path(__file__).with_name("compare_r.R")
Table = dict[str, np.ndarray]
Z = stats.norm.ppf(0.975)

# By family of random tables: the R function behind each value.
R_FUNCTION = {
    "wilson": "prop.test",
    "exact": "binom.test",
    "above_rate": "binom.test",
    "mcnemar": "binom.test",
    "bowker": "mcnemar.test",
    "auroc": "pROC: roc, var, roc.test",
    "hand_till": "pROC: multiclass.roc",
    "large": "glm",
    "intercept": "glm",
    "slope": "glm",
    "scanner_slope": "lm",
    "recalibration": "glm",
    "corp": "isoreg",
    "pooled": "metafor: rma, adhoc",
    "tau2": "metafor: rma, REML",
    "q": "metafor: rma",
    "i2": "metafor: rma, confint",
    "dl": "metafor: rma, DL",
    "prediction": "metafor: rma, qt",
    "bias": "t.test",
    "icc": "anova, qf",
    "survival": "survival: survfit",
    "restricted": "survival: survfit",
    "log_rank": "survival: survdiff",
    "stratified": "survival: survdiff",
    "efron": "survival: coxph",
    "breslow": "survival: coxph",
    "proportional": "survival: cox.zph",
    "harrell": "survival: concordance",
}


def random_tables(rng: np.random.Generator) -> dict[str, Table]:
    """One random table of every family; sizes and separations vary from table to table."""
    n = int(rng.integers(2, 200))
    positive = rng.permutation(np.arange(m := int(rng.integers(12, 80))) < rng.integers(3, m - 2))
    first = rng.normal(size=m) + rng.uniform(0, 1.5) * positive
    label = rng.permutation(np.append(np.repeat([0, 1, 2], 3), rng.integers(3, size=m)))
    probs = special.softmax(rng.normal(size=(len(label), 3)) + rng.uniform(0, 2) * np.eye(3)[label], axis=1)
    prob = rng.uniform(0.02, 0.98, size=150).round(int(rng.integers(2, 6)))
    events = rng.random(150) < special.expit(rng.uniform(-1, 1) + rng.uniform(0.3, 1.5) * special.logit(prob))
    variance = rng.uniform(0.02, 0.4, size=int(rng.integers(3, 12)))
    effect = rng.normal(size=len(variance)) * np.sqrt(variance + rng.choice([0, 0.1, 0.8]))
    slide = rng.normal(size=int(rng.integers(5, 60)))
    patients = int(rng.integers(40, 150))
    group, x = rng.integers(3, size=patients), rng.normal(size=(patients, 2)).round(1)
    # Whole numbers, so that times are tied.
    time = np.ceil(rng.exponential(20 * np.exp(-0.5 * x[:, 0] - 0.3 * group)) + 0.01)
    censored = np.ceil(rng.uniform(5, 60, size=patients))
    observed = np.minimum(time, censored)
    square = rng.integers(1, 30, size=9)
    return {
        "proportion": {"k": np.array([rng.integers(n + 1)]), "n": np.array([n]), "rate": rng.uniform(0.1, 0.9, 1)},
        "paired": {"b": rng.integers(0, 30, 1), "c": rng.integers(1, 30, 1)},
        "square": {"count": square},
        "scores": {
            "positive": positive.astype(int),
            "first": first.round(int(rng.integers(1, 4))),
            "second": (0.5 * first + rng.normal(size=m)).round(1),
        },
        "classes": {"label": label, **{f"p{k}": probs[:, k].round(int(rng.integers(1, 5))) for k in range(3)}},
        "recalibration": {"event": events.astype(int), "prob": prob},
        "sites": {"yi": effect, "vi": variance},
        "scanners": {"first": slide + rng.normal(size=len(slide)), "second": slide + 0.5 * rng.normal(size=len(slide))},
        "survival": {
            "time": observed,
            "status": (time <= censored).astype(int),
            "group": group,
            "stratum": rng.integers(2, size=patients),
            "x1": x[:, 0],
            "x2": x[:, 1],
            "horizon": np.full(patients, np.quantile(observed, 0.7)),
        },
    }


def error(estimate: Estimate) -> float:
    return (estimate.ci_high - estimate.ci_low) / (2 * Z)


def proportion(t: Table) -> dict[str, float]:
    k, n = int(t["k"][0]), int(t["n"][0])
    score, exact = wilson(k, n), clopper_pearson(k, n)
    return {
        "wilson_low": score.ci_low,
        "wilson_high": score.ci_high,
        "exact_low": exact.ci_low,
        "exact_high": exact.ci_high,
        "above_rate_p": float(stats.binomtest(k, n, float(t["rate"][0]), alternative="greater").pvalue),
    }


def scores(t: Table) -> dict[str, float]:
    positive = t["positive"] == 1
    estimate = ranking.auroc_estimate(positive, t["first"])
    compared = ranking.compare_aurocs(positive, t["first"], t["second"])
    result = {"auroc": estimate.value, "auroc_z": compared.test.statistic, "auroc_p": compared.test.p_value}
    # A perfect AUROC has no error.
    if estimate.value < 1:
        low, high = special.logit([estimate.ci_low, estimate.ci_high]).tolist()
        result["auroc_error"] = (high - low) / (2 * Z) * estimate.value * (1 - estimate.value)
    return result


def recalibration(t: Table) -> dict[str, float]:
    event = t["event"] == 1
    result = recalibrate_class(event, t["prob"])
    corp = brier_decomposition(event, t["prob"], 0, bins=None, replicates=2)
    return {
        "large": result.in_the_large[0].value,
        "large_error": error(result.in_the_large[0]),
        "intercept": result.intercepts[0].value,
        "intercept_error": error(result.intercepts[0]),
        "slope": result.slopes[0].value,
        "slope_error": error(result.slopes[0]),
        "recalibration_statistic": result.test.statistic,
        "corp_reliability": corp.reliability.value,
        "corp_resolution": corp.resolution.value,
    }


def pooled_sites(t: Table) -> dict[str, float]:
    result = sites.pool_sites(t["yi"], t["vi"])
    return {
        "pooled": result.pooled.value,
        "pooled_low": result.pooled.ci_low,
        "pooled_high": result.pooled.ci_high,
        "tau2": result.tau2,
        "q": result.q,
        "i2": result.i2.value,
        "i2_low": result.i2.ci_low,
        "i2_high": result.i2.ci_high,
        "dl_tau2": sites.dersimonian_laird_tau2(t["yi"], t["vi"]),
        "prediction_low": result.prediction.ci_low,
        "prediction_high": result.prediction.ci_high,
    }


def scanner_pair(t: Table) -> dict[str, float]:
    result = scanners.bland_altman(t["first"], t["second"])
    icc = scanners.intraclass_correlations(np.column_stack([t["first"], t["second"]])).consistency
    return {
        "bias_low": result.bias.ci_low,
        "bias_high": result.bias.ci_high,
        "scanner_slope": result.proportional_bias.statistic,
        "scanner_slope_p": result.proportional_bias.p_value,
        "icc": icc.value,
        "icc_low": icc.ci_low,
        "icc_high": icc.ci_high,
    }


def survival(t: Table) -> dict[str, float]:
    follow_up, horizon = FollowUp(t["time"], t["status"] == 1), float(t["horizon"][0])
    covariates = {"x1": t["x1"], "x2": t["x2"]}
    at, mean = survival_at(follow_up, horizon), restricted_mean(follow_up, horizon)
    efron, breslow = cox(follow_up, covariates), cox(follow_up, covariates, t["stratum"], "breslow")
    hazards, rank = proportional_hazards_test(follow_up, covariates), harrell_c(follow_up, t["x1"])
    return {
        "survival": at.value,
        "survival_low": at.ci_low,
        "survival_high": at.ci_high,
        "restricted_mean": mean.value,
        "restricted_mean_error": error(mean),
        "log_rank": log_rank(follow_up, t["group"]).statistic,
        "stratified_log_rank": log_rank(follow_up, t["group"], t["stratum"]).statistic,
        "efron_x1": efron.coefficients["x1"].log_hazard_ratio.value,
        "efron_x1_error": efron.coefficients["x1"].error,
        "efron_likelihood": efron.log_likelihood,
        "breslow_x2": breslow.coefficients["x2"].log_hazard_ratio.value,
        "breslow_x2_error": breslow.coefficients["x2"].error,
        "proportional_x1": hazards["x1"].statistic,
        "proportional_all": hazards["all covariates"].statistic,
        "harrell": rank.value,
        "harrell_error": error(rank),
    }


def square(t: Table) -> dict[str, float]:
    test = scanners.bowker(t["count"].reshape(3, 3))
    return {"bowker": test.statistic, "bowker_p": test.p_value}


def classes(t: Table) -> dict[str, float]:
    return {"hand_till": ranking.hand_till(t["label"], np.column_stack([t[f"p{k}"] for k in range(3)])).value}


OWN: dict[str, Callable[[Table], dict[str, float]]] = {
    "proportion": proportion,
    "paired": lambda t: {"mcnemar_p": mcnemar(int(t["b"][0]), int(t["c"][0])).p_value},
    "square": square,
    "scores": scores,
    "classes": classes,
    "recalibration": recalibration,
    "sites": pooled_sites,
    "scanners": scanner_pair,
    "survival": survival,
}


def write(folder: Path, family: str, tables: list[Table]) -> None:
    with open(folder / f"{family}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", *tables[0]])
        for number, table in enumerate(tables):
            writer.writerows(
                [number, *row] for row in zip(*(column.tolist() for column in table.values()), strict=True)
            )


def main(count: int, seed: int) -> None:
    if shutil.which("Rscript") is None:
        raise SystemExit("Rscript is absent; apt-get install r-base-core r-cran-proc r-cran-metafor r-cran-survival")
    tables = [random_tables(np.random.default_rng([seed, number])) for number in range(count)]
    theirs: dict[tuple[int, str], float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family in OWN:
            write(folder, family, [table[family] for table in tables])
        subprocess.run(["Rscript", str(SCRIPT), str(folder)], check=True)
        with open(folder / "r.csv", newline="") as file:
            for line in csv.DictReader(file):
                theirs[int(line["table"]), line["name"]] = float(line["value"].replace("NA", "nan"))
        versions = ", ".join((folder / "versions.txt").read_text().split("\n")[:4])
    differences: dict[str, list[float]] = {}
    for number, table in enumerate(tables):
        for family, own in OWN.items():
            for key, value in own(table[family]).items():
                other = theirs[number, key]
                if np.isfinite(other) or np.isfinite(value):
                    differences.setdefault(key, []).append(abs(value - other) / max(1.0, abs(other)))
    rows = [
        {
            "value": key.replace("_", " "),
            "R": next(function for prefix, function in R_FUNCTION.items() if key.startswith(prefix)),
            "tables": len(values),
            "largest difference": float(np.max(values)),
            "tables beyond 1e-6": int((~(np.array(values) <= TOLERANCE)).sum()),
        }
        for key, values in differences.items()
    ]
    about = (
        "The statistics of validation compared with R's on random tables\n\n"
        f"* {versions}, from Debian.\n"
        "* Differences are absolute, or relative where R's value is above 1. Tables for which both are undetermined are not counted.\n"
        "* Times, scores and probabilities are rounded, so that many are tied."
    )
    record("compare_r", f"python tools/compare_r.py --tables {count} --seed {seed}", rows, about)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.tables, arguments.seed)
