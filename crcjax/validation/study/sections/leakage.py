"""Section 2.4: whether the model could have seen the evaluated cases."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from crcjax.validation.estimate import Estimate, undetermined
from crcjax.validation.leakage import LeakageCheck, StudySlide, leakage_certificate
from crcjax.validation.study.development import checked_date
from crcjax.validation.study.section import Section
from crcjax.validation.study.trial import Cases, Trial

_METHOD = "comparison of the slides of development, calibration and evaluation"


def leakage(trial: Trial, cases: Cases, section: Section, stamp: str) -> None:
    """Fills the section. Raises InputError for a date that is not written as YYYY-MM-DD."""
    if trial.training is None:
        section.missing = (
            "The plan names no table of the slides that the model was developed on (data.training). That the cohort's and the "
            "predictions' column split excludes their cases is all that is known."
        )
        return
    calibration = tuple(_calibration(trial))
    slides = (*trial.training, *calibration, *_evaluated(trial))
    of_calibration = [slide for slide in slides if slide.role == "calibration"]
    fitted_on = {"training": [slide.case_id for slide in trial.training if slide.role == "development"]}
    if of_calibration:
        fitted_on["temperature and conformal sets"] = [slide.case_id for slide in of_calibration]
    certificate = leakage_certificate(
        slides,
        embedding=_embeddings(trial, slides),
        fitted_on=fitted_on,
        pretraining=trial.plan.leakage.pretraining,
        similarity=trial.plan.leakage.similarity,
    )
    section.add_sentences(
        f"{certificate.sentence}.",
        "A check whose data are absent is not checked, never clear. A finding is a leak until someone explains it.",
    )
    if certificate.leaks:
        section.messages.append(f"Leakage: {certificate.sentence}.")
    counts = [(role, str(number), str(certificate.patients[role])) for role, number in certificate.slides.items()]
    section.table("roles", "What was compared", ("", "slides", "patients"), counts, ("slides", "patients"))
    rows = [
        (
            *(check.name, check.verdict, f"{check.compared:,}", f"{check.findings:,}"),
            "; ".join(filter(None, ("\n".join(check.examples), check.remark))),
        )
        for check in certificate.checks
    ]
    columns = ("check", "verdict", "slides or cases", "findings", "first findings, and remarks")
    section.table("certificate", "Leakage certificate", columns, rows, columns[2:4])
    for check in certificate.checks:
        section.estimate(_name(check), f"{check.name}: findings", _findings(check))
    done = sum(check.verdict != "not checked" for check in certificate.checks)
    section.estimate("leaks", "checks that found a leak", _count(len(certificate.leaks), done))
    section.estimate("not_checked", "checks whose data are absent", _count(len(rows) - done, len(rows)))


def _evaluated(trial: Trial) -> Iterator[StudySlide]:
    """All scans of patients who played no part in the development, whether or not they reach the analysis."""
    plan = trial.plan.leakage
    for patient in trial.patients():
        if patient.is_of_development:
            continue
        for scan in patient.scans:
            place = f"{trial.plan.data.cohort}: slide {scan.slide.slide_id}"
            yield StudySlide(
                *(scan.slide.slide_id, scan.slide.case_id, "evaluation"),
                block_id=scan.value(plan.block) if plan.block else "",
                sha256=scan.row.slide_sha256 if scan.row else "",
                file_name=scan.slide.path.name if scan.slide.path else "",
                label=scan.target,
                date=checked_date(scan.value(plan.date), place) if plan.date else "",
            )


def _calibration(trial: Trial) -> Iterator[StudySlide]:
    """The slides of the table of calibration that the table of the development does not list already."""
    known = {slide.slide_id for slide in trial.training or ()}
    for row in trial.calibration.rows if trial.calibration else ():
        if row.slide_id not in known:
            yield StudySlide(row.slide_id, row.case_id, "calibration", sha256=row.slide_sha256, label=row.target)


def _embeddings(trial: Trial, slides: tuple[StudySlide, ...]) -> np.ndarray | None:
    if not trial.embeddings:
        return None
    nothing = np.full(len(next(iter(trial.embeddings.values()))), np.nan)
    return np.stack([trial.embeddings.get(slide.slide_id, nothing) for slide in slides])


def _name(check: LeakageCheck) -> str:
    return re.sub(r"\W+", "_", check.name)


def _findings(check: LeakageCheck) -> Estimate:
    if check.verdict == "not checked":
        return undetermined(_METHOD, check.compared, check.remark)
    warnings = (f"found: {'; '.join(check.examples)}",) if check.examples else ()
    return Estimate(float(check.findings), np.nan, np.nan, _METHOD, check.compared, warnings=warnings)


def _count(value: int, n: int) -> Estimate:
    return Estimate(float(value), np.nan, np.nan, "count of checks", n)
