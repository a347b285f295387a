"""How often the intervals of crcjax.validation contain the truth, by simulation of studies whose truth is known."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from record import record
from scipy import special, stats

from crcjax.validation import confusion, decisions, ranking
from crcjax.validation.agreement import kappa_of_units
from crcjax.validation.calibration_error import classwise_error, top_label_error
from crcjax.validation.conformal import conformal_performance, fit_conformal
from crcjax.validation.estimate import Estimate
from crcjax.validation.paired import paired_difference, paired_difference_of_units
from crcjax.validation.precision_recall import average_precision
from crcjax.validation.predictive_values import predictive_values
from crcjax.validation.probability_scores import brier_score
from crcjax.validation.proportions import clopper_pearson, wilson
from crcjax.validation.recalibration import recalibrate, temperature
from crcjax.validation.resampled_statistics import table_statistics

SHARES = np.array([0.5, 0.2, 0.3])
CORRELATION = 0.7
# Patients of a simulated population that stands for the truth.
POPULATION = 400_000
# The same for the bootstrap's rows, whose average precision takes longer.
RESAMPLED_POPULATION = 40_000


@dataclass(frozen=True)
class Study:
    """One slide per row: reference class, probabilities, patient."""

    label: np.ndarray
    probs: np.ndarray
    patient: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        return self.probs.argmax(axis=1)


def simulate(rng: np.random.Generator, patients: int, slides: int) -> Study:
    """Logits of three classes, of which patient and slide share the noise so that slides of a patient correlate."""
    patient_label = rng.choice(3, patients, p=SHARES)
    patient = np.repeat(np.arange(patients), slides)
    shared = np.sqrt(CORRELATION) * rng.normal(size=(patients, 3))[patient]
    noise = shared + np.sqrt(1 - CORRELATION) * rng.normal(size=(patients * slides, 3))
    label = patient_label[patient]
    return Study(label, special.softmax(1.2 * np.eye(3)[label] + noise, axis=1), patient)


def calibrated(rng: np.random.Generator, n: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels sampled from probabilities, which are then sharpened."""
    probs = rng.dirichlet([1.2] * 3, n)
    label = (rng.random(n)[:, None] > probs.cumsum(axis=1)[:, :-1]).sum(axis=1)
    sharper = probs**sharpness
    return label, sharper / sharper.sum(axis=1, keepdims=True)


def row(statistic: str, design: str, covered: np.ndarray, target: str, is_met: Callable[[float], bool]) -> dict:
    """`covered` has a value from 0 to 1 for each simulated study."""
    mean = float(np.mean(covered))
    return {
        "interval": statistic,
        "design": design,
        "studies": len(covered),
        "coverage %": round(100 * mean, 2),
        "Monte Carlo error": round(100 * float(np.std(covered) / np.sqrt(len(covered))), 2),
        "target %": target,
        "met": "yes" if is_met(100 * mean) else "no",
    }


def within(low: float, high: float) -> tuple[str, Callable[[float], bool]]:
    return f"{low:g} to {high:g}", lambda value: low <= value <= high


def at_least(low: float) -> tuple[str, Callable[[float], bool]]:
    return f"at least {low:g}", lambda value: value >= low


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.ci_low <= truth <= estimate.ci_high


def exact_rows() -> Iterator[dict]:
    """Coverages of proportions as sums over all outcomes, averaged over the true proportion; no simulation."""
    grid = (np.arange(500) + 0.5) / 500
    for function, name, target in (
        (wilson, "Wilson", within(94, 96)),
        (clopper_pearson, "Clopper-Pearson", at_least(95)),
    ):
        for n in (28, 73, 147):
            limits = np.array([(e.ci_low, e.ci_high) for e in (function(k, n) for k in range(n + 1))])
            inside = (limits[:, :1] <= grid) & (grid <= limits[:, 1:])
            coverage = (stats.binom.pmf(np.arange(n + 1)[:, None], n, grid) * inside).sum(axis=0)
            yield row(name, f"n = {n}, mean over 500 proportions, exact", coverage, *target)
    for n in (60, 147):
        counts = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
        # Shares of discordant cases as large as systems of similar quality have.
        shares = [(p, q) for p in (0.02, 0.05, 0.1, 0.2) for q in (0.02, 0.05, 0.1, 0.2)]
        likely = [(b, c) for b, c in counts if max(b, c) <= 0.2 * n + 6 * np.sqrt(n * 0.16)]
        estimates = [paired_difference(b, c, n) for b, c in likely]
        low, high = np.array([(e.ci_low, e.ci_high) for e in estimates]).T
        b, c = np.array(likely).T
        coverage = [
            float(
                (
                    stats.multinomial.pmf(np.column_stack([b, c, n - b - c]), n, [p, q, 1 - p - q])
                    * ((low <= p - q) & (p - q <= high))
                ).sum()
            )
            for p, q in shares
        ]
        yield row("Tango", f"n = {n}, mean over 16 pairs of shares, exact", np.array(coverage), *within(94, 96))


def slide_rows(studies: int) -> Iterator[dict]:
    """Statistics of 60 patients with 4 slides, and of 147 patients with one."""
    truth_study = simulate(np.random.default_rng(0), POPULATION, 1)
    truth = table_truth(truth_study)
    nominal = within(93, 97)
    for patients, slides in ((60, 4), (147, 1)):
        design = f"{patients} patients, {slides} slide{'s'[: slides > 1]} each"
        covered: dict[str, list[bool]] = {}

        def add(name: str, estimate: Estimate, true_value: float, covered: dict[str, list[bool]] = covered) -> None:
            covered.setdefault(name, []).append(covers(estimate, true_value))

        for seed in range(studies):
            study = simulate(np.random.default_rng([1, patients, seed]), patients, slides)
            y, p, call = study.label, study.probs, study.predicted
            cluster = study.patient if slides > 1 else None
            add("accuracy", decisions.accuracy(y, call, cluster), truth["accuracy"])
            rates = decisions.class_rates(y, call, 3, cluster)[1]
            add("sensitivity of the rare class", rates.sensitivity, truth["sensitivity"])
            add("F1 of the rare class", rates.f1, truth["f1"])
            add("balanced accuracy", decisions.balanced_accuracy(y, call, 3, cluster), truth["balanced_accuracy"])
            add("macro F1", decisions.macro_f1(y, call, 3, cluster), truth["macro_f1"])
            add("Matthews correlation", decisions.matthews_correlation(y, call, 3, cluster), truth["mcc"])
            add("Cohen's kappa", kappa_of_units(y, call, 3, cluster), truth["kappa"])
            add("PPV at 10 %", predictive_values(y, call, np.array([0.6, 0.1, 0.3]), cluster)[1].ppv, truth["ppv"])
            add("AUROC of the rare class", ranking.auroc_estimate(y == 1, p[:, 1], cluster), truth["auroc"])
            add("macro AUROC", ranking.macro_auroc_estimate(y, p, cluster), truth["macro_auroc"])
            add("Hand-Till", ranking.hand_till(y, p, cluster), truth["hand_till"])
            add("Brier score", brier_score(y, p, cluster), truth["brier"])
            other = p[:, ::-1].argmax(axis=1)
            add(
                "paired difference, Tango",
                paired_difference_of_units(call == y, other == y, cluster),
                truth["difference"],
            )
            if slides > 1:
                add("macro AUROC, slides taken as patients", ranking.macro_auroc_estimate(y, p), truth["macro_auroc"])
        for name, values in covered.items():
            is_naive = "taken as" in name
            target = ("none: shows why", lambda value: True) if is_naive else nominal
            yield row(name, design, np.array(values), *target)


def table_truth(study: Study) -> dict[str, float]:
    y, p, call = study.label, study.probs, study.predicted
    table = confusion.confusion_matrix(y, call, 3)
    pair = predictive_values(y, call, np.array([0.6, 0.1, 0.3]))[1].ppv.value
    other = p[:, ::-1].argmax(axis=1)
    return {
        "accuracy": float(confusion.accuracies(table)),
        "sensitivity": float(confusion.sensitivities(table)[1]),
        "f1": float(confusion.f1_scores(table)[1]),
        "balanced_accuracy": float(confusion.balanced_accuracies(table)),
        "macro_f1": float(confusion.macro_f1_scores(table)),
        "mcc": float(confusion.matthews_correlations(table)),
        "kappa": float(confusion.kappas(table)),
        "ppv": pair,
        "auroc": ranking.auroc(y == 1, p[:, 1]),
        "macro_auroc": ranking.macro_auroc_estimate(y, p).value,
        "hand_till": ranking.hand_till(y, p).value,
        "brier": brier_score(y, p).value,
        "average_precision": average_precision(y == 1, p[:, 1], 0, replicates=2).area.value,
        "difference": float((call == y).mean() - (other == y).mean()),
    }


def bootstrap_rows(studies: int) -> Iterator[dict]:
    truth = table_truth(simulate(np.random.default_rng(0), RESAMPLED_POPULATION, 1))
    names = {
        "accuracy": "accuracy",
        "balanced_accuracy": "balanced_accuracy",
        "macro_f1": "macro_f1",
        "mcc": "mcc",
        "macro_auroc": "macro_auroc",
        "average_precision_1": "average_precision",
    }
    for patients, slides in ((60, 4), (147, 1)):
        for interval in ("percentile", "bca"):
            covered: dict[str, list[bool]] = {name: [] for name in names}
            for seed in range(studies):
                study = simulate(np.random.default_rng([2, patients, seed]), patients, slides)
                table = table_statistics(
                    study.label, study.probs, seed, study.patient, study.label, replicates=1000, interval=interval
                )
                for name, true_name in names.items():
                    covered[name].append(covers(table[name], truth[true_name]))
            for name, values in covered.items():
                design = f"{patients} patients, {slides} slide{'s'[: slides > 1]} each, 1,000 resamples"
                yield row(f"{name.replace('_', ' ')}, bootstrap, {interval}", design, np.array(values), *within(92, 98))


def calibration_rows(studies: int) -> Iterator[dict]:
    p_values: dict[str, list[float]] = {"ECE": [], "classwise ECE": [], "recalibration": []}
    slopes = []
    for seed in range(studies):
        label, probs = calibrated(np.random.default_rng([3, seed]), 147)
        p_values["ECE"].append(top_label_error(label, probs, seed, samples=199).test.p_value)
        p_values["classwise ECE"].append(classwise_error(label, probs, seed, samples=199).test.p_value)
        result = recalibrate(label, probs)
        p_values["recalibration"].append(result.test.p_value)
        slopes.append(covers(result.slopes[0], 1.0))
    for name, values in p_values.items():
        uniform = stats.kstest(values, "uniform").pvalue
        design = f"147 calibrated cases; Kolmogorov-Smirnov p of a uniform distribution {uniform:.2f}"
        yield row(f"{name}: p-value above 0.05", design, np.array(values) > 0.05, *within(93, 97))
    yield row("recalibration slope", "147 calibrated cases", np.array(slopes), *within(93, 97))


def temperature_rows(studies: int) -> Iterator[dict]:
    covered = []
    for seed in range(studies):
        sharper = calibrated(np.random.default_rng([3, seed]), 147, 1.5)
        covered.append(covers(temperature(*sharper, seed, replicates=500), 1.5))
    yield row("temperature, bootstrap", "147 cases, 500 resamples", np.array(covered), *within(92, 98))


def conformal_rows(studies: int) -> Iterator[dict]:
    for method in ("lac", "aps", "raps"):
        overall: list[float] = []
        worst: dict[int, list[float]] = {k: [] for k in range(3)}
        for seed in range(studies):
            rng = np.random.default_rng([4, seed])
            fitted, test = simulate(rng, 147, 1), simulate(rng, 500, 1)
            plain = fit_conformal(fitted.label, fitted.probs, 0.1, rng.random(147), method=method)
            by_class = fit_conformal(fitted.label, fitted.probs, 0.1, rng.random(147), method=method, by_class=True)
            shares = rng.random(500)
            overall.append(conformal_performance(plain.sets(test.probs, shares), test.label).coverage.value)
            shown = conformal_performance(by_class.sets(test.probs, shares), test.label)
            for k in range(3):
                worst[k].append(shown.by_class[k].value)
        # A coverage of exactly the nominal one falls below it in half of all campaigns: allow three Monte Carlo errors.
        for name, values in (("", overall), *((f", class {k}", worst[k]) for k in range(3))):
            error = 300 * np.std(values) / np.sqrt(studies)
            kind = f"{method.upper()} set of 90 %{name and ' by class' + name}"
            yield row(kind, "147 calibration cases", np.array(values), "at least 90", lambda v, e=error: v >= 90 - e)


def main(studies: int, resampled_studies: int) -> None:
    rows = [
        *exact_rows(),
        *slide_rows(studies),
        *bootstrap_rows(resampled_studies),
        *calibration_rows(studies),
        *temperature_rows(resampled_studies),
        *conformal_rows(resampled_studies),
    ]
    about = (
        "How often 95 % intervals contain the truth, in simulated studies whose truth is known\n\n"
        f"* Three classes with shares {', '.join(map(str, SHARES.tolist()))}; logits of a patient's slides correlate with "
        f"{CORRELATION}. The truth is the value in {POPULATION:,} simulated patients; for the bootstrap's rows, {RESAMPLED_POPULATION:,}.\n"
        "* Exact rows sum over all outcomes and simulate nothing; their error is the spread over true proportions.\n"
        "* Rows with few studies have a large Monte Carlo error; a target that is missed by less is not evidence of a miss.\n"
        "* Average precision is covered too rarely: most intervals that miss lie above the truth. It depends on the share of the "
        "class, which its resamples hold fixed, and resamples repeat slides. Prefer the AUROC's interval.\n"
        "* p-values: the share of calibrated studies that the test rightly does not reject at 5 %.\n"
        "* `met` of conformal sets allows three Monte Carlo errors below 90 %."
    )
    command = f"python tools/bench_coverage.py --studies {studies} --resampled {resampled_studies}"
    record("coverage", command, rows, about)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--resampled", type=int, default=500, help="studies with a bootstrap each")
    arguments = parser.parse_args()
    main(arguments.studies, arguments.resampled)
