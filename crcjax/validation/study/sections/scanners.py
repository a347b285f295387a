"""Section 2.7: the same glass slides on several scanners, with and without stain normalisation."""

from __future__ import annotations

import numpy as np

from crcjax.pages.render import Figure, number
from crcjax.pages.svg import COLOURS, FULL_WIDTH, drawing, to_figure
from crcjax.validation.agreement import cohen_kappa
from crcjax.validation.calibration_error import top_label_error
from crcjax.validation.confusion import confusion_matrix
from crcjax.validation.load_predictions import Predictions
from crcjax.validation.paired import paired_difference
from crcjax.validation.proportions import proportion, wilson
from crcjax.validation.scanners import (
    bhapkar,
    bland_altman,
    bowker,
    cochrans_q,
    intraclass_correlations,
    stuart_maxwell,
)
from crcjax.validation.study.forest import Row, forest_figure
from crcjax.validation.study.rescans import Rescans, rescans_of
from crcjax.validation.study.section import Section, p_text, value_and_interval
from crcjax.validation.study.sections.comparison import paired_cases
from crcjax.validation.study.trial import Cases, Trial

# A call that should not change with the scanner.
_CONFIDENT = 0.8


def scanners(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section."""
    if trial.without_normalisation is not None:
        _effect_of_normalisation(trial.without_normalisation, trial, cases, section)
    plan = trial.plan.scanners
    if plan is None:
        section.missing = "The plan names no scanner study (scanners)."
        return
    rows = {scan.slide.slide_id: scan.row for scan in trial.scans if scan.row and scan.row.is_ok}
    study = rescans_of(trial, rows)
    if study is None:
        section.missing = "No glass slide has predictions from two scanners."
        return
    glass, patients = len(study.glass), int(study.patient.max()) + 1
    section.add_sentences(
        f"{glass} glass slides of {patients} patients were scanned on {', '.join(study.scanners)}. Scans of one glass slide are "
        "compared with each other; the plan asks for a lower limit of the agreement of at least "
        f"{plan.agreement:g}. Intervals count patients as clusters."
    )
    forest: list[Row] = [("with normalisation", None)] if trial.without_normalisation else []
    forest += _agreement(study, section, "")
    _marginal_tests(study, section)
    _values(study, section, trial, "")
    _repeatability(study, section)
    _changes(study, section)
    if trial.without_normalisation is None:
        section.add_sentences("The plan names no predictions without stain normalisation.")
    else:
        _without_normalisation(trial, section, forest)
    section.figures.append(
        forest_figure(
            *("scanner_agreement", "Same call on two scanners", forest, "share of glass slides with the same call"),
            caption=f"The line is the plan's bound, {plan.agreement:g}.",
            reference=plan.agreement,
            stamp=stamp,
        )
    )
    section.figures.append(_bland_altman_figure(study, stamp))


def _effect_of_normalisation(without: Predictions, trial: Trial, cases: Cases, section: Section) -> None:
    """The accuracy of all analysed patients with and without stain normalisation."""
    other = paired_cases(without, trial, cases)
    own = cases.subset(np.isin(cases.case_ids, other.case_ids))
    if not len(own):
        section.add_sentences("No analysed patient has a prediction without stain normalisation.")
        return
    correct = own.label == own.call, own.label == other.call
    discordant = int((correct[0] & ~correct[1]).sum()), int((correct[1] & ~correct[0]).sum())
    names = "normalisation.with", "normalisation.without", "normalisation.difference"
    for name, label, estimate in (
        (names[0], "accuracy with stain normalisation", wilson(int(correct[0].sum()), len(own))),
        (names[1], "accuracy without stain normalisation", wilson(int(correct[1].sum()), len(own))),
        (names[2], "difference, with minus without", paired_difference(*discordant, len(own))),
    ):
        section.estimate(name, label, estimate)
    section.estimate_table("normalisation", "Stain normalisation, on all patients with both predictions", names)


def _without_normalisation(trial: Trial, section: Section, forest: list[Row]) -> None:
    """The same statistics without stain normalisation: normalisation is a component under test."""
    assert trial.without_normalisation is not None
    study = rescans_of(trial, {row.slide_id: row for row in trial.without_normalisation.evaluable})
    if study is None:
        section.add_sentences("No glass slide has predictions without stain normalisation from two scanners.")
        return
    forest.append(("without normalisation", None))
    forest += _agreement(study, section, "without.")
    _values(study, section, trial, "without.")


def _clusters(study: Rescans, chosen: np.ndarray) -> np.ndarray | None:
    """The patients of glass slides; None if every patient has one."""
    patients = study.patient[chosen]
    return patients if len(np.unique(patients)) < len(patients) else None


def _agreement(study: Rescans, section: Section, prefix: str) -> list[Row]:
    """The share of the same calls for every pair of scanners, and on all of them; returns rows of a forest plot."""
    title = "without normalisation: " if prefix else ""
    table, rows = dict[str, str](), list[Row]()
    for first, second in study.pairs:
        chosen = study.both(first, second)
        calls = study.call[chosen][:, [first, second], 0]
        pair, id = (
            f"{study.scanners[first]}, {study.scanners[second]}",
            f"{study.scanners[first]}.{study.scanners[second]}",
        )
        same = proportion(calls[:, 0] == calls[:, 1], _clusters(study, chosen))
        rows.append((pair, section.estimate(f"{prefix}agreement.{id}", f"{title}{pair}: same call", same)))
        kappa = cohen_kappa(confusion_matrix(calls[:, 0], calls[:, 1], len(section.classes)))
        section.estimate(f"{prefix}kappa.{id}", f"{title}{pair}: kappa", kappa)
        table[pair] = f"{prefix}{{}}.{id}"
    complete = np.all(study.call[:, :, 0] >= 0, axis=1)
    calls = study.call[complete][:, :, 0]
    every = proportion((calls == calls[:, :1]).all(axis=1), _clusters(study, complete))
    rows.append(
        ("all scanners", section.estimate(f"{prefix}agreement.all", f"{title}same call on all scanners", every))
    )
    table["all scanners"] = f"{prefix}{{}}.all"
    columns = {"same call": "agreement", "kappa": "kappa"}
    name = f"{prefix.rstrip('.') or 'with'}_agreement"
    section.estimate_matrix(name, _heading(title, "agreement of calls"), "scanners", table, columns)
    return rows


def _marginal_tests(study: Rescans, section: Section) -> None:
    for first, second in study.pairs:
        chosen = study.both(first, second)
        table = confusion_matrix(study.call[chosen, first, 0], study.call[chosen, second, 0], len(section.classes))
        pair = f"{study.scanners[first]} and {study.scanners[second]}"
        name = f"{study.scanners[first]}.{study.scanners[second]}"
        section.test(f"stuart_maxwell.{name}", f"{pair}: classes are equally frequent", stuart_maxwell(table))
        section.test(f"bhapkar.{name}", f"{pair}: classes are equally frequent", bhapkar(table))
        section.test(f"bowker.{name}", f"{pair}: confusions are symmetric", bowker(table))
    known = (study.call[:, :, 0] >= 0).all(axis=1) & (study.label >= 0)
    correct = study.call[known][:, :, 0] == study.label[known][:, None]
    section.test("cochran", "all scanners are correct equally often", cochrans_q(correct))
    section.test_table(
        "tests", "Tests between scanners", footnote="One glass slide counts as independent of others of its patient."
    )


def _values(study: Rescans, section: Section, trial: Trial, prefix: str) -> None:
    """Correctness and calibration on every scanner, intraclass correlations of logits, and limits of agreement."""
    title, name = "without normalisation: " if prefix else "", prefix.rstrip(".") or "with"
    for s, scanner in enumerate(study.scanners):
        chosen = (study.call[:, s, 0] >= 0) & (study.label >= 0)
        correct = proportion(study.call[chosen, s, 0] == study.label[chosen], _clusters(study, chosen))
        section.estimate(f"{prefix}accuracy.{scanner}", f"{title}{scanner}: accuracy", correct)
        known = study.label[chosen], study.probs[chosen, s, 0]
        error = top_label_error(*known, trial.plan.seed, _clusters(study, chosen), samples=trial.plan.resamples)
        section.estimate(f"{prefix}ece.{scanner}", f"{title}{scanner}: expected calibration error", error.error)
    rows = {scanner: f"{prefix}{{}}.{scanner}" for scanner in study.scanners}
    columns = {"accuracy": "accuracy", "expected calibration error": "ece"}
    section.estimate_matrix(f"{name}_values", _heading(title, "accuracy and calibration"), "scanner", rows, columns)
    for k, of_class in enumerate(section.classes):
        icc = intraclass_correlations(study.logits[:, :, 0, k])
        section.estimate(f"{prefix}icc_agreement.{of_class}", f"{title}logit of {of_class}: ICC(A,1)", icc.agreement)
        section.estimate(
            f"{prefix}icc_consistency.{of_class}", f"{title}logit of {of_class}: ICC(C,1)", icc.consistency
        )
    rows = {of_class: f"{prefix}{{}}.{of_class}" for of_class in section.classes}
    columns = {"ICC(A,1), agreement": "icc_agreement", "ICC(C,1), consistency": "icc_consistency"}
    footnote = "Consistency forgives a constant offset between scanners: the gap to agreement is the part that an offset explains."
    section.estimate_matrix(f"{name}_icc", _heading(title, "correlation of logits"), "class", rows, columns, footnote)
    _limits_of_agreement(study, section, prefix)


def _limits_of_agreement(study: Rescans, section: Section, prefix: str) -> None:
    title, rows = "without normalisation: " if prefix else "", []
    for first, second in study.pairs:
        for k, name in enumerate(section.classes):
            limits = bland_altman(study.logits[:, first, 0, k], study.logits[:, second, 0, k])
            pair = f"{study.scanners[first]} - {study.scanners[second]}"
            id = f"{prefix}bias.{study.scanners[first]}.{study.scanners[second]}.{name}"
            section.estimate(id, f"{title}{pair}: bias of the logit of {name}", limits.bias)
            cells = (
                value_and_interval(limits.bias),
                number(limits.lower_limit.value),
                number(limits.upper_limit.value),
            )
            rows.append((pair, name, *cells, p_text(limits.proportional_bias.p_value)))
    columns = ("scanners", "class", "bias with 95 % interval", "lower limit", "upper limit", "p of slope")
    footnote = (
        "95 % of differences lie between the limits. The slope is of differences over means: a proportional bias."
    )
    heading = _heading(title, "limits of agreement of logits")
    section.table(f"{prefix.rstrip('.') or 'with'}_bland_altman", heading, columns, rows, columns[2:], footnote)


def _heading(title: str, words: str) -> str:
    text = f"{title}{words}"
    return text[0].upper() + text[1:]


def _repeatability(study: Rescans, section: Section) -> None:
    """Repeated scans on one scanner."""
    if study.call.shape[2] < 2:
        section.add_sentences("There are no repeated scans on one scanner.")
        return
    rows, columns = (
        {},
        {"same call": "repeatability"} | {f"ICC(1,1), {name}": f"icc_{name}" for name in section.classes},
    )
    for s, scanner in enumerate(study.scanners):
        chosen = np.all(study.call[:, s] >= 0, axis=1)
        if not chosen.any():
            continue
        calls = study.call[chosen, s]
        same = proportion((calls == calls[:, :1]).all(axis=1), _clusters(study, chosen))
        section.estimate(f"repeatability.{scanner}", f"{scanner}: same call in every repeat", same)
        for k, name in enumerate(section.classes):
            icc = intraclass_correlations(study.logits[chosen, s, :, k]).one_way
            section.estimate(f"icc_{name}.{scanner}", f"{scanner}, logit of {name}, repeats: ICC(1,1)", icc)
        rows[scanner] = f"{{}}.{scanner}"
    section.estimate_matrix("repeatability", "Repeated scans on one scanner", "scanner", rows, columns)


def _changes(study: Rescans, section: Section) -> None:
    """How far the probabilities of a glass slide move, and how often a confident call flips."""
    complete = np.all(study.call[:, :, 0] >= 0, axis=1)
    probs, calls = study.probs[complete][:, :, 0], study.call[complete][:, :, 0]
    change = (probs.max(axis=1) - probs.min(axis=1)).max(axis=1)
    confident = probs[:, 0].max(axis=1) >= _CONFIDENT
    flips = (calls[confident] != calls[confident][:, :1]).any(axis=1)
    share = proportion(flips, _clusters(study, np.flatnonzero(complete)[confident]))
    label = f"call changes although the first scanner gave {_CONFIDENT:g} or more"
    section.estimate("flips", label, share)
    section.estimate_table("flips", "Confident calls that another scanner changes", ["flips"])
    if len(change):
        shares = [np.quantile(change, q) for q in (0.5, 0.9, 1.0)]
        section.add_sentences(
            "The largest change of a class's probability between scanners has the median "
            f"{shares[0]:.3f}, the 90th percentile {shares[1]:.3f} and the maximum {shares[2]:.3f} over glass slides."
        )


def _bland_altman_figure(study: Rescans, stamp: str) -> Figure:
    """Differences over means of the logit of the largest probability, a panel for each pair of scanners."""
    top = np.clip(study.probs[:, :, 0].max(axis=-1), 1e-6, 1 - 1e-6)
    logit, words = np.log(top / (1 - top)), []
    with drawing(FULL_WIDTH, 3.4) as figure:
        panels = figure.subplots(1, len(study.pairs), sharey=True, squeeze=False)[0]
        for axes, (first, second) in zip(panels, study.pairs, strict=True):
            a, b = logit[:, first], logit[:, second]
            limits = bland_altman(a, b)
            axes.plot((a + b) / 2, a - b, "o", ms=4, color=COLOURS[0], alpha=0.6, mew=0)
            for estimate, style in ((limits.bias, "-"), (limits.lower_limit, "--"), (limits.upper_limit, "--")):
                axes.axhline(estimate.value, color=COLOURS[1], ls=style, lw=1.3)
                axes.axhspan(estimate.ci_low, estimate.ci_high, color=COLOURS[1], alpha=0.12, lw=0)
            pair = f"{study.scanners[first]} - {study.scanners[second]}"
            axes.set(title=pair, xlabel="mean logit")
            words.append(f"{pair}: bias {value_and_interval(limits.bias)}")
        panels[0].set_ylabel("difference of logits")
        caption = "Logit of the largest probability. Lines: bias and limits of agreement, with their 95 % intervals."
        return to_figure(figure, "bland_altman", "Differences between scanners", "; ".join(words), caption, stamp=stamp)
