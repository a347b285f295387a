"""Section 2.4: whether site and scanner can be told from what the model computes, and whether that could carry its result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crcjax.validation.estimate import Estimate
from crcjax.validation.ranking import macro_auroc_estimate
from crcjax.validation.site_signal import Association, Probe, label_association, probe_groups, within_site_auroc
from crcjax.validation.study.section import Section, p_text, units, value_and_interval
from crcjax.validation.study.trial import Cases, Scan, Trial

GROUPS = ("site", "scanner")
# A p-value below which the report puts a signal into words; the numbers are there in any case.
_NOTABLE = 0.05
_FEWEST_PERMUTATIONS = 999


@dataclass(frozen=True)
class _Scans:
    """The analysed scans, with the patient and the reference class of each."""

    scans: tuple[Scan, ...]
    patient: np.ndarray
    label: np.ndarray


def site_signal(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    pairs = [(scan, place) for place, patient in enumerate(cases.patients) for scan in patient.evaluable]
    of_scan = np.array([place for _, place in pairs])
    scans = _Scans(tuple(scan for scan, _ in pairs), of_scan, cases.label[of_scan])
    several = [name for name in GROUPS if len({scan.value(name) for scan in scans.scans} - {""}) > 1]
    if not several:
        section.missing = "There is nothing to tell apart: all analysed scans are of one site and one scanner."
        return
    section.add_sentences(
        "A linear probe predicts site and scanner of patients whom it was not fitted on. Its balanced accuracy stands beside "
        "the one after permuting the groups; within classes, the permutations ask for a signal beyond that of the class. "
        "If sites can be told and have other mixtures of classes, the AUROC over all sites may be that of the site."
    )
    features = _features(trial, scans)
    probes = {
        (kind, name): _probes(trial, section, scans, features, kind, name) for kind in features for name in several
    }
    associations = {name: _association(trial, cases, section, name) for name in several}
    _tables(section, several)
    if trial.has_probabilities and "site" in several:
        _within_sites(cases, section)
    if not trial.embeddings:
        section.add_sentences(
            "The plan names no embeddings of slides (data.embeddings); probabilities hide most of them."
        )
    for name in several:
        kinds = [kind for kind in features if probes[kind, name].test.p_value < _NOTABLE]
        if kinds and associations[name].test.p_value < _NOTABLE:
            section.messages.append(
                f"The {name} can be told from {' and '.join(kinds)}, and the {name}s have other mixtures of classes: the "
                f"ranking over all {name}s may be that of the {name}."
            )


def _features(trial: Trial, scans: _Scans) -> dict[str, np.ndarray]:
    """What is probed, by the name in sentences: embeddings where the plan names them, and centred logarithms of probabilities."""
    features = {}
    if trial.embeddings:
        nothing = np.full(len(next(iter(trial.embeddings.values()))), np.nan)
        features["embeddings"] = np.stack([trial.embeddings.get(scan.slide.slide_id, nothing) for scan in scans.scans])
    if trial.has_probabilities:
        logs = np.log(np.maximum([scan.row.probs for scan in scans.scans if scan.row], 1e-15))
        features["probabilities"] = logs - logs.mean(axis=1, keepdims=True)
    return features


def _probes(
    trial: Trial, section: Section, scans: _Scans, features: dict[str, np.ndarray], kind: str, name: str
) -> Probe:
    """Keeps the probe of a group, which it returns, and the test within classes."""
    group = np.array([scan.value(name) for scan in scans.scans], dtype=str)
    overall, within = (
        probe_groups(features[kind], group, trial.plan.seed, scans.patient, stratum) for stratum in (None, scans.label)
    )
    id, words = f"{kind}.{name}", f"{name} from {kind}"
    section.estimate(id, f"{words}: balanced accuracy", overall.balanced_accuracy)
    for part, title, probe in (
        ("by_chance", "by chance", overall),
        ("by_chance_within_classes", "by chance within classes", within),
    ):
        n = probe.balanced_accuracy.n
        warnings = probe.balanced_accuracy.warnings if np.isnan(probe.baseline) else ()
        baseline = Estimate(probe.baseline, np.nan, np.nan, "mean over permutations", n, warnings=warnings)
        section.estimate(f"{id}.{part}", f"{words}: balanced accuracy {title}", baseline)
    section.test(f"{id}.signal", f"{words}: no signal", overall.test)
    section.test(f"{id}.signal_within_classes", f"{words}: no signal beyond the class", within.test)
    return overall


def _association(trial: Trial, cases: Cases, section: Section, name: str) -> Association:
    label = np.array(cases.classes)[cases.label]
    permutations = max(_FEWEST_PERMUTATIONS, trial.plan.resamples)
    result = label_association(label, cases.values(name), trial.plan.seed, permutations=permutations)
    value = Estimate(
        *(result.cramer_v, np.nan, np.nan, "Cramér's V, corrected for bias"), len(cases), warnings=result.test.warnings
    )
    section.estimate(f"classes.{name}", f"association of class and {name} (V)", value)
    section.test(f"classes.{name}.independence", f"class and {name} are independent", result.test)
    return result


def _tables(section: Section, names: list[str]) -> None:
    rows = []
    for id, (label, estimate) in section.estimates.items():
        if f"{id}.by_chance" not in section.estimates:
            continue
        chance = [section.estimates[f"{id}.{part}"][1] for part in ("by_chance", "by_chance_within_classes")]
        tests = [section.tests[f"{id}.{each}"][1] for each in ("signal", "signal_within_classes")]
        cells = [
            cell
            for c, t in zip(chance, tests, strict=True)
            for cell in (value_and_interval(c).split(" ")[0], p_text(t.p_value))
        ]
        rows.append((label.partition(":")[0], value_and_interval(estimate), units(estimate), *cells))
    columns = ("", "balanced accuracy", "n", "by chance", "p", "by chance within classes", "p within classes")
    if rows:
        method = next(e.method for id, (_, e) in section.estimates.items() if f"{id}.by_chance" in section.estimates)
        section.table("probes", "Site and scanner by a linear probe", columns, rows, columns[1:], f"Method: {method}.")
    section.test_table(
        "classes",
        "Classes by site and scanner",
        {f"classes.{n}.independence": f"class and {n} are independent" for n in names},
    )
    section.estimate_table(
        "association", "Association of class with site and scanner", [f"classes.{name}" for name in names]
    )


def _within_sites(cases: Cases, section: Section) -> None:
    site = cases.values("site")
    known = cases.subset(site != "")
    within = within_site_auroc(known.label, known.probs, known.values("site"))
    section.estimate("within_site_auroc", "macro AUROC within sites", within)
    section.estimate(
        "over_all_sites_auroc",
        "macro AUROC over all sites, same patients",
        macro_auroc_estimate(known.label, known.probs),
    )
    footnote = "Within sites, only patients of the same site are compared, so that the site cannot rank them."
    section.estimate_table(
        "within_sites", "Ranking within sites", ["within_site_auroc", "over_all_sites_auroc"], footnote
    )
